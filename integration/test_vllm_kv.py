"""The packed KV cache in real vLLM engines on tiny models: identity, capacity, and every way a cache is reused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jettison.csrc.layout import PageLayout
from vllm_engines import (
    KV_BYTES,
    PROMPTS,
    Answer,
    difference,
    generate,
    install_probe,
    layers_of,
    models,
    num_blocks,
    runner_of,
    running,
    status_of,
)

MIX: list[list[int] | None] = [[8, 8], [4, 4], None, [4, 2]]
MIXED = {"probe": {"kv": MIX, "rotate": True}}
EXACT = 2e-4
"""Two runs of one float32 engine whose matrix products were cut into other batches."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    install_probe(tmp_path_factory.mktemp("probe"))
    return models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def stock(tiny: dict[str, Path]) -> list[Answer]:
    with running(tiny["llama"]) as llm:
        return generate(llm)


@pytest.fixture(scope="module")
def mixed_answers(tiny: dict[str, Path]) -> list[Answer]:
    with running(tiny["llama"], MIXED, enable_prefix_caching=False) as llm:
        return generate(llm)


def test_identity_table_gives_the_stock_tokens(tiny: dict[str, Path]) -> None:
    prompts = [[(i * 11 + j * 17) % 250 for i in range(20 + 25 * j)] for j in range(8)]
    with running(tiny["llama_bf16"], dtype="bfloat16") as llm:
        expected = generate(llm, prompts, tokens=64)
    with running(tiny["llama_bf16"], {"probe": {"kv": [[16, 16]]}}, dtype="bfloat16") as llm:
        assert [layer["key_bits"] for layer in status_of(llm)["layers"]] == [16] * 4
        found = generate(llm, prompts, tokens=64)
    worst = difference(found, expected)
    assert worst < 0.15, f"16-bit pages, bf16 model: log-probabilities differ by {worst}"


def test_k8v8_is_close_to_stock(tiny: dict[str, Path], stock: list[Answer]) -> None:
    with running(tiny["llama"], {"probe": {"kv": [[8, 8]], "rotate": True}}) as llm:
        worst = difference(generate(llm), stock)
    assert worst < 0.08, f"K8V8: log-probabilities differ by {worst}"


@pytest.fixture(scope="class")
def mixed(tiny: dict[str, Path], stock: list[Answer], mixed_answers: list[Answer]) -> Iterator[Any]:
    with running(tiny["llama"], MIXED) as llm:
        yield llm


class TestMixedTable:
    """One engine with another format in every layer, prefix caching on."""

    def test_allocates_exactly_the_predicted_blocks(self, mixed: Any) -> None:
        bits = [tuple(pair or (16, 16)) for pair in MIX]
        per_block = sum(PageLayout(64, k, v).bytes_per_token(32) * 32 * 2 for k, v in bits)
        assert num_blocks(mixed) == KV_BYTES // per_block
        views = [layer.kv_cache for name, layer in layers_of(mixed).items() if "attn" in name]
        assert [view.shape[-1] for view in views] == [PageLayout(64, k, v).bytes_per_token(32) for k, v in bits]
        assert {str(view.dtype) for view in views} == {"torch.uint8"}
        assert not runner_of(mixed).kv_cache_config.needs_kv_cache_zeroing

    def test_is_in_force_and_close_to_stock(self, mixed: Any, mixed_answers: list[Answer], stock: list[Answer]) -> None:
        found = status_of(mixed)
        pairs = [(layer["key_bits"], layer["value_bits"]) for layer in found["layers"]]
        assert pairs == [(8, 8), (4, 4), (16, 16), (4, 2)]
        assert found["plugins"]["probe"]["active"]
        assert found["faults"] == {}
        worst = difference(mixed_answers, stock)
        assert 1e-3 < worst < 3.0, f"mixed table: log-probabilities differ by {worst}, neither exact nor broken"

    def test_prefix_cache_hits_change_nothing(self, mixed: Any, mixed_answers: list[Answer]) -> None:
        filling, warm = generate(mixed), generate(mixed)
        assert difference(filling, mixed_answers) < EXACT
        assert difference(warm, mixed_answers) < EXACT

    def test_an_aborted_request_leaves_its_neighbours_alone(self, mixed: Any, mixed_answers: list[Answer]) -> None:
        from vllm import SamplingParams

        engine = mixed.llm_engine
        params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=20, ignore_eos=True)
        doomed = engine.add_request("doomed", {"prompt_token_ids": [9] * 200}, params.clone())
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(f"kept-{i}", {"prompt_token_ids": list(prompt)}, params.clone())
        finished: dict[str, tuple[int, ...]] = {}
        for step in range(100):
            for output in engine.step():
                if output.finished:
                    finished[output.request_id] = tuple(output.outputs[0].token_ids)
            if step == 3:
                engine.abort_request([doomed], internal=True)
            if not engine.has_unfinished_requests():
                break
        kept = [finished[f"kept-{i}"] for i in range(len(PROMPTS))]
        assert kept == [answer.tokens for answer in mixed_answers]


