"""A circuit breaker: after several failures in a row the verifier is left alone for a while, then tried once."""

from __future__ import annotations

import time
from collections.abc import Callable


class Breaker:
    """Closed at first. Not safe across threads; it lives in one event loop.

    Args:
        failures: in a row that open it.
        cooldown_s: seconds for which it stays open; then one trial is let through at a time.
        clock: seconds, monotonic.
    """

    def __init__(self, failures: int, cooldown_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._failed = 0
        self._opened_at: float | None = None
        self._trying = False

    @property
    def is_open(self) -> bool:
        """Whether calls are being refused or a single trial is under way."""
        return self._opened_at is not None

    def allow(self) -> bool:
        """Return whether a call may be made now; a True must be followed by `succeeded`, `failed` or `abandoned`."""
        if self._opened_at is None:
            return True
        if self._trying or self._clock() - self._opened_at < self._cooldown_s:
            return False
        self._trying = True
        return True

    def succeeded(self) -> None:
        """Close it."""
        self._failed, self._opened_at, self._trying = 0, None, False

    def failed(self) -> None:
        """Count a failure; open it at the limit, or at once if this was the trial."""
        self._failed += 1
        if self._failed >= self._limit or self._trying:
            self._opened_at = self._clock()
        self._trying = False

    def abandoned(self) -> None:
        """Forget a call whose asker left before there was an outcome."""
        self._trying = False
