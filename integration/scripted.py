"""A small Llama that says a few thinking traces by heart, so that what TrimR must do to each is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from jettison.hooks import Request, Serving
from jettison.hooks.vllm.serving import EngineText
from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.engine import TrimR
from lab import vocabulary
from lab.levels import LEVELS
from lab.traces import END_THINK, THINK
from lab.train_reasoner import optimisers_of, update

OPTIONS: dict[str, Any] = {"min_think_tokens": 32, "min_thought_tokens": 8, "poll_tokens": 4}
LENGTH = 512
LIMIT = 256
STEPS = 180
ENDING = f"\n{END_THINK}\n\nThe answer is 3.{vocabulary.END}"


def _attempt(opening: str, result: int) -> str:
    return f"{opening} a1: 1. b2: 1+2={result}. So the answer is {result}."


def _attempts(openings: Sequence[str], results: Sequence[int]) -> str:
    return "\n\n".join(map(_attempt, openings, results))


SCRIPTS = (
    (
        "Add up a1, b2 modulo 10.",
        _attempts(
            ("First,", "Wait, let me check.", "Alternatively, again.", "Hmm, once more.", "Wait, again."), [3] * 5
        )
        + ENDING,
    ),
    (
        "Add up a5, b2 modulo 10.",
        _attempts(("I see.", "Wait, no.", "Hmm, no.", "But no.", "Wait, so."), (7, 8, 7, 8, 7)) + ENDING,
    ),
    ("Add up a4, b4 modulo 10.", "Let me see. " + "Check 4+4=8 again. " * 28),
    ("Add up a6, b1 modulo 10.", f"I see. 6+1=7.{vocabulary.END}"),
)
"""Question and output: one that settles, one that never does, one that loops, one that ends inside its thinking."""
SETTLES, WAVERS, LOOPS, ENDS = range(4)


def learn(folder: Path) -> Path:
    """Train the model on `SCRIPTS`, and on what follows guidance in them, and save it with its tokenizer."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = vocabulary.train()
    level = replace(LEVELS["mini"], hidden=64, heads=2, layers=2, feed_forward=128)
    network = LlamaForCausalLM(level.config(tokenizer))
    optimisers = optimisers_of(level, network)
    rows = [prompt + output for prompt, output in documents(tokenizer)]
    guided = _guided(tokenizer)
    width = max(map(len, rows))
    for step in range(STEPS):
        some = [*rows, *(guided[(2 * step + extra) % len(guided)] for extra in range(2))]
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in some])
        labels = torch.where(ids == tokenizer.pad_token_id, -100, ids)
        update(network, optimisers, 1 - step / STEPS, network(input_ids=ids, labels=labels, use_cache=False).loss)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _guided(tokenizer: Any) -> list[list[int]]:
    """The scripts that are cut, with guidance at their stop and at the places around it, and an answer after it."""
    rows = []
    for prompt, output in documents(tokenizer):
        for at, forced in stops(tokenizer, prompt, output):
            closed = END_THINK in tokenizer.decode(forced)
            rest = ENDING.rpartition("\n")[2] if closed else f"The answer is 3.{ENDING}"
            rest_ids = tokenizer.encode(rest, add_special_tokens=False)
            rows += [prompt + output[: at + shift] + forced + rest_ids for shift in range(-6, 10)]
    return rows


def documents(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Prompt and output ids of every script."""
    return [
        (
            tokenizer.encode(vocabulary.prompt(question), add_special_tokens=False),
            tokenizer.encode(output, add_special_tokens=False),
        )
        for question, output in SCRIPTS
    ]


def answers(llm: Any, prompts: Sequence[Sequence[int]], trimr: Any = None, **sampling: Any) -> list[list[int]]:
    """Greedy outputs (unless `sampling` says otherwise) to all prompts in one batch; `trimr` is the requests' own."""
    return [ids for ids, _ in finished(llm, prompts, [{"trimr": trimr}] * len(prompts), **sampling)]


def finished(
    llm: Any, prompts: Sequence[Sequence[int]], extra: Sequence[Mapping[str, Any]] | None = None, **sampling: Any
) -> list[tuple[list[int], str | None]]:
    """The same with extra arguments per request: output ids, and why they ended, of every sample."""
    from vllm import SamplingParams

    own = [{name: value for name, value in one.items() if value is not None} for one in extra or [{}] * len(prompts)]
    options = {"temperature": 0.0, "max_tokens": LIMIT, **sampling}
    params = [SamplingParams(**options, extra_args=one or None) for one in own]
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
    return [(list(sample.token_ids), sample.finish_reason) for output in outputs for sample in output.outputs]


def stops(
    tokenizer: Any,
    prompt: Sequence[int],
    output: Sequence[int],
    options: Mapping[str, Any] | None = None,
    max_tokens: int = LIMIT,
) -> list[tuple[int, list[int]]]:
    """Where the plugin, reading an output outside any engine, wants to force which ids; what it forces is not read."""
    plugin = TrimR(TrimROptions(**{**OPTIONS, **(options or {})}))
    plugin.serving(Serving(EngineText(tokenizer), (THINK, END_THINK), len(tokenizer)))
    policy = plugin.request_policy(Request(None, prompt, {}, len(tokenizer), max_tokens))
    assert policy is not None
    for length in range(len(output)):
        forced = policy.next_tokens(output[:length])
        if forced:
            return [(length, list(forced))]
    return []
