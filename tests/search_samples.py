"""Spaces with known fronts, and objectives that need no model."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

from jettison.hooks.quality import Quality
from jettison.plugins.kvtuner.group import Group
from jettison.plugins.kvtuner.space import Candidate, Space

OPTIONS = ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2))
COSTS = (136, 104, 72, 56, 40)
"""Bytes per token of `OPTIONS` at head size 64, one head."""


def additive_space(seed: int = 0, groups: int = 6, sinks: tuple[int, ...] = (0,)) -> Space:
    """Up to 5^6 points; errors grow with fewer bits, by factors that differ between layers."""
    rng = random.Random(seed)
    rows = []
    for _ in range(groups):
        size = 10 ** rng.uniform(-3, -1)
        steps = [0.0, *(rng.uniform(0.1, 3.0) for _ in OPTIONS[1:])]
        rows.append(tuple(size * sum(steps[: n + 1]) for n in range(len(OPTIONS))))
    return Space(
        options=OPTIONS,
        groups=tuple(Group((layer,), tuple(range(len(OPTIONS)))) for layer in range(groups)),
        sinks=sinks,
        errors=tuple(tuple(tuple(e * 0.9**index for e in row) for row in rows) for index in range(len(sinks))),
        costs=tuple(tuple(cost + 2 * sink for cost in COSTS) for sink in sinks),
    )


def quality(kl: float) -> Quality:
    return Quality(kl, 0.0, 1.0, kl, kl, 0.0, 100)


def additive(space: Space) -> Callable[[Candidate], Quality]:
    """The objective is what the space predicts."""
    return lambda candidate: quality(space.predicted(candidate))


def interacting(space: Space) -> Callable[[Candidate], Quality]:
    """Neighbouring layers that both err make it worse, which no additive prediction knows."""

    def evaluate(candidate: Candidate) -> Quality:
        rows = space.errors[space.sinks.index(candidate.sink_tokens)]
        own = [row[space.options.index(pair)] for row, pair in zip(rows, candidate.pairs, strict=True)]
        return quality(sum(own) + 40 * sum(a * b for a, b in pairwise(own)))

    return evaluate
