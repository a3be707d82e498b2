"""Intra-layer pruning (paper section 5.2, stage A): a layer keeps the options that no other option beats.

An option is dominated if another one costs no more and errs no more, and is better in one of the two. The cost is what
the cache really pays (`PageLayout.bytes_per_token`), not the nominal bits of the paper: at head size 64 a 2-bit side
costs 2.5 bits. Which of key and value deserves the bits is never assumed; the paper's own tables contradict it in the
first layers of per-channel keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jettison.hooks.errors import ConfigError


def survivors(errors: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Indices of the undominated options of one layer, ascending. Of exact ties in both, all stay.

    Args:
        errors: [options], e.g. e_o; finite, not negative.
        costs: [options], e.g. bytes per token; finite, not negative.

    Raises:
        ConfigError: lengths differ, no options, or a number is negative or not finite.
    """
    _check(errors, costs)
    order = sorted(range(len(errors)), key=lambda option: (costs[option], errors[option]))
    kept: list[int] = []
    lowest, cheapest = math.inf, math.inf
    for option in order:
        if errors[option] < lowest:
            lowest, cheapest = errors[option], costs[option]
            kept.append(option)
        elif (errors[option], costs[option]) == (lowest, cheapest):
            kept.append(option)
    return sorted(kept)


def prune(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]]) -> list[list[int]]:
    """`survivors` of every layer.

    Args:
        errors, costs: [layers][options].

    Raises:
        ConfigError: the first layer that `survivors` refuses is named.
    """
    if len(errors) != len(costs):
        raise ConfigError(f"{len(errors)} rows of errors and {len(costs)} of costs", allowed="one of each per layer")
    kept = []
    for layer, row in enumerate(zip(errors, costs, strict=True)):
        try:
            kept.append(survivors(*row))
        except ConfigError as error:
            raise ConfigError(f"layer {layer}: {error.found}", allowed=error.allowed, do=error.do) from error
    return kept


def _check(errors: Sequence[float], costs: Sequence[float]) -> None:
    if not errors or len(errors) != len(costs):
        raise ConfigError(
            f"{len(errors)} errors and {len(costs)} costs", allowed="one of each per option, at least one option"
        )
    for name, numbers in (("error", errors), ("cost", costs)):
        for option, number in enumerate(numbers):
            if not math.isfinite(number) or number < 0:
                raise ConfigError(
                    f"the {name} of option {option} is {number}",
                    allowed="allowed are finite numbers from 0",
                    do="check the model and the calibration text",
                )
