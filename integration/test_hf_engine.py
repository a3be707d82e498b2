"""The same table in the Hugging Face cache and in a vLLM engine: the same cache, hence the same distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner.hf_cache import PackedCache
from vllm_engines import PROMPTS, Answer, generate, running

TOKENS = 12
FORMATS = {"k8v4": {}, "k4v2": {}, "k2v8": {"sink_tokens": 2}, "k4v4": {"rotate": False}}
"""Pair and further options of the section `kvtuner`."""


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = getattr(tiny_models, request.param)(tmp_path_factory.mktemp("hf") / request.param)
    return made


def transformers_answers(loaded: Any, form: KVFormat | None) -> list[Answer]:
    """Greedy answers of `model.generate` with every layer stored in `form`, None for its own cache."""
    answers = []
    for prompt in PROMPTS:
        cache = None if form is None else PackedCache([form] * loaded.config.num_hidden_layers, loaded.config)
        out = loaded.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            past_key_values=cache,
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        steps = [logits[0].float().log_softmax(-1).topk(20) for logits in out.logits]
        probabilities = tuple(dict(zip(s.indices.tolist(), s.values.tolist(), strict=True)) for s in steps)
        answers.append(Answer(tuple(out.sequences[0, len(prompt) :].tolist()), probabilities))
    return answers


def change(ours: list[Answer], theirs: list[Answer]) -> float:
    """Mean difference of the log-probabilities that both report, while their tokens are the same."""
    differences = []
    for a, b in zip(ours, theirs, strict=True):
        for at, (x, y) in enumerate(zip(a.logprobs, b.logprobs, strict=True)):
            if a.tokens[:at] == b.tokens[:at]:
                differences += [abs(x[token] - y[token]) for token in x.keys() & y.keys()]
    return sum(differences) / len(differences)


@pytest.mark.parametrize("pair", FORMATS)
def test_engine_and_transformers_agree(model: Path, pair: str) -> None:
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    options = FORMATS[pair]
    with running(model, {"kvtuner": {"pair": pair, **options}}) as llm:
        engine = generate(llm, tokens=TOKENS)
    bits = (int(pair[1]), int(pair[3]))
    form = KVFormat(*bits, **{"rotate": True, **options})
    ours, stock = transformers_answers(loaded, form), transformers_answers(loaded, None)
    for row, (a, b) in enumerate(zip(ours, engine, strict=True)):
        assert a.tokens == b.tokens, f"request {row}: {a.tokens} instead of {b.tokens}"
    harm, gap = change(stock, engine), change(ours, engine)
    assert gap < 0.1 * harm, f"{model.name}, {pair}: {gap} of {harm}"