def test_chunked_prefill_changes_nothing(tiny: dict[str, Path], mixed_answers: list[Answer]) -> None:
    with running(tiny["llama"], MIXED, max_num_batched_tokens=48, enable_prefix_caching=False) as llm:
        worst = difference(generate(llm), mixed_answers)
    assert worst < EXACT, f"chunks of 48 tokens: log-probabilities differ by {worst}"


def test_preemption_changes_nothing(tiny: dict[str, Path]) -> None:
    prompts = [[(i * 5 + j * 29) % 250 for i in range(60)] for j in range(6)]
    with running(tiny["llama"], MIXED, enable_prefix_caching=False) as llm:
        roomy = generate(llm, prompts, tokens=40)
    options = {"num_gpu_blocks_override": 14, "max_model_len": 256, "enable_prefix_caching": False}
    with running(tiny["llama"], MIXED, **options) as llm:
        preempted: list[str] = []
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempt = scheduler._preempt_request

        def count(request: Any, *args: Any, **kwargs: Any) -> Any:
            preempted.append(request.request_id)
            return preempt(request, *args, **kwargs)

        scheduler._preempt_request = count
        tight = generate(llm, prompts, tokens=40)
    assert preempted, "the pool of 14 blocks was meant to be too small"
    worst = difference(tight, roomy)
    assert worst < EXACT, f"{len(preempted)} preemptions: log-probabilities differ by {worst}"


LONG = [*PROMPTS, [(i * 3) % 250 for i in range(300)]]


@pytest.fixture(scope="module")
def windowed(tiny: dict[str, Path]) -> dict[str, list[Answer]]:
    answers = {}
    for model in ("mistral", "gemma2"):
        with running(tiny[model]) as llm:
            answers[model] = generate(llm, LONG, tokens=24)
    return answers


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
@pytest.mark.parametrize("model", ["mistral", "gemma2"])
def test_sliding_windows(
    model: str,
    layout: str,
    tiny: dict[str, Path],
    windowed: dict[str, list[Answer]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    with running(tiny[model], {"probe": {"kv": [[16, 16], [8, 8]]}}) as llm:
        assert runner_of(llm).cache_config.kv_cache_layout == layout
        cold = difference(generate(llm, LONG, tokens=24), windowed[model])
        warm = difference(generate(llm, LONG, tokens=24), windowed[model])
    assert max(cold, warm) < 0.1, f"{model}, {layout}: log-probabilities differ by {cold}, on a warm cache by {warm}"


def test_torch_compile_gives_the_eager_answers(tiny: dict[str, Path], mixed_answers: list[Answer]) -> None:
    with running(tiny["llama"], MIXED, enforce_eager=False, enable_prefix_caching=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode.name != "NONE"
        worst = difference(generate(llm), mixed_answers)
    assert worst < 0.02, f"compiled model: log-probabilities differ by {worst}"
