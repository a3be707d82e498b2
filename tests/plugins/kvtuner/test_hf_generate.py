"""The packed cache inside `model.generate`: every family, batches, beams, assisted generation (acceptance A11)."""

import copy

import pytest
import torch
from transformers import DynamicCache

from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner.hf_cache import PackedCache
from jettison.plugins.kvtuner.quality import log_probabilities
from kvtuner_families import FAMILIES, WINDOW, tiny

families = pytest.mark.parametrize("family", FAMILIES)
LENGTH, NEW = 70, 40
NEAR = 0.1
"""Of the change that quantisation makes: two ways to compute the same may differ by an element on the border between
two codes, which moves a tiny random model a little; a wrong format moves it as far as the change itself."""
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
assert LENGTH > WINDOW


def prompts(rows=1, length=LENGTH, seed=3):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def generated(model, ids, cache, **options):
    return model.generate(ids, past_key_values=cache, **{**GREEDY, "attention_mask": torch.ones_like(ids), **options})


def distributions(model, ids, cache, mask=None):
    """Log-probabilities [rows, T, vocabulary] of one forward pass."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    return logits.float().log_softmax(-1)


def padded(ids, pads):
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
        ids[row, :pad] = 0
    return ids, mask


@families
@pytest.mark.parametrize("keys", ["token", "channel"])
def test_a11_greedy_text_of_the_identity_is_dynamic_caches(family, keys):
    model, ids = tiny(family), prompts()
    expected = generated(model, ids, DynamicCache(config=model.config))
    cache = PackedCache.uniform((16, 16), model.config, keys=keys)
    assert torch.equal(generated(model, ids, cache), expected), family
    assert cache.get_seq_length() == LENGTH + NEW - 1


@families
def test_a11_a_batch_with_left_padding(family):
    model = tiny(family)
    ids, mask = padded(prompts(3), (0, 11, 40))
    expected = generated(model, ids.clone(), DynamicCache(config=model.config), attention_mask=mask)
    cache = PackedCache.uniform((16, 16), model.config, attention_mask=mask)
    assert torch.equal(generated(model, ids, cache, attention_mask=mask), expected), family


@families
@pytest.mark.parametrize("sinks", [0, 2])
def test_padding_does_not_change_quantised_distributions(family, sinks):
    """A text in a padded batch against the same text alone, measured by what quantisation itself does to it."""
    model = tiny(family)
    ids, mask = padded(prompts(2), (0, 23))
    form = {"rotate": True, "sink_tokens": sinks}
    batch = distributions(model, ids, PackedCache.uniform((8, 4), model.config, attention_mask=mask, **form), mask)
    for row, pad in enumerate((0, 23)):
        alone = ids[row : row + 1, pad:]
        solo = distributions(model, alone, PackedCache.uniform((8, 4), model.config, **form))[0]
        stock = distributions(model, alone, None)[0]
        ours, harm = (batch[row, pad:] - solo).abs().mean().item(), (stock - solo).abs().mean().item()
        assert ours < NEAR * harm, f"{family}, sinks {sinks}, padding {pad}: {ours} of {harm}"


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("keys", ["token", "channel"])
def test_beams_are_dynamic_caches(family, keys):
    model = tiny(family).double()
    ids, mask = padded(prompts(2), (0, 9))
    options = {"num_beams": 3, "attention_mask": mask}
    expected = generated(model, ids.clone(), DynamicCache(config=model.config), **options)
    cache = PackedCache.uniform((16, 16), model.config, keys=keys, attention_mask=mask)
    assert torch.equal(generated(model, ids, cache, **options), expected), family


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("keys", ["token", "channel"])
def test_assisted_generation_changes_nothing(family, keys):
    """Guessed tokens are stored, judged and cropped; the text is that of plain decoding."""
    model = tiny(family).double()
    ids = prompts(1, 30).repeat(1, 4)
    plain = generated(model, ids, DynamicCache(config=model.config))
    cache = PackedCache.uniform((16, 16), model.config, keys=keys)
    crops = []
    crop, cache.crop = cache.crop, lambda count: (crops.append(count), crop(count))
    guessed = generated(model, ids, cache, prompt_lookup_num_tokens=4)
    assert torch.equal(guessed, plain), f"{family}, {keys}"
    assert any(count < 0 for count in crops), "no guess was ever rejected: nothing was tested"


@families
@pytest.mark.parametrize("sinks", [0, 1])
def test_errors_are_those_that_the_search_measures(family, sinks):
    """One forward pass through the cache gives the distributions of `quality.log_probabilities`.

    Eager attention: transformers' SDPA path leaves out the soft cap of Gemma 2, the measurement does not.
    """
    model, ids = tiny(family), prompts(1, 90)[0]
    model.set_attn_implementation("eager")
    layers = model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(1)
    center = torch.randn(2, 32, generator=generator).half().tolist()
    scale = (torch.rand(2, 32, generator=generator) + 0.5).half().tolist()
    pairs = [(8, 4), (4, 4), (4, 2), (2, 8)][:layers]
    formats = [KVFormat(*pair, rotate=True, sink_tokens=sinks, key_center=center, key_scale=scale) for pair in pairs]
    stored = log_probabilities(model, ids, formats)
    found = distributions(model, ids[None], PackedCache(formats, model.config))[0]
    stock = distributions(model, ids[None], None)[0]
    ours, harm = (found - stored).abs().mean().item(), (stock - stored).abs().mean().item()
    assert ours < NEAR * harm, f"{family}, sinks {sinks}: {ours} of {harm}"


def test_the_cache_is_reused_after_a_reset():
    model, ids = tiny("llama"), prompts()
    cache = PackedCache.uniform((4, 4), model.config)
    first = generated(model, ids, cache)
    cache.reset()
    assert cache.nbytes == 0
    assert torch.equal(generated(model, ids, cache), first)


@pytest.mark.parametrize("keys", ["token", "channel"])
def test_a_copy_of_a_prompts_cache_is_independent(keys):
    """A common prefix is computed once and copied for every answer."""
    model, ids = tiny("llama"), prompts()
    prefix = PackedCache.uniform((4, 4), model.config, keys=keys)
    with torch.no_grad():
        model(ids, past_key_values=prefix)
    questions = [torch.cat((ids, prompts(1, 9, seed=seed)), 1) for seed in (1, 2)]
    first = [generated(model, question, copy.deepcopy(prefix)) for question in questions]
    again = [generated(model, question, copy.deepcopy(prefix)) for question in reversed(questions)]
    assert prefix.get_seq_length() == LENGTH
    for one, other in zip(first, reversed(again), strict=True):
        assert torch.equal(one, other), keys


def test_a_conversation_continues_where_it_stood():
    """A second call with the longer text computes the new tokens only and gives the same text as from the start."""
    model, ids = tiny("qwen3").double(), prompts()
    cache = PackedCache.uniform((16, 16), model.config)
    first = generated(model, ids, cache)
    longer = torch.cat((first, prompts(1, 20, seed=8)), 1)
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[1]))
    second = generated(model, longer, cache)
    handle.remove()
    assert seen[0] == 21, "the last generated token and the 20 new ones"
    assert torch.equal(second, generated(model, longer, DynamicCache(config=model.config)))
