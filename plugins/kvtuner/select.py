"""Choose one (key bits, value bits) per layer: exactly, by dynamic programming over additive errors.

With errors that add up over layers the optimum itself, and the whole front, takes milliseconds. A row of the
arguments may as well be a group of layers that share one choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jettison.hooks.errors import ConfigError


def choose(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Return, per layer, the index of the option that minimises the summed error at a summed cost within `budget`.

    Args:
        errors: [layers][options], finite, lower is better.
        costs: [layers][options], whole bytes, not negative.
        budget: bytes for all layers together.

    Returns:
        one option index per layer; of equal errors the cheaper solution, then the lower index.

    Raises:
        ConfigError: even the cheapest options exceed the budget.
    """
    best, picks, unit = _tabulate(errors, costs, budget)
    return _walk_back(picks, [[cost // unit for cost in row] for row in costs], int(best.argmin()))


def front(
    errors: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int
) -> list[tuple[int, list[int]]]:
    """Return every Pareto-optimal solution of `choose`, as (cost, option per layer), cheapest first.

    Args:
        errors: [layers][options], finite, lower is better.
        costs: [layers][options], whole bytes, not negative.
        budget: bytes for all layers together; solutions above it are not returned.

    Raises:
        ConfigError: even the cheapest options exceed the budget.
    """
    best, picks, unit = _tabulate(errors, costs, budget)
    steps = [[cost // unit for cost in row] for row in costs]
    lowest, found = np.inf, []
    for state in np.flatnonzero(np.isfinite(best)):
        if best[state] < lowest:
            lowest = best[state]
            found.append((int(state) * unit, _walk_back(picks, steps, int(state))))
    return found


def _tabulate(
    errors: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int
) -> tuple[np.ndarray, list[np.ndarray], int]:
    """Least error per cost in units of their common divisor, the option taken per layer and cost, and that unit."""
    least = sum(min(row) for row in costs)
    if least > budget:
        raise ConfigError(
            f"the budget of {budget} bytes is too small", allowed=f"the smallest cache takes {least}", do="raise it"
        )
    unit = math.gcd(*(cost for row in costs for cost in row)) or 1
    slots = budget // unit + 1
    best = np.zeros(1)
    picks: list[np.ndarray] = []
    for row_errors, row_costs in zip(errors, costs, strict=True):
        steps = [cost // unit for cost in row_costs]
        width = min(slots, len(best) + max(steps))
        candidates = np.full((len(steps), width), np.inf)
        for option, step in enumerate(steps):
            reach = min(len(best), width - step)
            if reach > 0:
                candidates[option, step : step + reach] = best[:reach] + row_errors[option]
        picks.append(candidates.argmin(0))
        best = candidates.min(0)
    return best, picks, unit


def _walk_back(picks: Sequence[np.ndarray], steps: Sequence[Sequence[int]], state: int) -> list[int]:
    chosen: list[int] = []
    for pick, row in zip(reversed(picks), reversed(steps), strict=True):
        option = int(pick[state])
        chosen.append(option)
        state -= row[option]
    return chosen[::-1]
