"""Splitting a batch into decode rows and prefill calls, against a per-token account of what each query must see."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

import pytest

from jettison.hooks.vllm.prefill_plan import Run, count_decodes, plan_prefill

CASES = 2000


def batch(rng: random.Random) -> tuple[list[int], list[int], int]:
    """Random (query_start_loc, seq_lens, threshold) in the engine's order: short queries first, padding among them."""
    threshold = rng.choice((1, 1, 4, 16))
    decodes = sorted(rng.choice((0, rng.randint(1, threshold))) for _ in range(rng.randrange(5)))
    prefills = sorted(rng.randint(threshold + 1, 60) for _ in range(rng.randrange(6)))
    queries = decodes + prefills
    histories = [rng.choice((0, 0, rng.randrange(200))) for _ in queries]
    return [0, *accumulate(queries)], [q + h for q, h in zip(queries, histories, strict=True)], threshold


def seen(runs: Sequence[Run], window: int) -> dict[int, tuple[int, int, range]]:
    """Token in the batch -> (row, its position, positions that it sees), as a bottom-right causal kernel counts."""
    found = {}
    for run in runs:
        for place, row in enumerate(range(run.first, run.last)):
            first_query, end_query = run.queries[place : place + 2]
            keys = run.keys[place + 1] - run.keys[place]
            for query in range(first_query, end_query):
                last = keys - (end_query - query)
                first = max(0, last - window + 1) if window > 0 else 0
                start = run.starts[place]
                assert run.begin + query not in found, "a token is served twice"
                found[run.begin + query] = (row, start + last, range(start + first, start + last + 1))
    return found


@pytest.mark.parametrize("window", [-1, 1, 7, 64])
@pytest.mark.parametrize("read_fresh", [True, False])
@pytest.mark.parametrize("short", [0, 20])
def test_every_prefill_query_sees_its_own_prefix(window: int, read_fresh: bool, short: int) -> None:
    rng = random.Random(20_261_123)
    for case in range(CASES):
        bounds, lengths, threshold = batch(rng)
        capacity = max([*lengths, 1]) + rng.randrange(100)
        first = count_decodes(bounds, threshold)
        runs = plan_prefill(
            bounds, lengths, first, window=window, capacity=capacity, read_fresh=read_fresh, short=short
        )
        expected = {}
        for row in range(first, len(lengths)):
            for token in range(bounds[row], bounds[row + 1]):
                position = lengths[row] - (bounds[row + 1] - token)
                low = max(0, position - window + 1) if window > 0 else 0
                expected[token] = (row, position, range(low, position + 1))
        options = f"window {window}, capacity {capacity}, fresh {read_fresh}, short {short}"
        where = f"case {case}: {bounds}, {lengths}, {options}"
        assert seen(runs, window) == expected, where
        for run in runs:
            rows = range(run.first, run.last)
            whole = [lengths[row] == bounds[row + 1] - bounds[row] for row in rows]
            new = [bounds[row + 1] - bounds[row] for row in rows]
            if run.source == "new":
                assert read_fresh, where
                assert all(whole), where
            else:
                assert not read_fresh or not any(whole), where
                assert all((count <= short) == (run.source == "pages") for count in new), where
            assert run.source != "copy" or run.keys[-1] <= capacity, where
            assert run.end - run.begin == run.queries[-1], where
            assert (run.begin, run.end) == (bounds[run.first], bounds[run.last]), where


def test_neighbours_of_one_kind_share_a_call() -> None:
    runs = plan_prefill([0, 20, 50, 90, 130], [20, 30, 140, 140], 0, window=-1, capacity=300)
    assert [(run.first, run.last, run.source) for run in runs] == [(0, 2, "new"), (2, 4, "copy")]
    assert runs[0].queries == runs[0].keys == (0, 20, 50)
    assert (runs[1].queries, runs[1].keys, runs[1].starts) == ((0, 40, 80), (0, 140, 280), (0, 0))
    assert (runs[1].max_queries, runs[1].max_keys) == (40, 140)
    assert runs[1].words == (0, 40, 80, 0, 140, 280, 0, 0)


def test_a_call_reads_back_no_more_than_there_is_room_for() -> None:
    runs = plan_prefill([0, 40, 80, 120], [140, 140, 139], 0, window=-1, capacity=279)
    assert [(run.first, run.last) for run in runs] == [(0, 1), (1, 3)]
    assert [run.keys[-1] for run in runs] == [140, 279]


def test_a_window_reads_only_what_it_can_see() -> None:
    (run,) = plan_prefill([0, 10], [1000], 0, window=64, capacity=1000)
    assert run.starts == (1000 - 10 - 63,)
    assert run.keys == (0, 10 + 63)


@pytest.mark.parametrize(
    ("bounds", "threshold", "expected"),
    [
        ([0, 1, 2, 3], 1, 3),
        ([0, 1, 2, 12], 1, 2),
        ([0, 5, 10], 4, 0),
        ([0, 4, 8, 8, 8], 4, 4),
        ([0, 0, 1, 9], 1, 2),
        ([0], 1, 0),
    ],
)
def test_leading_short_rows_decode(bounds: list[int], threshold: int, expected: int) -> None:
    assert count_decodes(bounds, threshold) == expected


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="row 0 has 10 new tokens, but its sequence only 9"):
        plan_prefill([0, 10], [9], 0, window=-1, capacity=100)
    with pytest.raises(ValueError, match="row 0 reads 101 tokens back, the room is for 100"):
        plan_prefill([0, 10], [101], 0, window=-1, capacity=100)
