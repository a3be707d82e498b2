"""What is in force in this process: filled by the engine's room, read by the status RPC, the CLI and tests.

Holds no content and no secrets: options only as their hash, faults only as counts.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jettison.hooks.host import Active, Host

logger = logging.getLogger("jettison")


class Status:
    """The record of one process. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engine: dict[str, Any] | None = None
        self._layers: list[dict[str, Any]] = []
        self._faults: Counter[str] = Counter()
        self._facts: dict[str, Any] = {}
        self._host: Host | None = None
        self._active: Active | None = None

    def engine(self, name: str, version: str, **facts: Any) -> None:
        """Record the engine, e.g. `engine("vllm", "0.32.0", device="cpu")`."""
        with self._lock:
            self._engine = {"name": name, "version": version, **facts}

    def activated(self, host: Host, active: Active | None) -> None:
        """Record what the host activated for the engine of this process; None where nothing is active."""
        with self._lock:
            self._host, self._active = host, active

    def layers(self, layers: Sequence[dict[str, Any]]) -> None:
        """Record what each layer really got, JSON-ready, e.g. `{"name": ..., "key_bits": 8, "bytes_per_token": 96}`."""
        with self._lock:
            self._layers = [dict(layer) for layer in layers]

    def fact(self, name: str, value: Any) -> None:
        """Record one more JSON-ready fact under `name`."""
        with self._lock:
            self._facts[name] = value

    def fault(self, plugin: str, reason: str, error: BaseException | None = None) -> int:
        """Count a fault of a running plugin and log the first of its kind; return how many there were.

        `reason` is a fixed phrase of ours. Of `error` only the type is logged: its text may quote a request.
        """
        key = f"{plugin}: {reason}"
        with self._lock:
            self._faults[key] += 1
            count = self._faults[key]
        if count == 1:
            kind = f" ({type(error).__name__})" if error is not None else ""
            logger.warning("Plugin %r: %s%s; further ones are counted in the status only.", plugin, reason, kind)
        return count

    def __call__(self) -> dict[str, Any]:
        """Return the record as JSON-ready data."""
        from jettison.hooks import __version__

        with self._lock:
            return {
                "jettison": __version__,
                "engine": self._engine,
                "process": {"pid": os.getpid(), "rank": os.environ.get("RANK")},
                "plugins": _plugins(self._host, self._active),
                "layers": [dict(layer) for layer in self._layers],
                "faults": dict(self._faults),
                **self._facts,
            }

    def reset(self) -> None:
        """Forget everything, for the next engine of this process."""
        with self._lock:
            self._engine, self._host, self._active = None, None, None
            self._layers.clear()
            self._faults.clear()
            self._facts.clear()


def _plugins(host: Host | None, active: Active | None) -> dict[str, dict[str, Any]]:
    from jettison.hooks.config import options_sha256

    sections = active.options.sections() if active is not None else {}
    reports = active.report() if active is not None else {}
    installed = host.plugins if host is not None else {}
    return {
        name: {
            "active": name in sections,
            "version": info.version,
            "error": info.error,
            "options_sha256": options_sha256(sections[name]) if name in sections else None,
            "report": reports.get(name),
        }
        for name, info in installed.items()
    }


status = Status()
"""The record of this process: `status()` reads it."""
