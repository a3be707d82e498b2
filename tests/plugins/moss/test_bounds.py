"""How far a step can go: the bounds against real optimizers fed with the worst gradients."""

import math
import re
from itertools import pairwise

import pytest
import torch

from jettison.plugins.moss.bounds import Bound, Unbounded, adam_kappa, bound_for

BETAS = [(0.9, 0.95), (0.9, 0.98), (0.9, 0.999), (0.95, 0.95), (0.0, 0.99), (0.8, 0.9), (0.5, 0.999)]


@pytest.mark.parametrize(
    ("betas", "expected"), [((0.9, 0.95), 1.165), ((0.9, 0.98), 1.70), ((0.9, 0.999), 7.27), ((0.95, 0.95), 1.0)]
)
def test_the_known_limits(betas, expected):
    """Values of section 2.7, to the digits printed there."""
    assert adam_kappa(*betas, None) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_kappa_starts_at_1_grows_and_has_its_limit(betas):
    values = [adam_kappa(*betas, steps) for steps in [*range(1, 300), 1000, 10_000, 100_000]]
    assert values[0] == pytest.approx(1.0, rel=1e-12)
    assert all(b >= a * (1 - 1e-12) for a, b in pairwise(values)), f"{betas}"
    assert values[-1] == pytest.approx(adam_kappa(*betas, None), rel=1e-6)


def worst_gradients(beta1, beta2, steps):
    """Cauchy-Schwarz with equality: the gradient of step i is proportional to (beta1 / beta2)**(steps - i)."""
    return [(beta1 / beta2) ** (steps - i) if beta1 else (1.0 if i == steps else 1e-9) for i in range(1, steps + 1)]


@pytest.mark.parametrize("steps", [1, 2, 7, 60])
@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_adamw_reaches_the_bound_and_never_passes_it(betas, steps):
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=betas, eps=0.0, weight_decay=0.0)
    for gradient in worst_gradients(*betas, steps):
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        before = parameter.item()
        optimizer.step()
    moved = abs(parameter.item() - before)
    assert moved == pytest.approx(adam_kappa(*betas, steps), rel=1e-9), "the bound is not tight"
    bound = bound_for(optimizer, optimizer.param_groups[0], steps, strict=True)
    assert moved <= bound.growth <= moved * 1.002


def one(kind, **options):
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    return kind([parameter], **options)


class Lion(torch.optim.Optimizer):
    """As its paper prints it."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * momentum.lerp(p.grad, 1 - group["betas"][0]).sign())
                momentum.lerp_(p.grad, 1 - group["betas"][1])


def test_bounds_by_hand():
    def found(optimizer, strict=True, steps=None):
        return bound_for(optimizer, optimizer.param_groups[0], steps, strict=strict)

    adamw = one(torch.optim.AdamW, lr=0.01, weight_decay=0.5)
    assert found(adamw, strict=False) == Bound(0.995, 0.01)
    assert found(adamw).growth == pytest.approx(0.01 * 7.2744, rel=2e-3)
    assert found(one(torch.optim.Adam, lr=0.01, weight_decay=0.5), strict=False) == Bound(1.0, 0.01)
    assert found(one(Lion, lr=0.01, weight_decay=0.5)) == Bound(0.995, 0.01)
    adafactor = found(one(torch.optim.Adafactor, lr=0.01, d=2.0, weight_decay=0.0, eps=(None, 1e-3)))
    assert adafactor.per_root_element
    assert (adafactor.relative, adafactor.growth) == pytest.approx((0.02, 2e-5), rel=2e-3)


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda: one(torch.optim.SGD, lr=0.1, momentum=0.9), "SGD"),
        (lambda: one(torch.optim.RMSprop, lr=0.1), "RMSprop.*known are AdamW"),
        (lambda: one(torch.optim.AdamW, betas=(0.95, 0.9)), r"betas \(0.95, 0.9\)"),
    ],
)
def test_no_bound_says_why(optimizer, reason):
    found = optimizer()
    bound = bound_for(found, found.param_groups[0], None, strict=True)
    assert isinstance(bound, Unbounded)
    assert re.search(reason, bound.reason)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_adafactor_stays_below_its_bound_for_a_single_hot_element(scale):
    """Nearly all of the update in one element: the root of the number of elements is needed."""
    parameter = torch.nn.Parameter(torch.full((16, 16), 0.5))
    optimizer = torch.optim.Adafactor([parameter], lr=0.01, d=1.0)
    largest = 0.0
    for step in range(1, 30):
        parameter.grad = torch.full((16, 16), 1e-12)
        parameter.grad[step % 16, 3] = scale * (1 + step % 3 * 100)
        before, top = parameter.detach().clone(), parameter.detach().abs().max().item()
        optimizer.step()
        bound = bound_for(optimizer, optimizer.param_groups[0], step, strict=True)
        growth = max(bound.growth, bound.relative * top) * math.sqrt(256)
        moved = (parameter.detach() - before).abs().max().item()
        assert moved <= growth, f"step {step}"
        largest = max(largest, moved / growth)
    assert largest > 0.05, "the gradients were not hard enough to test the bound"
