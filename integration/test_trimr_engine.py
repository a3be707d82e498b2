"""T10: TrimR inside real vLLM, on a model that says known traces by heart: what is cut, where, and what stays."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jettison.hooks import EnvironmentRefused
from lab import systems
from lab.traces import GENTLE
from scripted import LENGTH, LIMIT, LOOPS, OPTIONS, SETTLES, WAVERS, answers, documents, stops
from vllm_engines import POLICIES, running, status_of


@pytest.fixture(scope="module")
def engine(scripted_model: Path) -> Iterator[Any]:
    settings = systems.settings(LENGTH, kv_cache_memory_bytes=1 << 28)
    with running(scripted_model, {"trimr": OPTIONS}, logits_processors=[POLICIES], **settings) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts(scripted_tokenizer: Any) -> list[list[int]]:
    return [prompt for prompt, _ in documents(scripted_tokenizer)]


@pytest.fixture(scope="module")
def free(engine: Any, prompts: list[list[int]], scripted_tokenizer: Any) -> list[list[int]]:
    """The outputs of requests that opt out: the scripts."""
    found = answers(engine, prompts, "off")
    for row, (_, output) in enumerate(documents(scripted_tokenizer)):
        assert found[row] == output[:LIMIT], f"script {row} was not learned: {scripted_tokenizer.decode(found[row])!r}"
    return found


@pytest.fixture(scope="module")
def trimmed(engine: Any, prompts: list[list[int]]) -> list[list[int]]:
    return answers(engine, prompts)


def test_t10_a_settled_thinking_ends_between_its_third_and_fourth_answer(
    trimmed: list[list[int]], free: list[list[int]], scripted_tokenizer: Any, prompts: list[list[int]]
) -> None:
    [(at, forced)] = stops(scripted_tokenizer, prompts[SETTLES], free[SETTLES])
    assert scripted_tokenizer.decode(forced) == GENTLE
    stated = [match.end() for match in re.finditer("answer is 3.", scripted_tokenizer.decode(free[SETTLES]))]
    assert stated[2] <= len(scripted_tokenizer.decode(free[SETTLES][:at])) < stated[3]
    assert trimmed[SETTLES][: at + len(forced)] == [*free[SETTLES][:at], *forced]


def test_t10_a_wavering_thinking_keeps_every_token(trimmed: list[list[int]], free: list[list[int]]) -> None:
    assert trimmed[WAVERS] == free[WAVERS]


def test_t10_a_loop_ends_by_force(
    trimmed: list[list[int]], free: list[list[int]], scripted_tokenizer: Any, prompts: list[list[int]]
) -> None:
    [(at, forced)] = stops(scripted_tokenizer, prompts[LOOPS], free[LOOPS])
    assert scripted_tokenizer.decode(forced) == systems.GUIDANCE
    assert trimmed[LOOPS][: at + len(forced)] == [*free[LOOPS][:at], *forced]
    assert at < len(free[LOOPS]) // 2


def test_t10_each_of_n_samples_is_watched_alone(
    engine: Any, trimmed: list[list[int]], prompts: list[list[int]]
) -> None:
    found = answers(engine, prompts, n=4, temperature=1.0, top_k=1)
    assert found == [row for row in trimmed for _ in range(4)]


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
    scripted_model: Path, engine: Any, trimmed: list[list[int]], prompts: list[list[int]]
) -> None:
    engine.llm_engine.engine_core.shutdown()
    settings = systems.settings(LENGTH, max_num_batched_tokens=32, num_gpu_blocks_override=24, block_size=32)
    settings |= {"enable_prefix_caching": False, "max_num_seqs": 8}
    settings.pop("kv_cache_memory_bytes")
    with running(scripted_model, {"trimr": OPTIONS}, logits_processors=[POLICIES], **settings) as tight:
        scheduler = tight.llm_engine.engine_core.engine_core.scheduler
        preempt, preempted = scheduler._preempt_request, []

        def count(request: Any, *args: Any, **kwargs: Any) -> Any:
            preempted.append(request.num_output_tokens)
            return preempt(request, *args, **kwargs)

        scheduler._preempt_request = count
        order = [(number + shift) % len(prompts) for number in range(3) for shift in range(len(prompts))]
        found = answers(tight, [prompts[row] for row in order])
        assert status_of(tight)["faults"] == {}
    assert preempted, "the pool of 24 blocks was meant to be too small"
    for place, row in enumerate(order):
        assert found[place] == trimmed[row], f"request {place}, script {row}, preempted at {preempted}"


def test_t10_an_engine_without_reasoning_config_is_refused(scripted_model: Path) -> None:
    with (
        pytest.raises(EnvironmentRefused, match="--reasoning-parser"),
        running(scripted_model, {"trimr": OPTIONS}, logits_processors=[POLICIES], max_model_len=LENGTH),
    ):
        pass
