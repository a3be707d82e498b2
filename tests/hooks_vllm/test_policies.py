"""Request policies: which token is forced in which row, in both runners, and that a fault stays in its request."""

from __future__ import annotations

import random
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from jettison.hooks import JettisonError, Request
from jettison.hooks.status import status
from jettison.hooks.vllm import compat
from jettison.hooks.vllm.live_policy import LivePolicy, Parked
from jettison.hooks.vllm.policies import PolicyProcessor
from policy_states import VOCAB, Script, forced_rows, params

NEVER = float("-inf")


def live(table: dict[int, Any], output: list[int] | None = None) -> tuple[LivePolicy, Script, list[int]]:
    script, out = Script(table), [] if output is None else output
    return LivePolicy("test", script, out, 3, VOCAB), script, out


def test_a_sequence_is_forced_in_order_and_asked_for_once() -> None:
    policy, script, out = live({2: [7, 8, 9]})
    forced = []
    for _ in range(6):
        forced.append(policy.next_token())
        out.append(100 if forced[-1] is None else forced[-1])
    assert forced == [None, None, 7, 8, 9, None]
    assert script.asked == [0, 1, 2, 5]


def test_a_step_whose_token_is_thrown_away_is_answered_the_same() -> None:
    policy, script, out = live({0: [7, 8]})
    assert [policy.next_token() for _ in range(4)] == [7] * 4
    out.append(7)
    assert [policy.next_token() for _ in range(3)] == [8] * 3
    assert script.asked == [0]


def test_an_overruled_token_ends_the_policy() -> None:
    status.reset()
    policy, _, out = live({0: [7, 8]})
    assert policy.next_token() == 7
    out.append(50)
    assert policy.next_token() is None
    assert policy.next_token() is None
    assert status()["faults"] == {"test: a forced token was overruled by the engine": 1}


def _raise() -> Any:
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    "answer",
    [[VOCAB], [-1], [2**80], [1.5], ["7"], [None], "7", b"7", 7, {7}, iter([7]), range(10**9), [7] * 70_000, _raise,
     lambda: 1 / 0, [].pop, object()],
    ids=lambda answer: type(answer).__name__,
)  # fmt: skip
def test_a_bad_answer_ends_the_policy_and_is_counted_once(answer: Any) -> None:
    status.reset()
    policy, _, out = live({1: answer})
    assert policy.next_token() is None
    out.append(5)
    for _ in range(5):
        assert policy.next_token() is None
        out.append(5)
    assert list(status()["faults"].values()) == [1], f"{answer!r} gave {status()['faults']}"


def test_an_empty_answer_and_none_leave_the_request_free() -> None:
    status.reset()
    policy, script, out = live({0: [], 1: None, 2: ()})
    for _ in range(4):
        assert policy.next_token() is None
        out.append(1)
    assert script.asked == [0, 1, 2, 3]
    assert status()["faults"] == {}


def test_a_policy_cannot_change_the_engines_list() -> None:
    out = [1, 2, 3]
    seen: list[Any] = []
    policy = LivePolicy("test", types.SimpleNamespace(next_tokens=seen.append), out, 0, VOCAB)
    policy.next_token()
    tokens = seen[0]
    assert list(tokens) == out
    assert tokens[-1] == 3
    assert tokens[1:] == (2, 3)
    assert not any(hasattr(tokens, name) for name in ("append", "clear", "pop", "__setitem__", "__delitem__", "extend"))
    out.append(4)
    assert len(tokens) == 4


def test_parked_policies_are_bounded() -> None:
    parked = Parked()
    lists: list[list[int]] = [[] for _ in range(1500)]
    for out in lists:
        parked.put(live({}, out)[0])
    assert parked.take(lists[0]) is None
    kept = parked.take(lists[-1])
    assert kept is not None
    assert kept.output is lists[-1]


def processor_v1(make_config: Callable[..., Any]) -> PolicyProcessor:
    return PolicyProcessor(make_config({"poltest": {}}), torch.device("cpu"), False)


def update(removed: Any = (), added: Any = (), moved: Any = ()) -> Any:
    return compat.BatchUpdate(batch_size=0, removed=list(removed), added=list(added), moved=list(moved))


def test_nothing_live_returns_the_very_same_tensor(make_config: Callable[..., Any], policies: list[Request]) -> None:
    processor = processor_v1(make_config)
    logits = torch.randn(4, VOCAB)
    processor.update_state(update(added=[(row, params(), [1], []) for row in range(4)]))
    assert processor.apply(logits) is logits
    assert processor.live == {}
    processor.update_state(None)


def test_the_request_that_plugins_see(make_config: Callable[..., Any], policies: list[Request]) -> None:
    processor = processor_v1(make_config)
    processor.update_state(update(added=[(0, params(table={}, mine="x"), [4, 5, 6], [])]))
    (request,) = policies
    assert tuple(request.prompt_token_ids) == (4, 5, 6)
    assert request.params["mine"] == "x"
    assert (request.request_id, request.vocab_size) == (None, VOCAB)
    with pytest.raises(TypeError):
        request.params["mine"] = "y"  # type: ignore[index]


