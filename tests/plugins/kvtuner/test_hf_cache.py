"""The packed Hugging Face cache, layer by layer, against the engine's page format and transformers' own layers."""

import itertools

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from jettison.csrc import reference
from jettison.csrc.codec import hadamard
from jettison.csrc.layout import PageLayout
from jettison.hooks.errors import ConfigError
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner.hf_cache import PackedCache, TokenLayer
from jettison.plugins.kvtuner.kivi_cache import ChannelLayer
from jettison.plugins.kvtuner.packing import STEP
from jettison.plugins.kvtuner.table import parse_table
from kvtuner_samples import HEADS, LAYERS, SIZE, content, tiny_model

BATCH, SHAPE = 2, (2, 3, 32)
IDENTITY = KVFormat(16, 16)


def states(tokens, seed=0, dtype=torch.float32, shape=SHAPE):
    batch, heads, size = shape
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, batch, heads, tokens, size, generator=generator).to(dtype)
    return pair[0], pair[1]


def fed(layer, key, value, cuts=()):
    """What `layer` returns last when it is given the tokens in pieces that end at `cuts`."""
    result = None
    for start, stop in itertools.pairwise((0, *cuts, key.shape[2])):
        result = layer.update(key[:, :, start:stop], value[:, :, start:stop])
    return result


def same(one, other):
    """Equal up to how one product with the rotation is cut into blocks: 2^-18 in float32, one unit in 16 bits."""
    tolerance = {torch.float32: 2**-18, torch.bfloat16: 2**-7, torch.float16: 2**-10}[one.dtype]
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=2**-18)


def held_bytes(thing, seen=None):
    """Bytes of every tensor that `thing` keeps alive, storage by storage."""
    seen = {} if seen is None else seen
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    elif isinstance(thing, dict):
        for item in thing.values():
            held_bytes(item, seen)
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            held_bytes(item, seen)
    elif type(thing).__module__.startswith(("jettison", "transformers.cache_utils")):
        held_bytes(vars(thing), seen)
    return sum(seen.values())


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


LAYER_KINDS = {
    "token": lambda window=None: TokenLayer(KVFormat(4, 2, rotate=True), window),
    "token sinks": lambda window=None: TokenLayer(KVFormat(4, 2, rotate=True, sink_tokens=3), window),
    "channel": lambda window=None: ChannelLayer(KVFormat(4, 2), window),
    "channel sinks": lambda window=None: ChannelLayer(KVFormat(4, 2, sink_tokens=3), window),
    "channel wide": lambda window=None: ChannelLayer(KVFormat(2, 16), window, group=16, residual=64),
    "identity": lambda window=None: TokenLayer(IDENTITY, window),
    "channel identity": lambda window=None: ChannelLayer(IDENTITY, window),
}
kinds = pytest.mark.parametrize("kind", list(LAYER_KINDS))


@kinds
@pytest.mark.parametrize("cuts", [(1,), (31, 32, 33), (64,), tuple(range(1, 100)), (50, 99)])
def test_how_a_text_is_cut_does_not_matter(kind, cuts):
    key, value = states(100)
    whole = fed(LAYER_KINDS[kind](), key, value)
    pieces = fed(LAYER_KINDS[kind](), key, value, cuts)
    for side, one, other in zip(("keys", "values"), whole, pieces, strict=True):
        assert same(one, other), f"{side} of {kind} cut at {cuts}"


@kinds
@pytest.mark.parametrize("cuts", [(), (64,), tuple(range(1, 129))])
def test_what_is_returned_belongs_to_the_caller(kind, cuts):
    """Overwriting returned tensors, or the given ones, changes nothing that is stored."""
    key, value = states(130)
    expected = fed(LAYER_KINDS[kind](), key, value)
    layer = LAYER_KINDS[kind]()
    for start, stop in itertools.pairwise((0, *cuts, 129)):
        given = [x[:, :, start:stop].clone() for x in (key, value)]
        for tensor in (*layer.update(*given), *given):
            tensor.fill_(1e4)
    found = layer.update(key[:, :, 129:], value[:, :, 129:])
    for one, other in zip(expected, found, strict=True):
        assert same(one, other), f"{kind} cut at {cuts}"


