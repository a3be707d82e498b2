"""The FP8 format against independent arithmetic: every code and scale, every rounding, every special value."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jettison.csrc import fp8_format as fp8

RECIPES = [(group, level) for group in (0, 32, 128) for level in fp8.LEVELS if group or level != "none"]
TINY, HUGE = 2.0**-149, float(torch.finfo(torch.float32).max)
magnitudes = st.floats(min_value=TINY, max_value=HUGE, width=32, allow_subnormal=True)


def value_of(code):
    """E4M3 as its standard says: bias 7, subnormals in steps of 2**-9, no infinity, S.1111.111 is NaN."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10))


VALUES = torch.tensor([value_of(c) for c in range(256)], dtype=torch.float64)
POSITIVE = VALUES[:127]


def nearest(x):
    """To nearest even by trying every value, beyond 448 to 448."""
    distance = (x.double().abs()[:, None] - POSITIVE).abs()
    best = distance.amin(1, keepdim=True)
    index = torch.arange(127).expand_as(distance)
    candidates = torch.where(distance == best, index, -1)
    lowest = torch.where(distance == best, index, 999).amin(1)
    highest = candidates.amax(1)
    chosen = torch.where(highest % 2 == 0, highest, lowest)
    return torch.where(torch.signbit(x), chosen + 128, chosen).to(torch.uint8)


def quantised(codes, exponents, scale=1.0, group=32):
    return fp8.Quantised(codes.view(torch.float8_e4m3fn), exponents, torch.tensor([scale]), group)


def test_a_all_256_codes_times_256_scales_are_exact():
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    exponents = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 8)
    actual = fp8.dequantise(quantised(codes, exponents))
    factors = torch.tensor([math.ldexp(1.0, e - 127) for e in range(255)] + [math.nan], dtype=torch.float64)
    expected = VALUES * factors[:, None]
    beyond = expected.abs() > HUGE
    assert torch.equal(actual.isnan(), expected.isnan())
    same = (actual.double() == expected) | expected.isnan() | (beyond & actual.isinf())
    assert same.all(), f"first wrong (exponent, code): {(~same).nonzero()[0].tolist()}"


def test_a_values_on_the_grid_survive():
    finite = VALUES[~VALUES.isnan()].float()
    ends = torch.tensor([448.0, -448.0])
    rows = torch.cat([torch.cat((part, ends)) for part in finite.split(30)])
    for exponent in range(-126, 120):
        x = (rows * 2.0**exponent if exponent >= -120 else (rows.double() * 2.0**exponent).float())[None]
        for group, level in RECIPES:
            if level == "none" or exponent >= -100:
                back = fp8.dequantise(fp8.quantise(x, group, level))
                assert torch.equal(back, x), f"2**{exponent}, group {group}, level {level}"


def test_a_rounding_is_to_nearest_even():
    ties = (POSITIVE[:-1] + POSITIVE[1:]) / 2
    around = torch.cat([ties.float(), torch.nextafter(ties.float(), torch.zeros(126)), POSITIVE.float(),
                        torch.nextafter(ties.float(), torch.full((126,), 1e9)),
                        torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 100,
                        torch.tensor([448.0, 463.9, 464.0, 480.0, 1e30, 0.0, TINY])])  # fmt: skip
    x = torch.cat((around, -around))
    actual = fp8.to_e4m3(x).view(torch.uint8)
    wrong = actual != nearest(x)
    assert not wrong.any(), f"{x[wrong][0].item()!r}: {actual[wrong][0]} instead of {nearest(x)[wrong][0]}"


def exponent_by_trying(a, scale):
    if a == 0:
        return -127
    least = max(-127, -126 - math.frexp(scale)[1] + 1)
    return next(e for e in range(least, 260) if a <= math.ldexp(448.0 * scale, e))


