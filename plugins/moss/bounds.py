"""How far one optimizer step can move a weight (section 2.7 of our notes): ``|w'| <= decay * |w| + growth``.

The paper takes ``growth = lr`` for AdamW. That is no theorem: by Cauchy and Schwarz the quotient of its two moments
reaches ``kappa`` below, 7.3 for betas (0.9, 0.999), when gradients are rare. `strict` bounds use it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_ROUNDING = 1e-3
"""Room for float32 rounding in the moments: 1 / (1 - beta2) steps of 2**-24 each stay far below it."""


@dataclass(frozen=True)
class Bound:
    """One step of one parameter group.

    Attributes:
        decay: factor of a weight that the step updates; a weight without a gradient keeps 1.
        growth: most that is added to a magnitude.
        relative: the growth is at least this share of the tensor's largest magnitude.
        per_root_element: growth and share are multiplied by the root of the number of elements.
    """

    decay: float
    growth: float
    relative: float = 0.0
    per_root_element: bool = False


@dataclass(frozen=True)
class Unbounded:
    """Why no bound is known; such weights are measured after every step instead."""

    reason: str


def adam_kappa(beta1: float, beta2: float, steps: int | None) -> float:
    """Most that ``|m| / sqrt(v)``, both bias-corrected, can be after this many steps from zero; None for any number.

    It grows with the steps: 1 at the first, ``(1 - b1) / sqrt((1 - b2) * (1 - b1**2 / b2))`` in the end.

    Returns:
        infinity where ``beta1**2 >= beta2`` and the number of steps is unknown.
    """
    if beta2 == 0.0:
        return 1.0 if beta1 == 0.0 else math.inf
    ratio = beta1 * beta1 / beta2
    if steps is None:
        return (1 - beta1) / math.sqrt((1 - beta2) * (1 - ratio)) if ratio < 1 else math.inf
    terms = float(steps) if ratio == 1.0 else (1 - ratio**steps) / (1 - ratio)
    correction = math.sqrt(1 - beta2**steps) / (1 - beta1**steps)
    return (1 - beta1) / math.sqrt(1 - beta2) * math.sqrt(terms) * correction


def bound_for(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], steps: int | None, *, strict: bool
) -> Bound | Unbounded:
    """The bound of the step that was just taken.

    Args:
        optimizer: AdamW, Adam, Lion (any class of that name with decoupled decay) or torch's Adafactor.
        group: one of its parameter groups, with the learning rate of that step.
        steps: steps since its state was empty, None if unknown.
        strict: a bound that holds for all gradients; otherwise the paper's estimate.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        return _adam(group, steps, strict, decoupled=bool(group.get("decoupled_weight_decay")))
    if name == "Lion":
        lr = float(group["lr"])
        return Bound(abs(1 - lr * float(group.get("weight_decay", 0.0))), abs(lr))
    if isinstance(optimizer, torch.optim.Adafactor):
        return _adafactor(group, strict)
    if name.startswith("SGD"):
        return Unbounded("a step of SGD is as long as the gradient, which has no bound")
    return Unbounded(f"no bound is known for a step of {name}; known are AdamW, Adam, Lion and Adafactor")


def _adam(group: Mapping[str, Any], steps: int | None, strict: bool, *, decoupled: bool) -> Bound | Unbounded:
    lr = abs(float(group["lr"]))
    beta1, beta2 = (float(beta) for beta in group["betas"])
    kappa = adam_kappa(beta1, beta2, steps) * (1 + _ROUNDING) if strict else 1.0
    if math.isinf(kappa):
        return Unbounded(f"betas ({beta1:g}, {beta2:g}) give steps of any length: beta1**2 must be below beta2")
    decay = abs(1 - float(group["lr"]) * float(group["weight_decay"])) if decoupled else 1.0
    return Bound(decay, kappa * lr)


def _adafactor(group: Mapping[str, Any], strict: bool) -> Bound:
    """Its update has a root mean square of at most `d`, so one element at most `d` times the root of their number."""
    lr, clip = float(group["lr"]), float(group["d"])
    floor = float(group["eps"][1] or 0.0)
    room = 1 + _ROUNDING if strict else 1.0
    decay = abs(1 - lr * float(group["weight_decay"]))
    return Bound(decay, floor * lr * clip * room, lr * clip * room, per_root_element=strict)