@kinds
@pytest.mark.parametrize("window", [2, 20, 64, 200])
@pytest.mark.parametrize("sizes", [(1,) * 150, (70, 1, 1, 80, 1), (500, 1, 1, 1)])
def test_a_sliding_window_returns_what_transformers_own_layer_does(kind, window, sizes):
    stock = DynamicSlidingWindowLayer(window)
    full, sliding = LAYER_KINDS[kind](), LAYER_KINDS[kind](window)
    key, value = states(sum(sizes))
    at = 0
    for step, size in enumerate(sizes):
        case = f"{kind}, window {window}, step {step} of {sizes[:5]}"
        assert sliding.get_mask_sizes(size) == stock.get_mask_sizes(size), case
        piece = key[:, :, at : at + size], value[:, :, at : at + size]
        exact, all_tokens, found = (layer.update(*piece) for layer in (stock, full, sliding))
        at += size
        for one, unwindowed, other in zip(exact, all_tokens, found, strict=True):
            assert one.shape == other.shape, case
            assert same(other, unwindowed[:, :, -one.shape[2] :]), case
        assert sliding.get_seq_length() == at, case
    if window <= 64 and sum(sizes) > 400:
        assert held_bytes(sliding) < 0.6 * held_bytes(full), f"{kind}: tokens beyond the window {window} are kept"


@kinds
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("back", [1, 5, 31])
def test_crop_goes_back(kind, window, back):
    """Rejected tokens leave no trace in a per-token layer, and none beyond their own block in a per-channel one."""
    key, value = states(120)
    wrong = states(back, seed=9)
    plain, layer = LAYER_KINDS[kind](window), LAYER_KINDS[kind](window)
    layer.activate_past_recording()
    for each in (plain, layer):
        each.update(key[:, :, :80], value[:, :, :80])
    layer.update(*wrong)
    layer.crop(-back)
    assert layer.get_seq_length() == 80, kind
    expected, found = (each.update(key[:, :, 80:90], value[:, :, 80:90]) for each in (plain, layer))
    for one, other in zip(expected, found, strict=True):
        untouched = one.shape[2] if "channel" not in kind or "identity" in kind else one.shape[2] - 26
        assert same(one[:, :, :untouched], other[:, :, :untouched]), f"{kind}, window {window}, {back} back"
        assert one.shape == other.shape, kind


def test_crop_to_an_absolute_length_and_to_nothing():
    key, value = states(50)
    layer = TokenLayer(KVFormat(4, 4))
    layer.update(key, value)
    layer.crop(60)
    assert layer.get_seq_length() == 50
    layer.crop(20)
    assert layer.get_seq_length() == 20
    layer.crop(-30)
    assert layer.get_seq_length() == 0


@kinds
def test_a_window_cannot_go_back_to_tokens_that_are_gone(kind):
    layer = LAYER_KINDS[kind](20)
    key, value = states(400)
    layer.update(key, value)
    with pytest.raises(ConfigError, match=r"cannot go back to 100.*activate_past_recording"):
        layer.crop(-300)
    assert layer.get_seq_length() == 400


@kinds
def test_rows_can_be_reordered_repeated_and_selected(kind):
    key, value = states(70)
    index = torch.tensor([1, 1, 0])
    more = states(3, seed=5, shape=(3, *SHAPE[1:]))
    moved = LAYER_KINDS[kind]()
    moved.update(key, value)
    moved.batch_select_indices(torch.tensor([True, True]))
    moved.batch_repeat_interleave(2)
    moved.reorder_cache(torch.tensor([2, 3, 1]))
    fresh = LAYER_KINDS[kind]()
    fresh.update(key[index], value[index])
    for one, other in zip(fresh.update(*more), moved.update(*more), strict=True):
        assert same(one, other), kind


