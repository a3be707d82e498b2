"""T-4: request policies in a real engine; a hostile or failing one changes no bit of its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from vllm_engines import POLICIES, Answer, generate, install_probe, running, status_of

BATCH = [[(i * 7 + j * 31) % 250 for i in range(10 + 9 * j)] for j in range(8)]
MISDEEDS = ["raise", "recurse", "mutate", "out_of_range", "negative", "huge", "float", "text", "generator", "long"]
TOKENS = 10


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import tiny_models

    install_probe(tmp_path_factory.mktemp("probe"))
    model = tiny_models.llama(tmp_path_factory.mktemp("models") / "llama")
    with running(
        model, {"probe": {"policies": True}}, logits_processors=[POLICIES], max_num_batched_tokens=128
    ) as engine:
        yield engine


def run(llm: Any, orders: dict[int, Any], **sampling: Any) -> list[Answer]:
    llm.reset_prefix_cache()
    extra = [{"probe": orders[row]} if row in orders else None for row in range(len(BATCH))]
    return generate(llm, BATCH, tokens=TOKENS, extra=extra, **sampling)


@pytest.fixture(scope="module")
def clean(llm: Any) -> list[Answer]:
    return run(llm, {})


def test_policies_force_their_tokens_at_their_place(llm: Any, clean: list[Answer]) -> None:
    orders = {1: {"at": 0, "ids": [5]}, 3: {"at": 4, "ids": [1, 2, 3]}, 6: {"at": 9, "ids": [7, 8, 9]}}
    answers = run(llm, orders)
    assert answers[1].tokens[0] == 5
    assert answers[3].tokens[4:7] == (1, 2, 3)
    assert answers[3].tokens[:4] == clean[3].tokens[:4]
    assert answers[6].tokens == (*clean[6].tokens[:9], 7)
    for row in (0, 2, 4, 5, 7):
        assert answers[row].tokens == clean[row].tokens, f"row {row}"


def test_policies_force_sampled_rows_too(llm: Any) -> None:
    answers = run(llm, {2: {"at": 3, "ids": [11, 12]}}, temperature=1.0)
    assert answers[2].tokens[3:5] == (11, 12)


@pytest.mark.parametrize("misdeed", [*MISDEEDS, "admission", "shape"])
def test_a_hostile_policy_changes_no_neighbour(llm: Any, clean: list[Answer], misdeed: str) -> None:
    before = sum(status_of(llm)["faults"].values())
    batches = 0
    for row, at in ((0, 0), (3, 4), (7, 9)):
        answers = run(llm, {row: {"at": at, "fail": misdeed}})
        batches += 1
        changed = [other for other in range(len(BATCH)) if answers[other] != clean[other]]
        assert changed == [], f"{misdeed} in row {row} at token {at} changed rows {changed}"
    assert sum(status_of(llm)["faults"].values()) == before + batches


def test_a_policy_and_its_faults_are_in_the_status(llm: Any) -> None:
    found = status_of(llm)
    assert found["layers"] == [], "no KV plugin is active, so the cache is stock"
    assert all(name.startswith("probe: ") for name in found["faults"])


def test_forcing_survives_chunks_and_preemption(llm: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    import tiny_models

    model = tiny_models.llama(tmp_path_factory.mktemp("models") / "llama")
    prompts = [[(i * 5 + j * 29) % 250 for i in range(60)] for j in range(6)]
    extra = [{"probe": {"at": 20 + row, "ids": list(range(100, 115))}} for row in range(6)]
    llm.llm_engine.engine_core.shutdown()
    options = {"num_gpu_blocks_override": 14, "max_model_len": 256, "enable_prefix_caching": False}
    section = {"probe": {"policies": True, "kv": [[8, 8]]}}
    with running(model, section, logits_processors=[POLICIES], max_num_batched_tokens=48, **options) as tight:
        scheduler = tight.llm_engine.engine_core.engine_core.scheduler
        preempt, preempted = scheduler._preempt_request, []

        def count(request: Any, *args: Any, **kwargs: Any) -> Any:
            preempted.append(request.num_output_tokens)
            return preempt(request, *args, **kwargs)

        scheduler._preempt_request = count
        answers = generate(tight, prompts, tokens=48, extra=extra)
        assert status_of(tight)["faults"] == {}
    assert preempted, "the pool of 14 blocks was meant to be too small"
    for row, answer in enumerate(answers):
        assert answer.tokens[20 + row : 35 + row] == tuple(range(100, 115)), f"row {row}, preempted at {preempted}"
