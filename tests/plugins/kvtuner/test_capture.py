"""Capture on real transformers models of each family: it changes nothing and sees everything."""

import re

import pytest
import torch
import transformers

from jettison.hooks import InputRefused
from jettison.plugins.kvtuner import stream
from jettison.plugins.kvtuner.capture import causal_attention, chunks, intercept
from jettison.plugins.kvtuner.stream import backward, decoder_layers, forward, head, layer_shapes
from kvtuner_families import FAMILIES, SHAPE, tiny


def text(length=300, seed=1):
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_intercepted_model_is_the_same_model(family):
    """Against transformers' own eager attention: windows, soft caps and sinks included."""
    model, ids = tiny(family), text()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits
        with intercept(model, lambda _, query, key, value, rule: rule.attend(query, key, value)):
            found = model(ids[None], use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, msg=lambda m: f"{family}: {m}")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", FAMILIES)
def test_sliding_layers_are_detected(family):
    shapes = layer_shapes(tiny(family))
    assert [shape.window for shape in shapes] == FAMILIES[family][2]
    assert {(shape.heads, shape.kv_heads) for shape in shapes} == {(4, 2)}


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_sees_what_attention_sees(family):
    model, ids, seen = tiny(family), text(), {}
    forward(model, ids, seen.__setitem__)
    assert list(seen) == list(range(4)), "layer by layer, in order"
    for layer, own in seen.items():
        assert own.gradient is None
        assert own.query.shape[:3] == (1, 4, 300), layer
        assert own.key.shape == own.value.shape == (1, 2, 300, own.query.shape[3]), layer


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_gradients_are_those_of_one_plain_pass(family, monkeypatch):
    """The oracle keeps every output and all logits of one ordinary forward and backward pass."""
    model, ids = tiny(family), text(290)
    sampled = torch.randint(0, 128, (290, 1), generator=torch.Generator().manual_seed(9))
    outputs, taken = {}, iter(sampled.split(stream.ROWS))
    monkeypatch.setattr(stream, "_sample", lambda *_: next(taken))

    def keep(layer, query, key, value, rule):
        outputs[layer] = rule.attend(query, key, value)
        outputs[layer].retain_grad()
        return outputs[layer]

    with intercept(model, keep):
        model(ids[None], use_cache=False).logits[0].log_softmax(-1).gather(1, sampled).sum().backward()
    gradients = {}
    backward(model, ids, torch.Generator(), lambda layer, seen: gradients.__setitem__(layer, seen.gradient))
    assert list(gradients) == [3, 2, 1, 0], "last layer first, once each"
    for layer, found in gradients.items():
        expected = outputs[layer].grad
        assert expected.abs().max() > 0, (family, layer)
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            found, expected, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=layer: f"{family} layer {n}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_by_rows_are_the_models_own(family):
    """With what the model does after its trunk: Gemma 2 caps its logits."""
    model, ids = tiny(family), text(40)
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits
        found = head(model, model.base_model(ids[None], use_cache=False).last_hidden_state)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(family):
    """Entered and left, also by an error: no attribute, flag or gradient remains."""
    model, ids = tiny(family), text(20)
    model.lm_head.weight.requires_grad_(False)

    def state():
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        attributes = {name: sorted(module.__dict__) for name, module in model.named_modules()}
        return flags, attributes, model.config._attn_implementation, model.training

    def fail(*_):
        raise RuntimeError("on purpose")

    before = state()
    backward(model, ids, torch.Generator(), lambda *_: None)
    with pytest.raises(RuntimeError, match="on purpose"):
        backward(model, ids, torch.Generator(), fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        forward(model, ids, fail)
    assert state() == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_are_recomputed_one_at_a_time():
    model = tiny("llama")
    assert decoder_layers(model) == list(model.model.layers)


@pytest.mark.parametrize("window", [-1, 1, 5, 255, 256, 257, 600])
def test_chunks_cover_exactly_what_is_visible(window):
    length = 600
    seen = torch.zeros(length, length, dtype=torch.int)
    for chunk in chunks(length, window):
        seen[chunk.start : chunk.stop, chunk.low : chunk.stop] += chunk.visible("cpu")
    distance = torch.arange(length)[:, None] - torch.arange(length)
    assert torch.equal(seen, ((distance >= 0) & ((distance < window) | (window < 0))).int())


@pytest.mark.parametrize("window", [-1, 1, 40, 300])
@pytest.mark.parametrize(("softcap", "sunk"), [(None, False), (2.0, False), (None, True), (2.0, True)])
@pytest.mark.parametrize("groups", [1, 3])
def test_attention_follows_its_definition_in_float64(window, softcap, sunk, groups):
    torch.manual_seed(groups)
    length = 333
    query, key, value = (torch.randn(2, heads, length, 16) for heads in (2 * groups, 2, 2))
    sinks = torch.randn(2 * groups) if sunk else None
    wide = [x.double().repeat_interleave(groups, 1) for x in (key, value)]
    scores = query.double() @ wide[0].transpose(-1, -2) * 0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    weights = scores.masked_fill((distance < 0) | ((distance >= window) & (window > 0)), -torch.inf).exp()
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.double().exp()[:, None, None])
    found = causal_attention(query, key, value, 0.5, window, softcap=softcap, sinks=sinks)
    case = f"window {window}, softcap {softcap}, sinks {sunk}, groups {groups}"
    expected = (weights / total @ wide[1]).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda m: f"{case}: {m}")


SMALL = {key: value for key, value in SHAPE.items() if key != "head_dim"}
REFUSED = {
    "multi-head latent attention": (
        "DeepseekV3",
        {**SMALL, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
         "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
         "first_k_dense_replace": 4, "moe_intermediate_size": 16, "n_shared_experts": 1},
        "DeepseekV3ForCausalLM uses multi-head latent attention: its cache holds one latent per token",
    ),
    "linear attention": (
        "Qwen3Next",
        {**SHAPE, "layer_types": ["linear_attention", "full_attention"] * 2, "num_experts": 4,
         "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
         "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
         "linear_value_head_dim": 16},
        "Qwen3NextForCausalLM has layers of linear attention",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_keys_and_values_per_head_is_refused_with_its_sentence(kind):
    prefix, options, sentence = REFUSED[kind]
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**options)).eval()
    with pytest.raises(InputRefused, match=re.escape(sentence)) as caught:
        forward(model, text(4), lambda *_: None)
    assert "serve this model without a table" in str(caught.value)


def test_layers_that_share_a_cache_are_refused():
    model = tiny("llama")
    model.config.num_kv_shared_layers = 2
    with pytest.raises(InputRefused, match="2 layers of LlamaForCausalLM read another layer's cache"):
        layer_shapes(model)


def test_a_model_without_the_registry_is_refused():
    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=2))
    with pytest.raises(InputRefused, match="BloomForCausalLM does not use transformers' registry"):
        layer_shapes(model.eval())


def test_layers_of_different_heads_are_refused():
    model = tiny("llama")
    attention = model.model.layers[2].self_attn
    attention.k_proj = torch.nn.Linear(64, 32)
    attention.v_proj = torch.nn.Linear(64, 32)
    attention.num_key_value_groups = 4
    with pytest.raises(InputRefused, match="layers differ in KV heads or head size"):
        layer_shapes(model)
