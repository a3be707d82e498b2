"""The loop detector: where the last tokens stood before, and how far back the text repeats (paper, section 3.4).

A loop is text that repeats back to back. The places where the last `window` tokens stood before are candidates for its
period, nearest first, and from there tokens are compared one by one; so every period up to `max_period` is found, not
only those of a few windows, and nothing rests on a hash. A request on which nothing fires pays one byte search per
look, whatever the number of tokens in it.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jettison.plugins.trimr.config import Repeat

_FILLER = 4
"""An n-gram with fewer different tokens than one in so many is a line of dashes or zeros, and covers nothing."""
_CANDIDATES = 16
_LOOKS_PER_SPAN = 2
_ITEM = 8
_PRIME = (1 << 61) - 1
_WORD = re.compile(r"[A-Za-z]{1,64}|\d|\s{1,64}|[^A-Za-z\d\s]")


class Loop(NamedTuple):
    """Text that repeats back to back: its `period` and its whole length, in tokens."""

    period: int
    tokens: int


class Words:
    """Numbers for the words of a text, in place of token ids; a word ends when the next one begins."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._held = ""

    def push(self, text: str) -> list[int]:
        """The numbers of the words that `text` completes."""
        text = self._held + text
        words = _WORD.findall(text)
        self._held = words.pop() if words else ""
        return [self._known.setdefault(word, len(self._known)) for word in words]


class LoopDetector:
    """Follows the tokens of one thinking block.

    Attributes:
        coverage: share of the last `span` tokens that stand in n-grams seen before in them; counted twice per span, 0
            before it is full.
    """

    def __init__(self, options: Repeat) -> None:
        self._options = options
        self._ids = array("q")
        self._plain = array("q")  # the same, with a number of its own for each structured token
        self._keep = options.max_period + max(
            options.times * max(options.max_period, options.window), options.structure_tokens, 2 * options.span
        )
        self._count = 0
        self._counted_at = 0
        self.coverage = 0.0

    def push(self, tokens: Sequence[int], structured: bool = False) -> None:
        """Take tokens; `structured` ones (code, tables) do not count towards `coverage`."""
        before = len(self._ids)
        try:
            self._ids.extend(tokens)
        except OverflowError:
            del self._ids[before:]
            self._ids.extend(token % _PRIME for token in tokens)
        fresh = len(self._ids) - before
        self._plain.extend(range(-self._count - fresh, -self._count) if structured else self._ids[before:])
        self._count += fresh
        if self._count - self._counted_at >= self._options.span // _LOOKS_PER_SPAN:
            self._counted_at = self._count
            self._measure_coverage()
        if len(self._ids) > 2 * self._keep:
            del self._ids[: len(self._ids) - self._keep]
            del self._plain[: len(self._plain) - self._keep]

    def loops(self) -> list[Loop]:
        """The runs that the text ends with: one per place where its last `window` tokens stood before."""
        window = self._options.window
        ids = self._ids[-self._keep :]
        end = len(ids)
        if end <= window:
            return []
        text, found = ids.tobytes(), []
        last = text[-window * _ITEM :]
        place = len(text) - _ITEM  # exclusive end of what is searched
        earliest = max(0, end - window - self._options.max_period) * _ITEM
        for _ in range(_CANDIDATES):
            place = text.rfind(last, earliest, place)
            while place >= 0 and place % _ITEM:
                place = text.rfind(last, earliest, place + len(last) - 1)
            if place < 0:
                break
            period = end - window - place // _ITEM
            found.append(Loop(period, period + _run(ids, period)))
            place += len(last) - _ITEM
        return found

    def _measure_coverage(self) -> None:
        span, ngram = self._options.span, self._options.ngram
        if self._count < span:
            return
        tokens = self._plain[-span:]
        text, step = tokens.tobytes(), ngram * _ITEM
        seen: set[bytes] = set()
        flags = bytearray(span)
        for at in range(span - ngram + 1):
            gram = text[at * _ITEM : at * _ITEM + step]
            if gram not in seen:
                seen.add(gram)
            elif len(set(tokens[at : at + ngram])) >= ngram // _FILLER:
                flags[at : at + ngram] = b"\x01" * ngram
        self.coverage = sum(flags) / span


def _run(ids: array[int], period: int) -> int:
    """How many tokens at the end equal those one period before."""
    tokens = np.frombuffer(ids, dtype=np.int64)
    differ = np.flatnonzero(tokens[period:] != tokens[:-period])
    return int(len(tokens) - period - (differ[-1] + 1 if len(differ) else 0))
