"""FP8 ops: schemas and fakes, products of matrices against float64, errors on the families of our notes (2.6)."""

import pytest
import torch

from jettison.csrc import fp8_format, fp8_ops, fp8_reference
from jettison.csrc.fp8_format import dequantise

OPS = torch.ops.jettison
WITHOUT_SCHEMA = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
"""For ops that read FP8: the schema's test multiplies inputs, which torch does not implement for this type."""
RECIPES = [(128, "none"), (32, "none"), (128, "row"), (32, "tensor"), (0, "tensor"), (0, "row")]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frobenius(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(5, 96), (0, 64), (17, 33)], ids=str)
@pytest.mark.parametrize(("group", "level"), RECIPES)
def test_opcheck(shape, group, level):
    x = normal(*shape).bfloat16()
    check = torch.library.opcheck
    check(OPS.fp8_quantise.default, (x, group, level))
    check(OPS.fp8_rms_norm_quantise.default, (x, torch.ones(shape[1]), 1e-5, group, level))
    check(OPS.fp8_swiglu_quantise.default, (x, x, group, level))
    if group:
        check(OPS.fp8_quantise_both.default, (x, group, level))
    a, b = fp8_ops.quantise(x, group, level), fp8_ops.quantise(normal(7, shape[1]), 0, "tensor")
    if not shape[0]:
        return  # opcheck itself cannot copy an empty FP8 input
    check(OPS.fp8_gemm.default, (*a, *b, torch.ones(7), torch.bfloat16, "block"), test_utils=WITHOUT_SCHEMA)


def test_opcheck_cast_weight():
    codes = torch.empty(6, 40, dtype=torch.float8_e4m3fn)
    arguments = (normal(6, 40), torch.ones(1), codes, codes.T.contiguous(), torch.zeros((), dtype=torch.int64))
    torch.library.opcheck(OPS.fp8_cast_weight.default, arguments, test_utils=("test_faketensor",))


@pytest.mark.parametrize(
    ("group", "level", "backend"),
    [(*recipe, b) for recipe in RECIPES for b in fp8_reference.BACKENDS if b != "tensor" or not recipe[0]],
)
@pytest.mark.parametrize("shape", [(33, 17, 64), (40, 24, 1000), (1, 5, 4096), (0, 8, 64)], ids=str)
def test_b_gemm_is_the_float64_product_of_what_the_codes_mean(shape, group, level, backend):
    m, n, k = shape
    a, b = fp8_ops.quantise(normal(m, k), group, level), fp8_ops.quantise(normal(n, k, seed=1), 0, "tensor")
    bias = normal(n, seed=2)
    expected = dequantise(a, torch.float64) @ dequantise(b, torch.float64).T + bias
    actual = fp8_ops.gemm(a, b, bias, out_dtype=torch.float32, backend=backend)
    assert actual.shape == (m, n)
    if m:
        assert frobenius(actual, expected) < 1e-5, f"{shape} group {group} level {level} {backend}"
        rounded = fp8_ops.gemm(a, b, bias, out_dtype=torch.bfloat16, backend=backend)
        assert torch.equal(rounded, actual.bfloat16())


@pytest.mark.parametrize("backend", ["block", "bf16_fold"])
@pytest.mark.parametrize("group", [32, 128])
def test_b_gemm_of_two_grouped_operands(group, backend):
    """A weight's gradient: groups along tokens on both sides, magnitudes that differ from token to token."""
    swing = torch.logspace(-8, 8, 300, base=2)
    a, b = normal(24, 300) * swing, normal(40, 300, seed=1) / swing.sqrt()
    a, b = fp8_ops.quantise(a, group), fp8_ops.quantise(b, group)
    expected = dequantise(a, torch.float64) @ dequantise(b, torch.float64).T
    assert frobenius(fp8_ops.gemm(a, b, out_dtype=torch.float32, backend=backend), expected) < 1e-5


def test_gemm_keeps_a_lost_group_in_its_row():
    x = normal(4, 256)
    clean = fp8_ops.gemm(fp8_ops.quantise(x, 128), fp8_ops.quantise(normal(8, 256), 0, "tensor"))
    x[2, 200] = float("inf")
    for backend in ("block", "bf16_fold"):
        y = fp8_ops.gemm(fp8_ops.quantise(x, 128), fp8_ops.quantise(normal(8, 256), 0, "tensor"), backend=backend)
        assert y[2].isnan().all()
        assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


def products(x, w, recipe):
    exact = x.double() @ w.double().T
    one = dequantise(fp8_ops.quantise(x, *recipe), torch.float64)
    return exact, one @ w.double().T, one @ dequantise(fp8_ops.quantise(w, 0, "tensor"), torch.float64).T


@pytest.mark.parametrize("recipe", [(32, "row"), (32, "none"), (128, "none"), (32, "tensor")], ids=str)
def test_c_gaussian_product_error(recipe):
    exact, one, both = products(normal(256, 4096), normal(128, 4096, seed=1), recipe)
    assert 0.024 <= frobenius(one, exact) <= 0.029
    assert 0.034 <= frobenius(both, exact) <= 0.040