def test_a_failing_plugin_at_admission_leaves_the_request_free(
    make_config: Callable[..., Any], policies: list[Request]
) -> None:
    processor = processor_v1(make_config)
    status.reset()
    added = [(0, params(fail=True), [1], []), (1, params(table={0: [9]}), [1], []), (2, params(policy=5), [1], [])]
    processor.update_state(update(added=added))
    assert forced_rows(processor, 3) == {1: 9}
    assert status()["faults"] == {
        "poltest: request_policy failed": 1, "poltest: request_policy returned an object without next_tokens": 1,
    }  # fmt: skip


def test_a_token_that_a_grammar_excluded_is_not_forced(
    make_config: Callable[..., Any], policies: list[Request]
) -> None:
    processor = processor_v1(make_config)
    processor.update_state(update(added=[(r, params(table={0: [9]}), [1], []) for r in range(2)]))
    logits = torch.zeros(2, VOCAB)
    logits[0, 9] = NEVER
    after = processor.apply(logits.clone())
    assert torch.equal(after[0], logits[0])
    assert after[1].isfinite().nonzero().flatten().tolist() == [9]


def test_a_preempted_request_keeps_its_policy_when_another_takes_its_row(
    make_config: Callable[..., Any], policies: list[Request]
) -> None:
    """vLLM fills the freed row by a move and then does not announce it as removed."""
    directions = compat.MoveDirectionality
    processor = processor_v1(make_config)
    outputs: list[list[int]] = [[], []]
    processor.update_state(update(added=[(row, params(table={0: [9]}), [1], outputs[row]) for row in range(2)]))
    first = processor.live[0]
    processor.update_state(update(moved=[(1, 0, directions.UNIDIRECTIONAL)]))
    assert list(processor.live) == [0]
    processor.update_state(update(added=[(1, params(table={0: [9]}), [1], outputs[0])]))
    assert processor.live[1] is first
    assert len(policies) == 2, "it was admitted again"


@pytest.mark.parametrize("seed", range(20))
def test_rows_follow_their_requests_through_every_batch_change(
    seed: int, make_config: Callable[..., Any], policies: list[Request]
) -> None:
    """A random life of a batch, moved as vLLM's InputBatch moves it; request k forces token k at even lengths."""
    rng = random.Random(seed)
    processor = processor_v1(make_config)
    directions = compat.MoveDirectionality
    outputs: dict[int, list[int]] = {k: [] for k in range(24)}
    wanted = {k: {n: [k] for n in range(0, 200, 2)} if k % 3 else None for k in outputs}
    rows: list[int] = []
    for step in range(60):
        removed = sorted(rng.sample(range(len(rows)), rng.randint(0, len(rows) // 2)), reverse=True)
        holes = sorted(removed)
        out = [k for k in outputs if k not in rows]
        arriving = rng.sample(out, min(len(out), rng.randint(0, 3)))
        slots: list[int | None] = [None if row in removed else k for row, k in enumerate(rows)]
        added = []
        for k in arriving:
            row = holes.pop(0) if holes else len(slots)
            slots[row : row + 1] = [k]
            table = wanted[k]
            added.append((row, params(table=table) if table is not None else params(), [1], outputs[k]))
        moved = []
        while None in slots:
            if slots[-1] is None:
                slots.pop()
                continue
            hole = slots.index(None)
            moved.append((len(slots) - 1, hole, directions.UNIDIRECTIONAL))
            slots[hole] = slots.pop()
        if len(slots) > 1 and rng.random() < 0.5:
            a, b = rng.sample(range(len(slots)), 2)
            moved.append((a, b, directions.SWAP))
            slots[a], slots[b] = slots[b], slots[a]
        rows = [k for k in slots if k is not None]
        left = [row for row in removed if row in holes]
        processor.update_state(update(left, added, moved) if left or added or moved else None)
        expected = {row: k for row, k in enumerate(rows) if wanted[k] is not None and len(outputs[k]) % 2 == 0}
        found = forced_rows(processor, len(rows)) if rows else {}
        assert found == expected, f"seed {seed}, step {step}: rows {rows}, lengths {[len(outputs[k]) for k in rows]}"
        for row, k in enumerate(rows):
            if rng.random() < 0.8:
                outputs[k].append(found.get(row, 99))
    assert sum(1 for r in policies if "table" in r.params) <= 24, "a request that came back was asked about again"


def test_the_processor_without_options_is_refused(make_config: Callable[..., Any]) -> None:
    with pytest.raises(JettisonError, match="without any Jettison option"):
        PolicyProcessor(make_config(), torch.device("cpu"), False)


def test_without_a_policy_plugin_nothing_is_tracked(make_config: Callable[..., Any]) -> None:
    processor = PolicyProcessor(make_config({"kvtest": {}}), torch.device("cpu"), False)
    processor.update_state(update(added=[(0, params(), [1], [])]))
    assert not processor.add_request(0, params())
    assert processor.live == {}
