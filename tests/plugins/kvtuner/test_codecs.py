import itertools
from importlib.metadata import EntryPoint

import pytest
import torch

from jettison.csrc.codec import hadamard
from jettison.csrc.layout import PageLayout
from jettison.hooks import ConfigError, KVFormat
from jettison.plugins.kvtuner import codecs
from jettison.plugins.kvtuner.capture import intercept
from jettison.plugins.kvtuner.codec import store_keys, store_values
from jettison.plugins.kvtuner.codec_kinds import Float8, Native, PerChannel, PerToken, Shrunk, side_bytes
from jettison.plugins.kvtuner.codecs import pair_bytes, store, storing
from jettison.plugins.kvtuner.quality import log_probabilities
from kvtuner_families import tiny

WIDTHS = (8, 4, 2)


def sample(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("size", [32, 48, 128, 256])
def test_a1_per_token_errors_are_at_most_half_a_step(width, rotate, size):
    x = sample(1, 3, 50, size, seed=size) * torch.logspace(-3, 3, 50)[:, None]
    back = PerToken(width, rotate).round_trip(x)
    coded, found = (hadamard(y) if rotate else y for y in (x, back))
    step = (coded.amax(-1) - coded.amin(-1)) / (2**width - 1)
    # NOTES: scale and zero are rounded outwards to fp16 (2^-10 of the range and of the zero), floats add 1e-5.
    slack = 2**-10 * (step * 2**width + coded.abs().amax(-1)) + 1e-5 * x.abs().amax(-1)
    worst = ((coded - found).abs().amax(-1) - step / 2 - slack).max().item()
    assert worst <= 0, f"width {width}, rotate {rotate}, size {size}: {worst} beyond half a step"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("make", [lambda width: PerToken(width, False), PerChannel])
def test_a1_constant_rows_are_exact(make, width):
    x = torch.tensor([0.0, 1.5, -2.0])[None, :, None, None].expand(1, 3, 64, 32)
    assert torch.equal(make(width).round_trip(x), x)


@pytest.mark.parametrize("codec", [PerToken(8, False), PerToken(4, False), PerToken(2, False), PerChannel(4), Float8()])
def test_a1_a_second_round_trip_changes_nothing(codec):
    once = codec.round_trip(sample(1, 2, 64, 64))
    torch.testing.assert_close(codec.round_trip(once), once, rtol=1e-3, atol=1e-3, msg=lambda m: f"{codec.name}: {m}")


@pytest.mark.parametrize(("bits", "size"), list(itertools.product((16, 8, 4, 2), (32, 64, 128))))
def test_a1_real_bytes_are_those_of_a_page(bits, size):
    """Nominal bits and, below 16, an fp16 scale and zero: 32 / D bits per element more (section 2.3)."""
    codec = Native() if bits == 16 else PerToken(bits, True)
    assert codec.bytes_per_token(size) == side_bytes(size, bits) == size * bits / 8 + 4 * (bits < 16)
    for other, sinks, block in itertools.product((16, 4), (0, 1, 4), (16, 128)):
        value = Native() if other == 16 else PerToken(other, True)
        expected = PageLayout(size, bits, other, sinks).bytes_per_token(block)
        assert pair_bytes(codec, value, size, sinks, block) == expected


def test_real_bits_of_the_other_codecs():
    """KIVI at groups of 32: one bit per element more (section 2.3); fp8 pays nothing."""
    assert PerChannel(4).bytes_per_token(128) * 8 / 128 == 5
    assert PerChannel(2, group=64, residual=128).bytes_per_token(128) * 8 / 128 == 2.5
    assert Float8().bytes_per_token(64) == 64
    assert pair_bytes(PerChannel(4), PerToken(4, False), 128) == 80 + 68
    assert pair_bytes(PerChannel(4), PerToken(4, False), 128, 4, 128) == 80 + 68 + 4 * 128 * 4 / 128


def test_a2_per_channel_never_mixes_channels():
    """T = 37, groups of 32: a channel times 100 changes no other channel."""
    x = sample(1, 2, 37, 64)
    louder = x.clone()
    louder[..., 5] *= 100
    plain, loud = (PerChannel(2).round_trip(y) for y in (x, louder))
    others = [channel for channel in range(64) if channel != 5]
    assert torch.equal(plain[..., others], loud[..., others])
    mixed = PerToken(2, False)
    assert not torch.equal(mixed.round_trip(x)[..., others], mixed.round_trip(louder)[..., others])


@pytest.mark.parametrize(
    ("length", "residual", "native"),
    [(37, 32, 5), (64, 32, 0), (63, 32, 31), (31, 32, 31), (1, 32, 1), (160, 128, 32), (128, 128, 0), (0, 32, 0)],
)
def test_a2_exactly_the_tokens_after_the_last_whole_residual_stay_native(length, residual, native):
    """T mod residual == 0 leaves none; it must not mean that nothing was quantised (pitfall 7.2)."""
    x = sample(1, 1, length, 32) + 10
    same = (PerChannel(2, residual=residual).round_trip(x) == x).all(-1).flatten()
    assert same.tolist() == [False] * (length - native) + [True] * native


@pytest.mark.parametrize(("group", "residual"), [(32, 48), (0, 32), (64, 32)])
def test_a_residual_that_splits_groups_is_refused(group, residual):
    with pytest.raises(ConfigError, match=f"residual {residual} with groups of {group}"):
        PerChannel(4, group, residual)


def test_per_channel_follows_the_definition():
    """x' = round((x - z) / s) s + z with z = min, s = range / (2^B - 1) over 32 tokens of one channel, in float64."""
    x = sample(1, 1, 32, 32, seed=3)
    column = x[0, 0, :, 7].double()
    step = (column.max() - column.min()) / 15
    expected = ((column - column.min()) / step).round() * step + column.min()
    found = PerChannel(4).round_trip(x)[0, 0, :, 7].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=step.item() * 0.02)


