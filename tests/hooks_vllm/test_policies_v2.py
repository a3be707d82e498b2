"""Request policies in runner V2, whose requests live in slots, and where a step may sample several tokens of each."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from jettison.hooks import Request
from jettison.hooks.status import status
from jettison.hooks.vllm.policies import PolicyProcessor
from policy_states import VOCAB, FakeStates, context, forced_rows, params

DRAFTS = 3
LENGTH = 60


def test_runner_v2(make_config: Callable[..., Any], policies: list[Request]) -> None:
    states = FakeStates(8)
    processor = PolicyProcessor(make_config({"poltest": {}}), states.view())
    for slot, (prompt, extra) in {
        5: ([4, 5], {"table": {1: [7, 8]}}),
        2: ([6], {}),
        3: ([1, 2, 3], {"table": {0: [9]}}),
    }.items():
        states.add(slot, prompt)
        assert processor.add_request(slot, params(**extra))
    processor.apply_staged_writes()
    assert [tuple(request.prompt_token_ids) for request in policies] == [(4, 5), (6,), (1, 2, 3)]
    steps = []
    for order in ([5, 2, 3], [3, 5, 2], [2, 5], [2, 3, 5]):
        found = forced_rows(processor, len(order), context(order))
        steps.append({order[row]: token for row, token in found.items()})
        for row, slot in enumerate(order):
            states.sample(slot, found.get(row, 50))
    assert steps == [{3: 9}, {5: 7}, {5: 8}, {}]


def test_runner_v2_recycles_slots_and_reads_resumed_outputs(
    make_config: Callable[..., Any], policies: list[Request]
) -> None:
    states = FakeStates(2)
    processor = PolicyProcessor(make_config({"poltest": {}}), states.view())
    states.add(0, [1, 2], output=[30, 31, 32])
    processor.add_request(0, params(table={3: [7]}))
    processor.apply_staged_writes()
    assert forced_rows(processor, 1, context([0])) == {0: 7}
    states.add(0, [5])
    processor.add_request(0, params())
    processor.apply_staged_writes()
    assert processor.live == {}
    assert forced_rows(processor, 1, context([0])) == {}


def test_a_request_that_sat_out_the_look_is_asked_when_it_is_due(
    make_config: Callable[..., Any], policies: list[Request]
) -> None:
    """Slot 1 runs on while all sleep and is absent when slot 0 wakes the processor."""
    states = FakeStates(2)
    processor = PolicyProcessor(make_config({"poltest": {}}), states.view())
    for slot, at in ((0, 10), (1, 14)):
        states.add(slot, [1])
        processor.add_request(slot, params(policy=Sleeper(at, [7])))
    processor.apply_staged_writes()
    found: dict[int, int] = {}
    for step in range(20):
        slots = [0] if step in (10, 11) else [0, 1]
        forced = forced_rows(processor, len(slots), context(slots))
        for row, slot in enumerate(slots):
            if row in forced:
                found[slot] = int(states.total[slot]) - 1
            states.sample(slot, forced.get(row, 50))
    assert found == {0: 10, 1: 14}


def test_a_request_that_ended_does_not_keep_the_others_awake(
    make_config: Callable[..., Any], policies: list[Request]
) -> None:
    states = FakeStates(2)
    processor = PolicyProcessor(make_config({"poltest": {}}), states.view())
    for slot, at in ((0, 100), (1, 5)):
        states.add(slot, [1])
        processor.add_request(slot, params(policy=Sleeper(at, [7])))
    processor.apply_staged_writes()
    forced_rows(processor, 2, context([0, 1]))
    for _ in range(4):
        states.sample(0, 50)
    awake = 0
    for _ in range(40):
        logits = torch.zeros(1, VOCAB)
        before = processor.sleeping
        processor.apply(logits, context([0]))
        awake += processor.sleeping != before - 1
        states.sample(0, 50)
    assert awake == 1, f"awake in {awake} of 40 steps"


@dataclass
class Sleeper:
    """Forces its ids once, when first asked with at least `wake_at` tokens."""

    wake_at: int
    ids: list[int]
    asked: list[int] = field(default_factory=list)

    def next_tokens(self, output_token_ids: Any) -> list[int] | None:
        self.asked.append(len(output_token_ids))
        if len(output_token_ids) < self.wake_at:
            return None
        self.wake_at = 10_000
        return self.ids


def chosen(output: list[int]) -> int:
    """What the model says next: any function of what was said."""
    return hash(tuple(output[-3:])) % (VOCAB - 20)


def verified(logits: torch.Tensor, output: list[int], drafts: list[int]) -> list[int]:
    """The tokens that greedy rejection sampling takes from a request's rows: what one row alone says, in order."""
    taken: list[int] = []
    for row in range(len(drafts) + 1):
        finite = torch.isfinite(logits[row]).nonzero().flatten().tolist()
        token = finite[0] if len(finite) == 1 else chosen([*output, *taken])
        taken.append(token)
        if row == len(drafts) or drafts[row] != token:
            break
    return taken


