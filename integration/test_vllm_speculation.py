"""Speculative decoding on packed pages: the answers of plain decoding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from test_vllm_processes import SECTION, child, environment, read_answers
from vllm_engines import Answer, difference, generate, install_probe, running, status_of

EXACT = 2e-4
"""Two runs of one float32 engine whose matrix products were cut into other batches."""

TOKENS = 24


@pytest.fixture(scope="module")
def search_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return install_probe(tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def plain(model: Path, search_path: str) -> Iterator[list[Answer]]:
    with running(model, SECTION) as llm:
        yield generate(llm, tokens=TOKENS)


def counted(llm: Any, name: str) -> int:
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == f"vllm:spec_decode_{name}")


def test_a_draft_model_changes_no_token(model: Path, plain: list[Answer]) -> None:
    """Its own layers, of which no plugin was asked, keep 16 bits in pages of the same kind."""
    speculation = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3}
    with running(model, SECTION, speculative_config=speculation, disable_log_stats=False) as llm:
        found = generate(llm, tokens=TOKENS)
        proposed, accepted = counted(llm, "num_draft_tokens"), counted(llm, "num_accepted_tokens")
        bits = [(layer["key_bits"], layer["value_bits"]) for layer in status_of(llm)["layers"]]
    worst = difference(found, plain)
    assert worst < EXACT, f"log-probabilities differ by {worst}"
    assert bits == [(8, 8), (4, 4), (8, 8), (4, 4), *[(16, 16)] * tiny_models.LAYERS]
    assert proposed > 0
    # The draft is the same model with an exact cache: nearly all of its guesses must survive.
    assert accepted > 0.8 * proposed, f"{accepted} of {proposed} drafts were accepted"


def test_rejected_drafts_leave_no_trace(model: Path, search_path: str, plain: list[Answer]) -> None:
    """Guesses from the prompt are wrong nearly always: their keys are overwritten, page by page.

    In a process of its own: once vLLM has loaded numba for these guesses, no second CPU engine starts beside them.
    """
    speculation = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    env = environment(search_path, VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    options = {"speculative_config": speculation, "disable_log_stats": False}
    answers, found = read_answers(child(model, SECTION, env, tokens=TOKENS, **options))
    worst = difference(answers, plain)
    assert worst < EXACT, f"log-probabilities differ by {worst}"
    drafts = found["drafts"]
    assert drafts["draft"] > drafts["accepted"], f"no guess was rejected, so nothing was tested: {drafts}"
