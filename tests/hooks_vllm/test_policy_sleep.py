"""Policies that say when to be asked next: what they force is what they force when asked at every token."""

from __future__ import annotations

import random
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from jettison.hooks import Host, Request, hookimpl
from jettison.hooks.vllm import compat, engine
from jettison.hooks.vllm.policies import PolicyProcessor

VOCAB = 64


class Sleeper:
    """Forces its tokens once at a length; with `sleeps`, it is to be asked from that length on only."""

    def __init__(self, at: int, ids: list[int], sleeps: bool) -> None:
        self.at, self.ids, self.asked = at, ids, 0
        if sleeps:
            self.wake_at = at

    def next_tokens(self, output_token_ids: Sequence[int]) -> list[int] | None:
        self.asked += 1
        if len(output_token_ids) != self.at:
            return None
        if hasattr(self, "wake_at"):
            self.wake_at = 10_000
        return self.ids


@pytest.fixture
def host(make_plugin: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(request: Request) -> Any:
        return request.params.get("policy")

    found = Host.of([make_plugin("poltest", lambda options: types.SimpleNamespace(request_policy=hookimpl(choose)))])
    monkeypatch.setattr(engine, "host", lambda: found)


def live_through(make_config: Callable[..., Any], seed: int, sleeps: bool) -> tuple[list[list[int]], int]:
    """A random batch whose requests come one by one and whose steps may throw their token away."""
    rng = random.Random(seed)
    processor = PolicyProcessor(make_config({"poltest": {}}), torch.device("cpu"), False)
    policies, outputs = [], []
    for _ in range(120):
        if len(outputs) < 5 and rng.random() < 0.1:
            policy = Sleeper(rng.randint(0, 60), [rng.randrange(VOCAB - 1) for _ in range(rng.randint(1, 4))], sleeps)
            policies.append(policy)
            outputs.append([])
            params = compat.SamplingParams(extra_args={"policy": policy})
            added = [(len(outputs) - 1, params, [1], outputs[-1])]
            processor.update_state(compat.BatchUpdate(batch_size=0, removed=[], added=added, moved=[]))
        logits = torch.zeros(len(outputs), VOCAB)
        after = processor.apply(logits.clone()) if outputs else logits
        for row, output in enumerate(outputs):
            if rng.random() < 0.9:
                finite = torch.isfinite(after[row]).nonzero().flatten().tolist()
                output.append(finite[0] if len(finite) == 1 else VOCAB - 1)
    return outputs, sum(policy.asked for policy in policies)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.usefixtures("host")
def test_sleeping_changes_no_token_and_saves_the_asking(seed: int, make_config: Callable[..., Any]) -> None:
    awake, often = live_through(make_config, seed, sleeps=False)
    asleep, seldom = live_through(make_config, seed, sleeps=True)
    assert asleep == awake, f"seed {seed}"
    assert any(token != VOCAB - 1 for output in awake for token in output), f"seed {seed}: nothing was forced"
    assert seldom < often, f"seed {seed}: asked {seldom} times asleep, {often} awake"


@pytest.mark.usefixtures("host")
def test_while_all_sleep_the_very_same_logits_come_back_untouched(make_config: Callable[..., Any]) -> None:
    processor = PolicyProcessor(make_config({"poltest": {}}), torch.device("cpu"), False)
    policies = [Sleeper(at, [3], sleeps=True) for at in (20, 30)]
    outputs: list[list[int]] = [[], []]
    added = [
        (row, compat.SamplingParams(extra_args={"policy": policy}), [1], outputs[row])
        for row, policy in enumerate(policies)
    ]
    processor.update_state(compat.BatchUpdate(batch_size=0, removed=[], added=added, moved=[]))
    for _ in range(20):
        logits = torch.zeros(2, VOCAB)
        assert processor.apply(logits) is logits
        for output in outputs:
            output.append(9)
    assert [policy.asked for policy in policies] == [1, 1], "asked when they came, and not again before 20 tokens"
    assert torch.isfinite(processor.apply(torch.zeros(2, VOCAB))[0]).sum() == 1
