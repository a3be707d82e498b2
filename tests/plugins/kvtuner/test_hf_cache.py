"""The packed Hugging Face cache against the engine's page format, in bytes, and as a table or a user sets it up."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from cache_samples import IDENTITY, fed, held_bytes, same, states
from jettison.csrc import reference
from jettison.csrc.codec import hadamard
from jettison.csrc.layout import PageLayout
from jettison.hooks.errors import ConfigError
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner.hf_cache import PackedCache, TokenLayer
from jettison.plugins.kvtuner.kivi_cache import ChannelLayer
from jettison.plugins.kvtuner.table import parse_table
from kvtuner_samples import HEADS, LAYERS, SIZE, content, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [True, False])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("pair", [(8, 4), (2, 8), (4, 2), (16, 4), (4, 16)])
def test_a_token_reads_back_as_from_an_engines_page(pair, rotate, channels, dtype):
    key, value = states(37, dtype=dtype, shape=(1, 3, 32))
    center = torch.randn(3, 32).half().float() if channels else None
    scale = (torch.rand(3, 32) + 0.5).half().float() if channels else None
    layout, cache = PageLayout(32, *pair), None
    cache = torch.zeros(3, 3, 16, layout.bytes_per_token(16), dtype=torch.uint8)
    codec = {"rotate": rotate, "key_center": center, "key_scale": scale}
    rows = [x[0].transpose(0, 1).contiguous() for x in (key, value)]
    reference.kv_store(*rows, cache, torch.arange(37), layout, **codec)
    sixteen = torch.float16 if dtype == torch.float16 else torch.bfloat16
    expected = [x[:37].transpose(0, 1) for x in reference.unpack(cache, torch.arange(3), layout, sixteen)]
    back = [hadamard(x) if rotate and bits < 16 else x for x, bits in zip(expected, pair, strict=True)]
    if channels and pair[0] < 16:
        back[0] = back[0] * scale[:, None] + center[:, None]
    form = KVFormat(
        *pair,
        rotate=rotate,
        key_center=None if center is None else center.tolist(),
        key_scale=None if scale is None else scale.tolist(),
    )
    found = fed(TokenLayer(form), key, value, (5, 20))
    for side, bits, mine, page, exact in zip(("key", "value"), pair, found, back, (key, value), strict=True):
        case = f"{side} of {pair}, rotate {rotate}, channels {channels}, {dtype}"
        assert mine.dtype == dtype, case
        expected = exact[0] if bits == 16 else page.to(dtype)
        assert torch.equal(mine[0], expected) if bits == 16 or not rotate else same(mine[0], expected), case


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kind", ["token", "channel"])
def test_a11_a_4_bit_table_takes_at_most_35_percent_of_bf16_at_4096_tokens(kind, size):
    shape = (1, 2, size)
    key, value = states(4096, dtype=torch.bfloat16, shape=shape)
    token, channel = TokenLayer(KVFormat(4, 4, rotate=True, sink_tokens=1)), ChannelLayer(KVFormat(4, 4))
    layers = {"packed": token if kind == "token" else channel, "stock": DynamicLayer()}
    held = {}
    for name, layer in layers.items():
        fed(layer, key.clone(), value.clone(), tuple(range(4000, 4096)))
        held[name] = held_bytes(layer)
    assert held["stock"] >= 4096 * 2 * 2 * size * 2
    assert held["packed"] / held["stock"] <= 0.35, f"{kind}, head size {size}: {held}"


def test_a_table_sets_every_layer():
    table = parse_table(content())
    config = tiny_model(num_hidden_layers=LAYERS).config
    cache = PackedCache.from_table(table, config)
    assert [(layer.form.key_bits, layer.form.value_bits) for layer in cache.layers] == table.payload.pairs
    for number, layer in enumerate(cache.layers):
        assert layer.form == table.format(number)
        layer.update(*states(3, shape=(1, HEADS, SIZE)))


@pytest.mark.parametrize("change", [{"num_key_value_heads": 1}, {"head_dim": 64}, {"num_hidden_layers": 3}])
def test_a_table_of_another_model_is_refused(change):
    config = tiny_model(**{"num_hidden_layers": LAYERS, **change}).config
    with pytest.raises(ConfigError, match="the table of 'tiny' is for 4 layers, 2 KV heads and head size 32"):
        PackedCache.from_table(parse_table(content()), config)


def test_models_without_keys_and_values_per_head_are_refused():
    transformers = pytest.importorskip("transformers")
    mla = transformers.DeepseekV3Config(num_hidden_layers=2)
    with pytest.raises(ConfigError, match="deepseek_v3 uses multi-head latent attention: its cache holds one latent"):
        PackedCache.uniform((4, 4), mla)
    hybrid = transformers.Qwen3NextConfig(num_hidden_layers=4)
    with pytest.raises(ConfigError, match="layer 0 of qwen3_next keeps a LinearAttentionLayer"):
        PackedCache.uniform((4, 4), hybrid)


def test_bad_use_is_refused():
    config = tiny_model().config
    with pytest.raises(ConfigError, match="3 formats were given for 2 layers"):
        PackedCache([IDENTITY] * 3, config)
    with pytest.raises(ConfigError, match="padding that is not on the left"):
        PackedCache.uniform((4, 4), config, attention_mask=torch.tensor([[1, 1, 0]]))
    with pytest.raises(ConfigError, match="padding that is not on the left"):
        PackedCache.uniform((4, 4), config, attention_mask=torch.tensor([[1, 0, 1]]))
    with pytest.raises(ConfigError, match="a rotation or key statistics was given for per-channel keys"):
        PackedCache.uniform((4, 4), config, keys="channel", rotate=True)
    with pytest.raises(ConfigError, match="groups of 32 with a residual of 48 are refused"):
        PackedCache([IDENTITY] * 2, config, keys="channel", group=32, residual=48)
    with pytest.raises(ConfigError, match="residual was given for keys per token"):
        PackedCache([IDENTITY] * 2, config, residual=32)
    with pytest.raises(ConfigError, match="key_center is for 2 KV heads of size 32, the model has 3 of 32"):
        TokenLayer(KVFormat(4, 4, key_center=[[0.0] * 32] * 2)).update(*states(1))
    with pytest.raises(ConfigError, match=r"keys of shape \(2, 3, 4, 32\) and values of \(2, 3, 4, 16\)"):
        TokenLayer(KVFormat(4, 4)).update(states(4)[0], states(4)[1][..., :16])
    cache = PackedCache.uniform((4, 4), config)
    cache.layers[0].update(*states(3))
    with pytest.raises(ConfigError, match="padding was told to a cache that holds tokens"):
        cache.pad(torch.tensor([[0, 1], [1, 1]]))
    wide = PackedCache.uniform((4, 4), config, attention_mask=torch.tensor([[0, 1]] * 3))
    with pytest.raises(ConfigError, match="the attention mask has 3 rows, the batch 2"):
        wide.layers[0].update(*states(3))