@kinds
def test_padding_moves_with_its_row(kind):
    key, value = states(70)
    more = states(3, seed=5)
    swapped, fresh = LAYER_KINDS[kind](), LAYER_KINDS[kind]()
    swapped.pad(torch.tensor([0, 5]))
    fresh.pad(torch.tensor([5, 0]))
    swapped.update(key, value)
    swapped.reorder_cache(torch.tensor([1, 0]))
    fresh.update(key.flip(0), value.flip(0))
    for one, other in zip(fresh.update(*more), swapped.update(*more), strict=True):
        assert same(one, other), kind


@kinds
def test_reset_forgets_and_frees(kind):
    layer, fresh = LAYER_KINDS[kind](), LAYER_KINDS[kind]()
    layer.update(*states(90, seed=1))
    layer.reset()
    assert (layer.get_seq_length(), layer.nbytes, held_bytes(layer)) == (0, 0, 0), kind
    again = states(40, shape=(1, 3, 32))
    for one, other in zip(fresh.update(*again), layer.update(*again), strict=True):
        assert same(one, other), kind


@kinds
@pytest.mark.parametrize("pads", [(0, 5), (32, 64), (40, 3)])
def test_padding_is_no_text(kind, pads):
    """Whatever stands in the padding, a row's tokens read back the same; in whole blocks, as without padding."""
    key, value = states(50)
    width = max(pads)
    results = []
    for garbage in (1e4, -1e4, 0.0):
        rows = [torch.full((BATCH, 3, width + 50, 32), garbage) for _ in range(2)]
        for row, pad in enumerate(pads):
            for mine, exact in zip(rows, (key, value), strict=True):
                mine[row, :, width : width + 50] = exact[row]
                if pad < width:  # a longer text: its first tokens stand where the other row has padding
                    mine[row, :, pad:width] = exact[row, :, : width - pad]
        layer = LAYER_KINDS[kind]()
        layer.pad(torch.tensor(pads))
        results.append((rows, fed(layer, *rows, (width // 2 + 1, width + 20))))
    (rows, first), *others = results
    for row, pad in enumerate(pads):
        solo = LAYER_KINDS[kind]()
        alone = solo.update(*(mine[row : row + 1, :, pad:] for mine in rows))
        for side in (0, 1):
            for _, other in others:
                assert same(first[side][row, :, pad:], other[side][row, :, pad:]), f"{kind}, padding {pads}"
            if "channel" not in kind or pad % 64 == 0 or "identity" in kind:
                assert same(first[side][row, :, pad:], alone[side][0]), f"{kind}, padding {pads}, row {row}"


@kinds
def test_sink_tokens_are_exact_and_their_bytes_counted(kind):
    key, value = states(70)
    layer = LAYER_KINDS[kind]()
    keys, values = layer.update(key, value)
    sinks = layer.form.sink_tokens
    assert torch.equal(keys[:, :, :sinks], key[:, :, :sinks])
    assert torch.equal(values[:, :, :sinks], value[:, :, :sinks])
    if layer.form.key_bits < 16:
        assert not torch.equal(keys[:, :, sinks : sinks + 1], key[:, :, sinks : sinks + 1]), kind
    assert held_bytes(layer) == layer.nbytes, f"{kind}: nbytes is not what is held"


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


def test_it_grows_by_a_step_and_returns_what_leaves_the_window():
    layer = TokenLayer(KVFormat(8, 8), window=10)
    key, value = states(1)
    sizes = set()
    for _ in range(5 * STEP):
        layer.update(key, value)
        sizes.add(layer.nbytes)
    per_token = SHAPE[0] * SHAPE[1] * 2 * (32 + 4)
    assert sizes == {STEP * per_token, 2 * STEP * per_token}
