"""T10: TrimR inside real vLLM, on a model that says known traces by heart: what is cut, where, and what stays."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jettison.hooks import EnvironmentRefused, Request, Serving
from jettison.hooks.vllm.serving import EngineText
from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.engine import TrimR
from lab import systems, vocabulary
from lab.levels import LEVELS
from lab.traces import END_THINK, GENTLE, THINK
from lab.train_reasoner import optimisers_of, update
from vllm_engines import POLICIES, running, status_of

OPTIONS = {"min_think_tokens": 32, "min_thought_tokens": 8, "poll_tokens": 4}
LENGTH = 512
LIMIT = 400
STEPS = 150


def attempt(opening: str, result: int) -> str:
    return f"{opening} a1: 1. b2: 1+2={result}. So the answer is {result}."


SCRIPTS = {
    "Add up a1, b2 modulo 10.": "\n\n".join(
        attempt(opening, 3)
        for opening in (
            "First,",
            "Wait, let me check.",
            "Alternatively, again.",
            "Hmm, once more.",
            "Wait, again.",
        )
    ),
    "Add up a5, b2 modulo 10.": "\n\n".join(
        attempt(opening, result)
        for opening, result in (
            ("I see.", 7),
            ("Wait, no.", 8),
            ("Hmm, no.", 7),
            ("But no.", 8),
            ("Wait, so.", 7),
        )
    ),
    "Add up a4, b4 modulo 10.": "Let me see. " + "Check 4+4=8 again. " * 40,
}
"""Question -> thinking: one that settles, one that never does, one that loops."""
SETTLES, WAVERS, LOOPS = range(3)


def documents(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Prompt and output ids of every script."""
    rest = f"\n{END_THINK}\n\nThe answer is 3.{vocabulary.END}"
    return [
        (
            tokenizer.encode(vocabulary.prompt(question), add_special_tokens=False),
            tokenizer.encode(thinking + ("" if "Check" in thinking else rest), add_special_tokens=False),
        )
        for question, thinking in SCRIPTS.items()
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama that has learned the scripts by heart."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = vocabulary.train()
    level = replace(LEVELS["mini"], hidden=64, heads=2, layers=2, feed_forward=128)
    network = LlamaForCausalLM(level.config(tokenizer))
    optimisers = optimisers_of(level, network)
    rows = [prompt + output for prompt, output in documents(tokenizer)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    labels = torch.where(ids == tokenizer.pad_token_id, -100, ids)
    for step in range(STEPS):
        update(network, optimisers, 1 - step / STEPS, network(input_ids=ids, labels=labels, use_cache=False).loss)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Any]:
    settings = systems.settings(LENGTH, kv_cache_memory_bytes=1 << 28)
    with running(model, {"trimr": OPTIONS}, logits_processors=[POLICIES], **settings) as llm:
        yield llm


def answers(llm: Any, prompts: Sequence[Sequence[int]], trimr: Any = None, **sampling: Any) -> list[list[int]]:
    from vllm import SamplingParams

    extra = {"trimr": trimr} if trimr is not None else None
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": LIMIT, "extra_args": extra, **sampling})
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
    return [list(sample.token_ids) for output in outputs for sample in output.outputs]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    return [prompt for prompt, _ in documents(tokenizer)]


@pytest.fixture(scope="module")
def free(engine: Any, prompts: list[list[int]], tokenizer: Any) -> list[list[int]]:
    """The outputs of requests that opt out: the scripts."""
    found = answers(engine, prompts, "off")
    for row, (_, output) in enumerate(documents(tokenizer)):
        said = output[:LIMIT]
        assert found[row][: len(said)] == said, f"script {row} was not learned: {tokenizer.decode(found[row])!r}"
    return found


@pytest.fixture(scope="module")
def trimmed(engine: Any, prompts: list[list[int]]) -> list[list[int]]:
    return answers(engine, prompts)


def stop(tokenizer: Any, prompt: Sequence[int], output: Sequence[int]) -> tuple[int, list[int]] | None:
    """Where the plugin, reading an output outside any engine, ends the thinking, and with which ids."""
    plugin = TrimR(TrimROptions(**OPTIONS))
    plugin.serving(Serving(EngineText(tokenizer), (THINK, END_THINK), len(tokenizer)))
    policy = plugin.request_policy(Request(None, prompt, {}, len(tokenizer), LIMIT))
    assert policy is not None
    for length in range(len(output)):
        forced = policy.next_tokens(output[:length])
        if forced:
            return length, forced
    return None


def test_t10_a_settled_thinking_ends_between_its_third_and_fourth_answer(
    trimmed: list[list[int]], free: list[list[int]], tokenizer: Any, prompts: list[list[int]]
) -> None:
    found = stop(tokenizer, prompts[SETTLES], free[SETTLES])
    assert found is not None
    at, forced = found
    assert tokenizer.decode(forced) == GENTLE
    stated = [match.end() for match in re.finditer("answer is 3.", tokenizer.decode(free[SETTLES]))]
    assert stated[2] <= len(tokenizer.decode(free[SETTLES][:at])) < stated[3]
    assert trimmed[SETTLES][: at + len(forced)] == [*free[SETTLES][:at], *forced]


def test_t10_a_wavering_thinking_keeps_every_token(trimmed: list[list[int]], free: list[list[int]]) -> None:
    assert trimmed[WAVERS] == free[WAVERS]


def test_t10_a_loop_ends_by_force(
    trimmed: list[list[int]], free: list[list[int]], tokenizer: Any, prompts: list[list[int]]
) -> None:
    found = stop(tokenizer, prompts[LOOPS], free[LOOPS])
    assert found is not None
    at, forced = found
    assert tokenizer.decode(forced) == systems.GUIDANCE
    assert trimmed[LOOPS][: at + len(forced)] == [*free[LOOPS][:at], *forced]
    assert at < len(free[LOOPS]) // 2


def test_t10_each_of_n_samples_is_watched_alone(
    engine: Any, trimmed: list[list[int]], prompts: list[list[int]]
) -> None:
    found = answers(engine, prompts, n=3, temperature=1.0, top_k=1)
    assert found == [row for row in trimmed for _ in range(3)]


def test_t10_the_engine_tells_how_often_which_rule_fired(engine: Any, trimmed: list[list[int]]) -> None:
    found = status_of(engine)
    assert found["faults"] == {}
    fires = found["plugins"]["trimr"]["report"]["fires"]
    assert fires["overthinking"] >= 1
    assert fires["repetition"] >= 1


@pytest.mark.parametrize(
    "value", [7, 2**63, "", "maybe", "{", "[]", '{"M": 0}', '{"N": 1}', '{"M": "2"}', ["on"] * 10_000, "x" * (1 << 20)],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_t10_bad_request_options_are_refused_before_the_request_is_admitted(
    engine: Any, prompts: list[list[int]], value: Any
) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="trimr"):
        answers(engine, prompts[:1], value)
    assert status_of(engine)["faults"] == {}


def test_t10_options_that_contradict_the_servers_leave_the_request_untrimmed(
    engine: Any, free: list[list[int]], prompts: list[list[int]]
) -> None:
    found = answers(engine, prompts, '{"max_think_tokens": 8}')
    assert found == free
    assert sum(status_of(engine)["faults"].values()) == len(prompts)


def test_t10_chunks_preemption_and_reordering_change_no_decision(
    model: Path, engine: Any, trimmed: list[list[int]], prompts: list[list[int]]
) -> None:
    engine.llm_engine.engine_core.shutdown()
    settings = systems.settings(LENGTH, max_num_batched_tokens=32, num_gpu_blocks_override=40, block_size=32)
    settings |= {"enable_prefix_caching": False, "max_num_seqs": 8}
    settings.pop("kv_cache_memory_bytes")
    with running(model, {"trimr": OPTIONS}, logits_processors=[POLICIES], **settings) as tight:
        scheduler = tight.llm_engine.engine_core.engine_core.scheduler
        preempt, preempted = scheduler._preempt_request, []

        def count(request: Any, *args: Any, **kwargs: Any) -> Any:
            preempted.append(request.num_output_tokens)
            return preempt(request, *args, **kwargs)

        scheduler._preempt_request = count
        order = [row for number in range(3) for row in (number, (number + 1) % 3, (number + 2) % 3)]
        found = answers(tight, [prompts[row] for row in order])
        assert status_of(tight)["faults"] == {}
    assert preempted, "the pool of 40 blocks was meant to be too small"
    for place, row in enumerate(order):
        assert found[place] == trimmed[row], f"request {place}, script {row}, preempted at {preempted}"


def test_t10_an_engine_without_reasoning_config_is_refused(model: Path) -> None:
    with (
        pytest.raises(EnvironmentRefused, match="--reasoning-parser"),
        running(model, {"trimr": OPTIONS}, logits_processors=[POLICIES], max_model_len=LENGTH),
    ):
        pass