@pytest.mark.parametrize("recipe", [(32, "row"), (32, "none"), (128, "none"), (32, "tensor")], ids=str)
def test_c_rows_of_different_size(recipe):
    rows = torch.exp(2 * normal(512, 1, seed=3))
    x, w = normal(512, 4096) * rows, normal(256, 4096, seed=1)
    exact, ours, _ = products(x, w, recipe)
    _, tensor, _ = products(x, w, (0, "tensor"))
    worst = lambda y: float(((y - exact).norm(dim=1) / exact.norm(dim=1)).amax())  # noqa: E731
    flushed = lambda r: float((fp8_ops.quantise(x, *r).codes.float() == 0).double().mean())  # noqa: E731
    assert worst(ours) < 0.04
    assert worst(tensor) > 0.30
    assert flushed(recipe) * 20 <= flushed((0, "tensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_ops_are_their_parts(dtype):
    x, up, weight = normal(9, 160).to(dtype), normal(9, 160, seed=1).to(dtype), normal(160, seed=2).to(dtype)
    wide = x.double()
    norm = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    quantised, reciprocal = fp8_ops.rms_norm_quantise(x, weight, 1e-5, 32, "row")
    step = torch.finfo(dtype).eps / 2 + 4 * 2.0**-24  # rounding to the type, after some roundings in float32
    torch.testing.assert_close(reciprocal.double(), 1 / (wide.square().mean(-1) + 1e-5).sqrt(), rtol=1e-6, atol=0)
    assert frobenius(dequantise(quantised), norm) < 0.03
    near, _ = fp8_reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(near.double(), norm, rtol=step, atol=1e-30)
    gated = wide / (1 + torch.exp(-wide)) * up.double()
    torch.testing.assert_close(fp8_reference.swiglu(x, up).double(), gated, rtol=step, atol=1e-30)
    for fused, plain in (
        (quantised, fp8_format.quantise(near, 32, "row")),
        (fp8_ops.swiglu_quantise(x, up, 128), fp8_format.quantise(fp8_reference.swiglu(x, up), 128)),
    ):
        assert all(
            torch.equal(p.view(torch.uint8), q.view(torch.uint8)) for p, q in zip(fused[:3], plain[:3], strict=True)
        )


def test_both_orientations_come_from_the_original():
    x = normal(70, 130).bfloat16()
    rows, columns = fp8_ops.quantise_both(x, 32, "row")
    for actual, expected in ((rows, fp8_format.quantise(x, 32, "row")), (columns, fp8_format.quantise(x.T, 32))):
        assert actual.group == 32
        for name, p, q in zip(actual._fields, actual[:3], expected[:3], strict=False):
            assert torch.equal(p.view(torch.uint8), q.view(torch.uint8)), name


def test_cast_weight_clips_and_counts():
    weight = torch.tensor([[1.0, -3.0, 0.5], [2.0, float("nan"), float("inf")]])
    codes, codes_t = torch.empty(2, 3, dtype=torch.float8_e4m3fn), torch.empty(3, 2, dtype=torch.float8_e4m3fn)
    clipped = torch.zeros((), dtype=torch.int64)
    scale = fp8_format.scale_for(torch.tensor([2.0]))
    fp8_ops.cast_weight(weight, scale, codes, codes_t, clipped)
    assert clipped == 2, "beyond 2 are -3 and the infinity"
    assert codes[0].float().tolist() == [224.0, -448.0, 112.0]
    assert codes[1].view(torch.uint8).tolist() == [0x7E, 0x7F, 0x7F]
    assert torch.equal(codes_t.view(torch.uint8), codes.view(torch.uint8).T)
    fp8_ops.cast_weight(weight, scale, codes, codes_t.new_empty(0), clipped)


def test_refusals_name_what_does_not_fit():
    a, b = fp8_ops.quantise(normal(4, 64), 32), fp8_ops.quantise(normal(4, 64), 128)
    for call, match in (
        (lambda: fp8_ops.gemm(a, b), "groups of 32, b of 128"),
        (lambda: fp8_ops.gemm(a, fp8_ops.quantise(normal(4, 32), 32)), "K = 64, b has K = 32"),
        (lambda: fp8_ops.gemm(a, a, backend="tensor"), "takes no exponents"),
        (lambda: fp8_ops.gemm(a, a, backend="cublas"), "block, bf16_fold, tensor"),
        (lambda: fp8_ops.gemm(a, a, out_dtype=torch.int8), "int8"),
        (lambda: fp8_ops.quantise(normal(4)), "1 dimensions"),
        (lambda: fp8_ops.quantise(normal(4, 4).double()), "float64"),
        (lambda: fp8_ops.quantise_both(normal(4, 4), 0, "row"), "no scale at all"),
        (lambda: fp8_ops.rms_norm_quantise(normal(4, 64), torch.ones(63), 1e-5), r"\(63,\)"),
        (lambda: fp8_ops.swiglu_quantise(normal(4, 64), normal(4, 32)), r"\(4, 32\)"),
        (lambda: fp8_ops.cast_weight(normal(4, 4), torch.ones(2), *[torch.empty(4, 4)] * 2, torch.zeros(())), "2 el"),
        (lambda: fp8_ops.cast_weight(normal(4, 4), torch.ones(1), *[torch.empty(4, 5)] * 2, torch.zeros(())), "fit"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