def test_fp8_is_e4m3():
    """448 is the largest number, the next below is 416; 2^-9 the smallest, half of it rounds to even: zero."""
    x = torch.tensor([448.0, 430.0, 1e6, -1e6, 17.0, 2**-9, 2**-10, 0.0]).expand(1, 1, 1, 8)
    assert Float8().round_trip(x)[0, 0, 0].tolist() == [448, 416, 448, -448, 16, 2**-9, 0, 0]
    assert Float8(scale=2.0).round_trip(torch.full((1, 1, 1, 8), 860.0)).unique().tolist() == [832.0]


@pytest.mark.parametrize("size", [64, 128])
def test_the_cut_of_rotated_rows_pays_at_2_bits(size):
    """Gaussian rows, which rotation makes of any: less squared error at 2 bits."""
    x = sample(1, 4, 200, size)
    whole, cut = (PerToken(2, rotate).round_trip(x).sub(x).square().mean() for rotate in (False, True))
    assert cut < 0.85 * whole, f"size {size}: {cut} against {whole}"


@pytest.mark.parametrize("width", [4, 2])
def test_a_shrunk_range_never_errs_more(width):
    x = sample(1, 4, 200, 64).pow(3)
    worse = (Shrunk(width).round_trip(x) - x).square().sum(-1) - (PerToken(width, True).round_trip(x) - x).square().sum(
        -1
    )
    assert worse.max() <= 1e-4 * x.square().sum(-1).max()
    assert worse.mean() < 0


@pytest.mark.parametrize(("bits", "rotate", "sinks"), list(itertools.product((16, 8, 2), (False, True), (0, 3))))
def test_what_is_measured_is_what_the_quality_run_stores(bits, rotate, sinks):
    key, center, factor = sample(1, 2, 40, 32), sample(2, 32, seed=1), sample(2, 32, seed=2).abs() + 0.5
    codec = Native() if bits == 16 else PerToken(bits, rotate)
    expected = store_keys(key, bits, rotate=rotate, sink_tokens=sinks, center=center, scale=factor)
    assert torch.equal(store(codec, key, sink_tokens=sinks, center=center, scale=factor), expected)
    expected = store_values(key, bits, rotate=rotate, sink_tokens=sinks)
    assert torch.equal(store(codec, key, sink_tokens=sinks), expected)


def test_a_model_runs_on_any_codecs_as_the_quality_run_runs_on_ours():
    """Per-layer codecs with statistics and sink tokens equal the formats that engines get; others change the output."""
    model, ids = tiny("llama"), torch.arange(3, 103)
    center, factor = sample(4, 2, 32), sample(4, 2, 32, seed=1).abs() + 0.5
    pairs = [(16, 8), (4, 4), (8, 2), (4, 16)]
    formats = [
        KVFormat(*pair, rotate=True, sink_tokens=2, key_center=center[n].tolist(), key_scale=factor[n].tolist())
        for n, pair in enumerate(pairs)
    ]
    keys, values = (
        [Native() if bits == 16 else PerToken(bits, True) for bits in side] for side in zip(*pairs, strict=True)
    )
    with torch.no_grad(), intercept(model, storing(keys, values, sink_tokens=2, center=center, scale=factor)):
        found = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
    torch.testing.assert_close(found, log_probabilities(model, ids, formats), rtol=1e-5, atol=1e-5)
    with torch.no_grad(), intercept(model, storing([PerChannel(2)] * 4, [Float8()] * 4)):
        other = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
    assert (other - found).abs().max() > 1e-2