def run_with_drafts(processor: PolicyProcessor, states: FakeStates, rng: random.Random, slots: list[int]) -> None:
    """Steps of a batch whose order changes, whose requests sit steps out, and whose drafts are good or bad."""
    while any(states.total[slot] < LENGTH for slot in slots):
        order = [slot for slot in rng.sample(slots, len(slots)) if rng.random() < 0.8]
        outputs = {slot: states.output(slot) for slot in order}
        drafts: dict[int, list[int]] = {}
        for slot in order:
            said = list(outputs[slot])
            for _ in range(rng.randint(0, DRAFTS)):
                said.append(chosen(said) if rng.random() < 0.8 else rng.randrange(VOCAB))
            drafts[slot] = said[len(outputs[slot]) :]
        rows = [1 + len(drafts[slot]) for slot in order]
        if not rows:
            continue
        after = processor.apply(torch.zeros(sum(rows), VOCAB), context(order, rows))
        first = 0
        for slot, count in zip(order, rows, strict=True):
            for token in verified(after[first : first + count], outputs[slot], drafts[slot]):
                states.sample(slot, token)
            first += count


@pytest.mark.parametrize("seed", range(30))
def test_drafts_move_what_is_forced_by_less_than_a_step_and_change_nothing_else(
    seed: int, make_config: Callable[..., Any], policies: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the model alone, with the ids written in where they came to stand."""
    rng = random.Random(seed)
    status.reset()
    speculation = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 2}
    states = FakeStates(4)
    processor = drafting(make_config, states, speculation, monkeypatch)
    made = {}
    for slot in range(3):
        states.add(slot, [1, 2])
        at, count = rng.randint(0, 40), rng.randint(1, 9)
        made[slot] = (at, Sleeper(at, [VOCAB - 1 - rng.randrange(19) for _ in range(count)]))
        processor.add_request(slot, params(policy=made[slot][1]))
    states.add(3, [1, 2])
    processor.add_request(3, params())
    processor.apply_staged_writes()
    run_with_drafts(processor, states, rng, list(range(4)))
    assert status()["faults"] == {}, f"seed {seed}"
    for slot, (at, policy) in made.items():
        output = states.output(slot)
        place = next(n for n, token in enumerate(output) if token >= VOCAB - 20)
        assert at <= place <= at + DRAFTS, f"seed {seed}, slot {slot}: due at {at}, forced at {place}"
        alone: list[int] = []
        while len(alone) < len(output):
            alone += policy.ids if len(alone) == place else [chosen(alone)]
        assert output == alone[: len(output)], f"seed {seed}, slot {slot}"
    assert not any(token >= VOCAB - 20 for token in states.output(3)), f"seed {seed}"


@pytest.mark.parametrize("seed", range(5))
def test_with_drafts_a_sleeping_policy_is_asked_seldom(
    seed: int, make_config: Callable[..., Any], policies: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    speculation = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 2}
    states = FakeStates(1)
    processor = drafting(make_config, states, speculation, monkeypatch)
    policy = Sleeper(50, [VOCAB - 1])
    states.add(0, [1, 2])
    processor.add_request(0, params(policy=policy))
    processor.apply_staged_writes()
    run_with_drafts(processor, states, random.Random(seed), [0])
    assert 50 <= policy.asked[-1] <= 50 + DRAFTS or policy.asked[-2] >= 50
    # A sleep is at least a quarter of the way to go, were only one token of each step taken.
    most = math.log(50) / math.log((1 + DRAFTS) / DRAFTS)
    assert len([length for length in policy.asked if length < 50]) <= most, f"asked at {policy.asked}"


def drafting(
    make_config: Callable[..., Any], states: FakeStates, speculation: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> PolicyProcessor:
    """As on CUDA: a CPU build has no runner V2, so the configuration is made before it claims to have one."""
    config = make_config({"poltest": {}}, speculative_config=speculation)
    monkeypatch.setattr("vllm.config.VllmConfig.use_v2_model_runner", property(lambda config: True))
    return PolicyProcessor(config, states.view())
