"""The packed Hugging Face cache with a real model: text, distributions, memory, and the canary (acceptance A11)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from jettison.hooks import EnvironmentRefused, assets
from jettison.hooks.quality import compare
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner import calibration, canary, quality
from jettison.plugins.kvtuner.hf_cache import PackedCache

BUILD = Path(__file__).resolve().parent.parent / "build"
PROMPT, NEW, TEXT = 180, 24, 256
pytestmark = pytest.mark.assets


@pytest.fixture(scope="module")
def folder() -> str:
    try:
        return str(assets.checkpoint(BUILD))
    except EnvironmentRefused as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def loaded(folder: str) -> tuple[Any, torch.Tensor]:
    """The model in float32 on the CPU, and a held-out text of token ids."""
    model, tokenizer = calibration.load_model(folder)
    (ids,) = calibration.token_texts(tokenizer, "held-out", 1, TEXT)
    return model.cpu(), ids


def greedy(model: Any, ids: torch.Tensor, cache: Any) -> list[int]:
    out = model.generate(
        ids[None, :PROMPT],
        attention_mask=torch.ones(1, PROMPT),
        past_key_values=cache,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    return list(out[0, PROMPT:].tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a11_identity_is_dynamic_cache_token_for_token(folder, loaded, dtype):
    model = loaded[0] if dtype == torch.float32 else AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    expected = greedy(model, loaded[1], DynamicCache(config=model.config))
    assert len(expected) == NEW
    for keys in ("token", "channel"):
        cache = PackedCache.uniform((16, 16), model.config, keys=keys)
        assert greedy(model, loaded[1], cache) == expected, f"{dtype}, {keys}"


@pytest.mark.parametrize("keys", ["token", "channel"])
def test_a11_real_bytes_of_4_bits(loaded, keys):
    """Of a bf16 cache with the same tokens: 4.5 and 4.75 bits of 16, spare rows and native tokens included."""
    model, ids = loaded
    cache = PackedCache.uniform((4, 4), model.config, keys=keys)
    greedy(model, ids, cache)
    text = model.config
    tokens = cache.get_seq_length()
    stock = tokens * text.num_hidden_layers * text.num_key_value_heads * 64 * 2 * 2
    # NOTES: float32 model: tokens of the residual take 4 bytes per element.
    native = 0 if keys == "token" else tokens % 32 * text.num_hidden_layers * text.num_key_value_heads * 64 * 2 * 4
    packed = 4.5 if keys == "token" else 4.75
    assert cache.nbytes - native <= stock * packed / 16 * (1 + 64 / tokens), (keys, tokens, cache.nbytes / stock)


@torch.no_grad()
def test_its_errors_are_those_that_the_search_measures(loaded):
    model, ids = loaded
    formats = [KVFormat(8 if n % 3 else 4, 4 if n % 2 else 2, rotate=True, sink_tokens=1) for n in range(30)]
    exact, stored = quality.log_probabilities(model, ids), quality.log_probabilities(model, ids, formats)
    found = model(ids[None], past_key_values=PackedCache(formats, model.config)).logits[0]
    harm, gap = (compare(exact, other)[0].mean().item() for other in (stored, found))
    assert harm > 0.01
    assert gap == pytest.approx(harm, rel=0.02), "mean KL of 256 positions"


def test_the_canary_bears_another_machine_and_notices_another_table(loaded):
    """Another order of summation (threads) stays far inside the tolerance; one layer at 2 bits does not."""
    model, ids = loaded[0], loaded[1][:128]
    formats = [KVFormat(4, 4, rotate=True, sink_tokens=1)] * 30
    made = canary.record(model, ids.tolist(), formats)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        again = canary.record(model, ids.tolist(), formats)
    finally:
        torch.set_num_threads(threads)
    assert abs(again.kl - made.kl) < canary.tolerance(made.kl) / 2, (made.kl, again.kl)
    assert abs((again.nll or 0) - (made.nll or 0)) < canary.LIKELIHOOD / 10
    worse = canary.record(model, ids.tolist(), [KVFormat(2, 4, rotate=True, sink_tokens=1), *formats[1:]])
    assert abs(worse.kl - made.kl) > canary.tolerance(made.kl), (made.kl, worse.kl)
