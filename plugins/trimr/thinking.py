"""Where thinking begins and ends in a stream of decoded text."""

from __future__ import annotations

from typing import NamedTuple

from jettison.plugins.trimr.types import ThinkingStrings


class Piece(NamedTuple):
    """A stretch of output on one side of the thinking strings; `closes` if the thinking ends after it."""

    text: str
    thinking: bool
    closes: bool = False
    opens: bool = False


class ThinkingTracker:
    """Splits output at the thinking strings, which may arrive in any pieces.

    Args:
        strings: start and end of thinking.
        inside: the output begins inside thinking.

    Attributes:
        inside: whether what was given out so far ends inside thinking.
    """

    def __init__(self, strings: ThinkingStrings, inside: bool) -> None:
        self._strings = strings
        self._held = ""
        self._at_start = inside
        self.inside = inside

    def push(self, text: str) -> list[Piece]:
        """Take text; what may be the beginning of a thinking string is held back."""
        self._held += text
        pieces: list[Piece] = []
        if self._at_start and not self._skip_start():
            return pieces
        while True:
            mark = self._strings.end if self.inside else self._strings.start
            at = self._held.find(mark)
            if at < 0:
                break
            pieces.append(Piece(self._held[:at], self.inside, closes=self.inside, opens=not self.inside))
            self._held = self._held[at + len(mark) :]
            self.inside = not self.inside
        keep = _overlap(self._held, mark)
        if len(self._held) > keep:
            pieces.append(Piece(self._held[: len(self._held) - keep], self.inside))
            self._held = self._held[len(self._held) - keep :]
        return pieces

    def flush(self) -> list[Piece]:
        """The output has ended: give out what was held back."""
        held, self._held = self._held, ""
        return [Piece(held, self.inside)] if held else []

    def _skip_start(self) -> bool:
        """Drop a start string at the head of output that begins inside thinking; False while it may still come."""
        start = self._strings.start
        stripped = self._held.lstrip()
        if len(stripped) < len(start) and start.startswith(stripped):
            return False
        self._at_start = False
        if stripped.startswith(start):
            self._held = stripped[len(start) :]
        return True


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that `mark` begins with."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-size:]):
            return size
    return 0