@settings(max_examples=400, deadline=None)
@given(a=magnitudes, top=magnitudes)
@example(a=448.0, top=448.0)
@example(a=449.0, top=449.0)
@example(a=float(torch.nextafter(torch.tensor(224.0), torch.tensor(1e9))), top=448.0)
@example(a=TINY, top=TINY)
@example(a=TINY, top=HUGE)
@example(a=HUGE, top=HUGE)
def test_a_the_exponent_is_the_smallest_that_covers_the_group(a, top):
    a, top = min(a, top), max(a, top)
    scale = fp8.scale_for(torch.tensor([top]))
    assert 448.0 * float(scale) >= top
    below = float(torch.nextafter(scale, torch.zeros(1)))
    assert below < 2.0**-126 or 448.0 * below < top, "the scale is rounded up by more than one step"
    actual = int(fp8.exponents_for(torch.tensor([a]), scale))
    assert actual == exponent_by_trying(a, float(scale)), f"a={a!r} top={top!r}"
    assert actual <= 0


@pytest.mark.parametrize("scale", [2.0**-126, 0.3, 1.0, 7.0, 2.0**100])
def test_a_powers_of_two_and_their_neighbours(scale):
    powers = torch.tensor([448.0 * scale * 2.0**-k for k in range(60)])
    a = torch.cat((powers, torch.nextafter(powers, torch.zeros(60)), torch.nextafter(powers, torch.full((60,), 1e38))))
    a = a[a <= HUGE]
    actual = fp8.exponents_for(a, torch.full_like(a, scale)).tolist()
    s = float(torch.tensor(scale))
    assert actual == [exponent_by_trying(float(x), s) for x in a]


def mx_rceil(x):
    """The MX format's exponent, rounded up: amax / 448 in float32, next power of two."""
    largest = x.unflatten(1, (-1, 32)).abs().amax(-1)
    mantissa, exponent = torch.frexp(largest / 448.0)
    return torch.where(mantissa == 0.5, exponent - 1, exponent) + 127