def test_the_built_in_codecs_keep_the_protocol():
    assert len(set(codecs.names())) == len(codecs.names())
    for name in codecs.names():
        codec = codecs.get(name)
        assert codecs.checked(codec, name) is codec


class Ternary:
    """A third party's codec."""

    name, bits, page_bits = "ternary", 1.6, None

    def bytes_per_token(self, head_size):
        return head_size / 5

    def round_trip(self, x):
        step = x.float().abs().mean(-1, keepdim=True)
        return (x / step).round().clamp(-1, 1) * step


@pytest.fixture
def clean():
    yield
    for name in ("ternary", "bad"):
        codecs.unregister(name)
    codecs._installed.cache_clear()


@pytest.mark.usefixtures("clean")
def test_a_third_party_registers_a_codec():
    codecs.register(Ternary())
    assert codecs.get("ternary").bits == 1.6
    assert pair_bytes(codecs.get("ternary"), codecs.get("int4"), 80) == 16 + 44
    with pytest.raises(ConfigError, match="'ternary' is taken"):
        codecs.register(Ternary())
    with pytest.raises(ConfigError, match="'int4' is taken"):
        codecs.register(type("T", (Ternary,), {"name": "int4"})())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "No spaces"}, "calls itself 'No spaces'"),
        ({"round_trip": lambda _, x: x[..., :3]}, "returns torch.float32"),
        ({"round_trip": lambda _, x: x.double()}, "returns torch.float64"),
        ({"round_trip": lambda _, x: x / 0}, "not finite"),
        ({"round_trip": lambda _, x: x.mul_(2)}, "changes its argument"),
        ({"bytes_per_token": lambda *_: 0}, "costs 0 bytes"),
        ({"bits": float("nan")}, "has nan bits"),
        ({"page_bits": 3}, "has 3 page bits"),
    ],
)
@pytest.mark.usefixtures("clean")
def test_a_codec_that_is_none_is_refused(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        codecs.register(type("Bad", (Ternary,), {"name": "bad", **change})())
    assert "bad" not in codecs.names()


def test_something_else_is_no_codec():
    with pytest.raises(ConfigError, match="is no codec"):
        codecs.register(object())
    with pytest.raises(ConfigError, match="codec 'int3' is unknown; allowed are 16, int8"):
        codecs.get("int3")


@pytest.mark.usefixtures("clean")
def test_installed_codecs_are_found_and_a_broken_one_hurts_only_itself(tmp_path, monkeypatch):
    """Real entry points of real distributions on the path: one good, one that fails at import."""
    (tmp_path / "good_codec.py").write_text(
        "class Halved:\n"
        "    name, bits, page_bits = 'halved', 16, None\n"
        "    def bytes_per_token(self, head_size): return 2 * head_size\n"
        "    def round_trip(self, x): return x.half().float()\n"
    )
    (tmp_path / "broken_codec.py").write_text("raise RuntimeError('no such device')\n")
    info = tmp_path / "thirdparty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[{codecs.ENTRY_POINTS}]\nhalved = good_codec:Halved\nbroken = broken_codec:Codec\nint4 = good_codec:Halved\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    codecs._installed.cache_clear()
    assert {"halved", "broken"} <= set(codecs.names())
    assert codecs.get("halved").round_trip(torch.ones(1, 1, 1, 32)).sum() == 32
    assert codecs.get("int4") == PerToken(4, False), "a package cannot replace a built-in codec"
    with pytest.raises(ConfigError, match=r"'broken' of broken_codec:Codec does not load.*no such device"):
        codecs.get("broken")


def test_an_entry_point_that_returns_another_name_is_refused(monkeypatch):
    point = EntryPoint("other", f"{__name__}:Ternary", codecs.ENTRY_POINTS)
    monkeypatch.setattr(codecs, "_installed", lambda: {"other": point})
    monkeypatch.setattr(EntryPoint, "load", lambda _: Ternary)
    with pytest.raises(ConfigError, match="calls itself 'ternary'; 'other'"):
        codecs.get("other")
