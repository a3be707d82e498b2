"""How far one model's next-token distributions are from another's: KL divergence and top-1 agreement."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 256
"""Positions compared at a time: two float32 [256, vocabulary] tables fit the memory of a small machine."""


@dataclass(frozen=True)
class Quality:
    """Over `positions` next-token distributions.

    Attributes:
        mean_kl: nats, KL(reference || other).
        standard_error: of the mean, from the spread between positions.
        top1_agreement: share of positions with the same most likely token, 0 to 1.
        median_kl, p99_kl: nats.
        worst_percent_share: share of the summed KL that the worst 1 % of positions hold.
        positions: number of positions.
    """

    mean_kl: float
    standard_error: float
    top1_agreement: float
    median_kl: float
    p99_kl: float
    worst_percent_share: float
    positions: int


def compare(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Compare logits or log-probabilities, position by position.

    Args:
        reference, other: [T, vocabulary], any float type, on one device.

    Returns:
        KL(reference || other) in nats, float32 [T], and whether the most likely token is the same, bool [T].
    """
    parts = [_compare(*rows) for rows in zip(reference.split(ROWS), other.split(ROWS), strict=True)]
    return torch.cat([kl for kl, _ in parts]), torch.cat([same for _, same in parts])


def _compare(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    exact = torch.log_softmax(reference.float(), -1)
    kl = (exact.exp() * (exact - torch.log_softmax(other.float(), -1))).sum(-1)
    return kl, reference.argmax(-1) == other.argmax(-1)


def summarise(parts: Iterable[tuple[Tensor, Tensor]]) -> Quality:
    """Quality over everything that `compare` returned."""
    pairs = list(parts)
    kl = torch.cat([kl for kl, _ in pairs]).double()
    same = torch.cat([same for _, same in pairs])
    worst = kl.sort(descending=True).values[: max(1, len(kl) // 100)]
    return Quality(
        mean_kl=kl.mean().item(),
        standard_error=(kl.std() / len(kl) ** 0.5).item(),
        top1_agreement=same.double().mean().item(),
        median_kl=kl.median().item(),
        p99_kl=torch.quantile(kl, 0.99).item(),
        worst_percent_share=(worst.sum() / kl.sum().clamp_min(1e-30)).item(),
        positions=len(kl),
    )
