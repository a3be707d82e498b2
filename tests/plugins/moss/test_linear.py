"""MossLinear against autograd in float64, between its own options, and under what training wraps around it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from jettison.csrc import fp8_format
from jettison.plugins.moss.config import MossOptions
from jettison.plugins.moss.convert import convert
from jettison.plugins.moss.scaling import WeightScales

RECIPES = {
    "default": {},
    "groups of 32": {"group": 32},
    "rows": {"level": "row"},
    "one tensor scale above": {"level": "tensor", "group": 32},
    "bf16_fold": {"backend": "bf16_fold", "group": 32},
    "per tensor": {"backend": "tensor"},
    "bf16 gradient": {"wgrad": "bf16"},
    "bf16 gradient of the input": {"wgrad": "bf16", "save": "input"},
    "input kept": {"save": "input"},
}


def options(**changes):
    return MossOptions(min_features=1, **changes)


def layer(inputs=256, outputs=192, *, bias=True, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    reference = copy.deepcopy(linear).double()
    convert(linear, options(**changes))
    return linear, reference


def sample(*shape, seed=1, family="normal", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    if family == "t3":
        x = x / torch.randn(3, *shape, generator=generator).square().mean(0).sqrt()
    return x.to(dtype)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def gradients(module, x, dy):
    x = x.clone().requires_grad_()
    y = module(x)
    return y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy.to(y.dtype))


@pytest.mark.parametrize(("family", "least"), [("normal", 0.999), ("t3", 0.99)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_e_outputs_and_gradients_point_where_float64_points(recipe, family, least):
    linear, reference = layer(**RECIPES[recipe])
    x, dy = sample(320, 256, family=family), sample(320, 192, seed=2, family=family)
    actual = gradients(linear, x, dy)
    expected = gradients(reference, x.double(), dy)
    for name, a, e in zip(("y", "dx", "dW", "db"), actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert cosine(a, e) > least, f"{recipe}, {family}: {name} {cosine(a, e):.5f}"


@pytest.mark.parametrize("recipe", [r for r in RECIPES if "bf16 gradient" not in r])
def test_backward_oracle_is_the_three_products_of_what_was_quantised(recipe):
    """Section 8: each gradient is the product of its two quantised operands, in float64."""
    linear, _ = layer(bias=False, **RECIPES[recipe])
    x, dy = sample(100, 256), sample(100, 192, seed=2)
    y, dx, dw = gradients(linear, x, dy)
    o = linear.options
    group, level = (0, "tensor") if o.backend == "tensor" else (o.group, o.level)
    across = "none" if group else "tensor"
    wide = lambda m, *how: fp8_format.dequantise(fp8_format.quantise(m, *how), torch.float64)  # noqa: E731
    w = wide(linear.weight.detach(), 0, "tensor")
    for name, actual, expected in (
        ("y", y, wide(x, group, level) @ w.T),
        ("dx", dx, wide(dy, group, level) @ w),
        ("dW", dw, wide(dy.T, group, across) @ wide(x.T, group, across).T),
    ):
        error = float((actual.double() - expected).norm() / expected.norm())
        assert error < 1e-5, f"{recipe}: {name} {error:.2e}"


def test_keeping_fp8_or_the_input_gives_the_same_gradients():
    x, dy = sample(96, 256), sample(96, 192, seed=2)
    kept, plain = (gradients(layer(save=save)[0], x, dy) for save in ("fp8", "input"))
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_g_bytes_kept_for_the_backward_pass(recipe):
    linear, _ = layer(dtype=torch.bfloat16, **RECIPES[recipe])
    x = sample(512, 256, dtype=torch.bfloat16).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x)
    own = [t for t in kept if t is not linear.weight and t.shape != (256, 192)]
    size = sum(t.numel() * t.element_size() for t in own)
    share = size / (x.numel() * 2)
    assert share <= (0.55 if linear.options.save == "fp8" else 1.01), f"{recipe}: {share:.3f} of bf16"


def small_model(**changes):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False))
    convert(model, options(**changes))
    return model


@pytest.mark.parametrize("managed", [False, True])
def test_activation_checkpointing_changes_no_bit(managed):
    model, x = small_model(), sample(40, 64).requires_grad_()
    if managed:
        WeightScales(model)
    plain = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    again = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), [x, *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("managed", [False, True])
def test_torch_compile_has_no_graph_break_and_follows_the_optimizer(managed):
    model, x = small_model(), sample(40, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if managed:
        WeightScales(model).attach(optimizer)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(3):
        assert torch.equal(compiled(x), model(x)), f"step {step}"
        eager = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        optimizer.zero_grad()
        compiled(x).square().sum().backward()
        for p, g in zip(model.parameters(), eager, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-6)
        optimizer.step()


def test_gradient_accumulation_is_the_sum_with_the_same_weight_bytes():
    model = small_model()
    scales = WeightScales(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scales.attach(optimizer)
    first, second = sample(64, 64), sample(64, 64, seed=5)
    parts = []
    for x in (first, second):
        parts.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    bytes_before = [c.codes.view(torch.uint8).clone() for c in scales.codes]
    for x in (first, second):
        model(x).square().sum().backward()
    assert all(torch.equal(c.codes.view(torch.uint8), b) for c, b in zip(scales.codes, bytes_before, strict=True))
    for p, a, b in zip(model.parameters(), *parts, strict=True):
        assert torch.equal(p.grad, a + b)
    optimizer.step()
    assert any(not torch.equal(c.codes.view(torch.uint8), b) for c, b in zip(scales.codes, bytes_before, strict=True))


@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (17, 64), (2, 3, 64), (2, 0, 64), (64,)], ids=str)
def test_any_leading_shape(shape):
    linear, reference = layer(64, 48)
    x = sample(*shape)
    actual, expected = (
        gradients(linear, x, sample(*shape[:-1], 48)),
        gradients(reference, x.double(), sample(*shape[:-1], 48)),
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.isfinite().all()


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_strided_inputs_are_their_values(view):
    linear, _ = layer(64, 48)
    base = sample(64, 80)
    x = {"transposed": base.T, "strided": base[:, :64][::2], "expanded": base[:1, :64].expand(7, 64)}[view]
    dy = sample(x.shape[0], 48)
    pairs = zip(gradients(linear, x, dy), gradients(linear, x.contiguous(), dy), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_input_that_is_not_finite_stays_in_its_token():
    linear, _ = layer(64, 48)
    x = sample(6, 64)
    clean = linear(x)
    x[2, 5], x[4, 7] = float("nan"), float("inf")
    y = linear(x)
    assert y[[2, 4]].isnan().all()
    assert torch.equal(y[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


def test_autocast_says_the_type_and_weights_stay_float32():
    linear, _ = layer(64, 48)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(sample(8, 64))
    y.float().sum().backward()
    assert (y.dtype, linear.weight.grad.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="float64"):
        linear(sample(8, 64).double())


def test_inference_casts_once_and_notices_new_weights():
    linear, _ = layer(64, 48, bias=False)
    x = sample(8, 64)
    with torch.no_grad():
        first, codes = linear(x), linear.codes.codes
        linear(x)
        assert linear.codes.codes is codes
        linear.weight.mul_(2)
        assert torch.equal(linear(x), 2 * first)
    linear.weight.data.mul_(2)  # leaves no trace, but a training step looks in any case
    assert torch.equal(linear(x), 4 * first)
    with torch.no_grad():
        assert torch.equal(linear(x), 4 * first)