def test_b_level_none_is_mx_with_rounding_up():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 64, base=2)[:, None]
    q = fp8.quantise(x, 32, "none")
    exponents = mx_rceil(x)
    assert torch.equal(q.exponents.int(), exponents.int())
    scaled = x * torch.exp2(127.0 - exponents).repeat_interleave(32, 1)
    assert torch.equal(q.codes.view(torch.uint8), scaled.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("level", ["row", "tensor"])
def test_b_one_group_per_row_is_a_scale_per_row(level):
    x = torch.randn(1 if level == "tensor" else 9, 128, generator=torch.Generator().manual_seed(3))
    grouped, plain = fp8.quantise(x, 128, level), fp8.quantise(x, 0, level)
    assert (grouped.exponents == 127).all()
    assert torch.equal(grouped.scale, plain.scale)
    assert torch.equal(grouped.codes.view(torch.uint8), plain.codes.view(torch.uint8))


FAMILIES = {
    "normal": lambda g: torch.randn(48, 300, generator=g),
    "outlier": lambda g: torch.randn(48, 300, generator=g) * (1 + 4999 * (torch.arange(300) % 150 == 7)),
    "rows": lambda g: torch.randn(48, 300, generator=g) * torch.exp(2 * torch.randn(48, 1, generator=g)),
    "tiny": lambda g: torch.randn(48, 300, generator=g) * 1e-36,
    "denormal": lambda g: torch.randn(48, 300, generator=g) * 1e-40,
    "huge": lambda g: torch.rand(48, 300, generator=g) * HUGE,
    "zero rows": lambda g: torch.randn(48, 300, generator=g) * (torch.arange(48) % 2)[:, None],
    "wide": lambda g: torch.exp(40 * torch.randn(48, 300, generator=g)).clamp(max=HUGE),
}  # fmt: skip


def steps(q, columns):
    factor = fp8.expand_exponents(q.exponents, q.group, columns).double() if q.group else torch.ones(1).double()
    return factor * q.scale.double()[:, None]


@pytest.mark.parametrize(("group", "level"), RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_error_is_bounded_and_codes_within_448(family, group, level):
    x = FAMILIES[family](torch.Generator().manual_seed(group))
    q = fp8.quantise(x, group, level)
    error = (fp8.dequantise(q, torch.float64) - x.double()).abs()
    bound = torch.maximum(x.double().abs() * 2.0**-4, 2.0**-10 * steps(q, 300)) * (1 + 2.0**-21)
    assert (error <= bound).all(), f"{family}: {(error - bound).max():.3e} above the bound"
    assert q.codes.float().abs().amax() <= 448
    assert q.scale.shape == ((48,) if level == "row" else (1,))
    if level != "none" and group:
        assert q.exponents.amax() <= 127, "a power of two above 1"


@pytest.mark.parametrize(("group", "level"), [r for r in RECIPES if r[0]])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -math.nan])
def test_a_what_is_not_finite_loses_its_group_alone(bad, group, level):
    x = torch.randn(4, 400, generator=torch.Generator().manual_seed(5))
    clean = fp8.dequantise(fp8.quantise(torch.where(torch.arange(400) // group == 0, 0.0, x), group, level))
    x[:, 3] = bad
    q = fp8.quantise(x, group, level)
    assert (q.exponents[:, 0] == 255).all()
    assert (q.codes[:, :group].view(torch.uint8) == 0x7F).all()
    back = fp8.dequantise(q)
    assert back[:, :group].isnan().all()
    assert torch.equal(back[:, group:], clean[:, group:]), f"{bad} changed its neighbours"


def test_a_without_groups_only_the_element_is_lost():
    x = torch.tensor([[1.0, math.nan, 448.0, -math.inf]])
    assert fp8.quantise(x, 0, "row").codes.view(torch.uint8).tolist() == [[0x38, 0x7F, 0x7E, 0x7F]]


def test_a_zeros_have_the_lowest_exponent_and_keep_their_sign():
    for level in fp8.LEVELS:
        q = fp8.quantise(torch.tensor([[0.0, -0.0] * 16 + [1.0] * 32, [0.0] * 64]), 32, level)
        assert q.exponents[0, 0] == 0
        assert q.exponents[1].tolist() == [0, 0]
        assert q.codes[0, :2].view(torch.uint8).tolist() == [0, 0x80]
        assert fp8.dequantise(q)[1].abs().sum() == 0


@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (17, 33), (3, 8191), (2, 127)], ids=str)
@pytest.mark.parametrize(("group", "level"), RECIPES)
def test_a_odd_and_empty_shapes(shape, group, level):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    q = fp8.quantise(x, group, level)
    assert q.codes.shape == shape
    assert q.exponents.shape == (shape[0], -(-shape[1] // group) if group else 0)
    across = fp8.quantise(x.T.contiguous().T, group, level)
    assert torch.equal(q.codes.view(torch.uint8), across.codes.view(torch.uint8)), "strides changed the codes"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_input_is_its_float32_value(dtype):
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(2)).to(dtype)
    a, b = fp8.quantise(x, 32, "row"), fp8.quantise(x.float(), 32, "row")
    assert all(torch.equal(p.view(torch.uint8), q.view(torch.uint8)) for p, q in zip(a[:3], b[:3], strict=True))


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("group", [32, 128])
def test_reblock_keeps_what_the_new_step_can_hold(group, turn):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(160, 320, generator=generator) * torch.exp(2 * torch.randn(160, 1, generator=generator))
    before = fp8.quantise(x, 32, "tensor")
    after = fp8.reblock(before, group, turn=turn)
    old = fp8.dequantise(before, torch.float64)
    new = fp8.dequantise(after, torch.float64)
    step = steps(after, after.codes.shape[1])
    old, new, step = (old, new.T, step.T) if turn else (old, new, step)
    normal = old.abs() >= 2.0**-6 * step
    assert torch.equal(new[normal], old[normal]), "a value that the new group holds exactly has changed"
    assert ((new - old).abs() <= 2.0**-10 * step).all()
    assert normal.double().mean() > 0.5


def test_reblock_refuses_what_it_cannot_do_exactly():
    x = torch.randn(4, 64)
    with pytest.raises(ValueError, match="4 scales cannot be turned exactly"):
        fp8.reblock(fp8.quantise(x, 32, "row"), 32, turn=True)
    with pytest.raises(ValueError, match="no exponents"):
        fp8.reblock(fp8.quantise(x, 0, "row"), 32)
    for group, level, match in ((16, "row", "group 16"), (32, "column", "'column'"), (0, "none", "no scale at all")):
        with pytest.raises(ValueError, match=match):
            fp8.quantise(x, group, level)
