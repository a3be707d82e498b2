"""What measurements teach about the predictions: corrected errors of every choice, and how sure they are.

A measured KL y of a candidate with predicted error p = sum of e over its groups is explained as

    log(y / p) = a + b log(p) + sum of (e / p) d

with one relative correction d for each group's option and sink setting: normal, `PRIOR` wide, before anything is
measured; a and b take up what all layers have in common. A draw from the posterior of d, put into the exact programme,
is a candidate that is best for all that is known (Thompson sampling): it follows the predictions where they held, and
tries out what is still uncertain.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from jettison.plugins.kvtuner.space import Genes, Space

PRIOR = 0.3
"""Standard deviation of d: predictions of single layers held within a factor of 1.35 on the models we measured."""

NOISE = 0.03
"""Standard deviation of log y beyond what corrections explain."""

WIDE = 10.0
"""Standard deviation of a and b."""


def thompson(space: Space, tried: Sequence[tuple[Genes, float]], budget: int, rng: np.random.Generator) -> Genes | None:
    """Return the genes that are best within `budget` under one draw of corrected errors, over all sink settings.

    Args:
        space: predicted errors and costs.
        tried: genes and measured KL; those with a KL or prediction of 0 teach nothing.
        budget: bytes per token.
        rng: of the draw.

    Returns:
        None where nothing was learnt yet.
    """
    starts = np.cumsum([0, *(len(options) for options in space.ordered)])
    width = int(starts[-1])
    rows, targets = _observations(space, tried, starts, width)
    if not rows:
        return None
    draw = _posterior_draw(np.array(rows), np.array(targets), rng)[2:].reshape(len(space.sinks), width)
    best: tuple[float, Genes] | None = None
    for sink, corrections in enumerate(draw):
        factors = [np.exp(corrections[a:b]) for a, b in pairwise(starts)]
        solved = space.solve(budget, sink, factors)
        if solved is not None and (best is None or solved < best):
            best = solved
    return best and best[1]


def _observations(
    space: Space, tried: Sequence[tuple[Genes, float]], starts: np.ndarray, width: int
) -> tuple[list[np.ndarray], list[float]]:
    rows, targets = [], []
    for genes, kl in tried:
        errors = space.errors_of(genes)
        total = sum(errors)
        if total <= 0 or kl <= 0:
            continue
        row = np.zeros(2 + len(space.sinks) * width)
        row[:2] = 1.0, np.log(total)
        row[2 + genes[-1] * width + starts[:-1] + np.array(genes[:-1])] = np.array(errors) / total
        rows.append(row)
        targets.append(float(np.log(kl / total)))
    return rows, targets


def _posterior_draw(rows: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One draw of the coefficients of a linear model with independent normal priors, by correcting a prior draw.

    Costs the cube of the number of observations, not of coefficients (Matheron's rule).
    """
    prior = np.full(rows.shape[1], PRIOR)
    prior[:2] = WIDE
    sample = rng.standard_normal(len(prior)) * prior
    residual = targets - rows @ sample - NOISE * rng.standard_normal(len(targets))
    weighted = rows * prior**2
    gain = np.linalg.solve(rows @ weighted.T + NOISE**2 * np.eye(len(targets)), residual)
    drawn: np.ndarray = sample + weighted.T @ gain
    return drawn
