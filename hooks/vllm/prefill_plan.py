"""Which rows of a batch decode, and how the others are cut into attention calls: plain integers, no device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

Source = Literal["new", "pages", "copy"]
"""Where queries find their keys: in the batch itself, in the pages, or in a copy that was read back from the pages."""


@dataclass(frozen=True)
class Run:
    """Adjacent sequences whose new tokens are served by one call of a variable-length attention kernel.

    Attributes:
        first, last: the sequences, as rows of the batch; `last` is excluded.
        begin, end: their tokens in the batch; `end` is excluded.
        source: where the keys are.
        queries, keys: cumulative lengths, from 0, one more than sequences.
        starts: first token of each sequence that is read back; 0 without a window.
    """

    first: int
    last: int
    begin: int
    end: int
    source: Source
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def max_queries(self) -> int:
        """The longest query."""
        return max(b - a for a, b in pairwise(self.queries))

    @property
    def max_keys(self) -> int:
        """The most keys of a sequence."""
        return max(b - a for a, b in pairwise(self.keys))

    @property
    def words(self) -> tuple[int, ...]:
        """What the device needs, in one vector: queries, keys, starts."""
        return (*self.queries, *self.keys, *self.starts)


@dataclass(frozen=True)
class _Row:
    number: int
    queries: int
    start: int
    keys: int
    source: Source


def count_decodes(query_start_loc: Sequence[int], threshold: int) -> int:
    """Leading rows of at most `threshold` new tokens; rows without any are padding and count as such.

    The engine sorts its batches by the number of new tokens, so what follows is prefill.
    """
    lengths = [b - a for a, b in pairwise(query_start_loc)]
    return next((row for row, length in enumerate(lengths) if length > threshold), len(lengths))


def plan_prefill(
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    first: int,
    *,
    window: int,
    capacity: int,
    read_fresh: bool = True,
    short: int = 0,
) -> tuple[Run, ...]:
    """Cut the rows from `first` on into runs.

    Args:
        query_start_loc: [S+1], first token of each sequence in the batch.
        seq_lens: [S], tokens of each sequence, the new ones among them.
        first: the first row that does not decode.
        window: tokens that a query sees, its own among them; -1 for all.
        capacity: tokens that can be read back at once; at least the longest sequence.
        read_fresh: whether sequences without history use the batch's own keys, which are not quantised.
        short: rows with history and at most so many new tokens are served from the pages: to read all of a history
            back for the last few tokens of a prompt, the rest of which was cached, takes longer.

    Raises:
        ValueError: a sequence is longer than `capacity` or shorter than its new tokens.
    """
    runs = []
    for rows in _together(_rows(query_start_loc, seq_lens, first, window, read_fresh, short), capacity):
        begin = query_start_loc[rows[0].number]
        queries = tuple(accumulate((row.queries for row in rows), initial=0))
        keys = tuple(accumulate((row.keys for row in rows), initial=0))
        runs.append(
            Run(
                rows[0].number,
                rows[-1].number + 1,
                begin,
                begin + queries[-1],
                rows[0].source,
                queries,
                keys,
                tuple(row.start for row in rows),
            )
        )
    return tuple(runs)


def _rows(
    query_start_loc: Sequence[int], seq_lens: Sequence[int], first: int, window: int, read_fresh: bool, short: int
) -> Iterator[_Row]:
    for number in range(first, len(query_start_loc) - 1):
        queries, length = query_start_loc[number + 1] - query_start_loc[number], seq_lens[number]
        if length < queries:
            raise ValueError(f"row {number} has {queries} new tokens, but its sequence only {length}")
        if not queries:
            yield _Row(number, 0, 0, 0, "new" if read_fresh else "copy")
        elif read_fresh and length == queries:
            yield _Row(number, queries, 0, queries, "new")
        else:
            start = max(0, length - queries - window + 1) if window > 0 else 0
            yield _Row(number, queries, start, length - start, "pages" if queries <= short else "copy")


def _together(rows: Iterator[_Row], capacity: int) -> Iterator[list[_Row]]:
    taken: list[_Row] = []
    keys = 0
    for row in rows:
        copied = row.source == "copy"
        if copied and row.keys > capacity:
            raise ValueError(f"row {row.number} reads {row.keys} tokens back, the room is for {capacity}")
        if taken and (row.source != taken[0].source or (copied and keys + row.keys > capacity)):
            yield taken
            taken, keys = [], 0
        taken.append(row)
        keys += row.keys
    if taken:
        yield taken
