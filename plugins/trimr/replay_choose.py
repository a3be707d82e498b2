"""The choice of M and thresholds: the fewest tokens among settings whose loss is bounded, proven on other traces."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.replay import Outcome, Whole, run

Z = 1.959963984540054
"""Of a two-sided 95 % interval."""
RESAMPLES = 10_000
Interval = tuple[float, float]


@dataclass(frozen=True)
class Setting:
    """Options by name, those that the grid varies."""

    values: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """For example `M=2 count_mode=consecutive`."""
        return " ".join(f"{name}={value}" for name, value in self.values)

    @property
    def options(self) -> TrimROptions:
        """As options with only these set."""
        return TrimROptions(**dict(self.values))


@dataclass(frozen=True)
class Figures:
    """What a setting does to a set of requests.

    Attributes:
        requests, cuts, false_stops: counts.
        tokens, whole_tokens: mean thinking tokens with and without cuts.
        saved: share of thinking tokens saved, and its interval.
        false_stop_rate: of the cuts, with Wilson's interval; None without cuts.
        accuracy, whole_accuracy: where every request has an expected answer, else agreement with the whole request,
            which is 1 without cuts.
        loss: whole_accuracy - accuracy, and its interval, paired over requests.
        rules: cuts by rule.
    """

    requests: int
    cuts: int
    false_stops: int
    tokens: float
    whole_tokens: float
    saved: float
    saved_interval: Interval
    false_stop_rate: float | None
    false_stop_interval: Interval
    accuracy: float
    whole_accuracy: float
    loss: float
    loss_interval: Interval
    rules: dict[str, int]


def grid(**values: Sequence[Any]) -> list[Setting]:
    """Return every combination of the values."""
    return [
        Setting(tuple(zip(values, combination, strict=True))) for combination in itertools.product(*values.values())
    ]


def figures(outcomes: Sequence[Outcome], seed: int = 0) -> Figures:
    """Return the figures of outcomes, at least one."""
    known = all(outcome.right is not None for outcome in outcomes)
    right = np.array([o.right if known else o.kept for o in outcomes], dtype=float)
    whole_right = np.array([o.whole_right if known else True for o in outcomes], dtype=float)
    tokens = np.array([o.tokens for o in outcomes], dtype=float)
    whole_tokens = np.array([o.whole_tokens for o in outcomes], dtype=float)
    cuts = [o for o in outcomes if o.rule is not None]
    false_stops = sum(not o.kept for o in cuts)
    rules = sorted({o.rule for o in cuts if o.rule is not None})
    picks = np.random.default_rng(seed).integers(len(outcomes), size=(RESAMPLES, len(outcomes)))
    saved = 1 - tokens[picks].sum(1) / np.maximum(whole_tokens[picks].sum(1), 1)
    return Figures(
        requests=len(outcomes),
        cuts=len(cuts),
        false_stops=false_stops,
        tokens=float(tokens.mean()),
        whole_tokens=float(whole_tokens.mean()),
        saved=float(1 - tokens.sum() / max(1.0, whole_tokens.sum())),
        saved_interval=_middle(saved),
        false_stop_rate=false_stops / len(cuts) if cuts else None,
        false_stop_interval=wilson(false_stops, len(cuts)),
        accuracy=float(right.mean()),
        whole_accuracy=float(whole_right.mean()),
        loss=float((whole_right - right).mean()),
        loss_interval=difference_interval(whole_right - right),
        rules={rule: sum(o.rule == rule for o in cuts) for rule in rules},
    )


def wilson(hits: int, trials: int) -> Interval:
    """Return the 95 % score interval of a share; (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    share, weight = hits / trials, Z * Z / trials
    centre = (share + weight / 2) / (1 + weight)
    half = Z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)


def difference_interval(differences: Any) -> Interval:
    """Return the 95 % interval of a mean of paired differences that are -1, 0 or 1.

    The score intervals of the two shares of discordant pairs, combined by their distances (Zou and Donner's method of
    variance estimates, with the correlation of a multinomial). Where no difference was seen it still leaves doubt,
    as a bootstrap would not.
    """
    count = len(differences)
    worse, better = int((differences > 0).sum()), int((differences < 0).sum())
    (low_w, high_w), (low_b, high_b) = wilson(worse, count), wilson(better, count)
    w, b = worse / max(1, count), better / max(1, count)
    tied = (1 - w) * (1 - b)
    apart = 2 * math.sqrt(w * b / tied) if tied else 2.0
    down = (w - low_w) ** 2 + (high_b - b) ** 2 + apart * (w - low_w) * (high_b - b)
    up = (high_w - w) ** 2 + (b - low_b) ** 2 + apart * (high_w - w) * (b - low_b)
    return w - b - math.sqrt(down), w - b + math.sqrt(up)


def measure(
    requests: Sequence[Whole], settings: Sequence[Setting], progress: Callable[[int, int], None] | None = None
) -> dict[Setting, list[Outcome]]:
    """Return each setting's outcome for each request."""
    found: dict[Setting, list[Outcome]] = {}
    for done, setting in enumerate(settings, 1):
        found[setting] = [run(one, setting.options) for one in requests]
        if progress is not None:
            progress(done, len(settings))
    return found


def choose(outcomes: dict[Setting, list[Outcome]], limit: float) -> tuple[Setting | None, Figures | None]:
    """Return the setting that saves the most tokens while its accuracy loss is surely within `limit`.

    Chosen on every other request by the upper end of the loss's interval; the figures are those of the requests in
    between, which had no part in the choice. (None, None) where no setting qualifies or there are fewer than two
    requests.
    """
    size = len(next(iter(outcomes.values()), []))
    if size < 2:
        return None, None
    tried = {setting: figures(found[::2]) for setting, found in outcomes.items()}
    fit = [setting for setting, got in tried.items() if got.loss_interval[1] <= limit]
    if not fit:
        return None, None
    best = max(fit, key=lambda setting: (tried[setting].saved, -tried[setting].loss))
    return best, figures(outcomes[best][1::2])


def _middle(samples: Any) -> Interval:
    low, high = np.quantile(samples, (0.025, 0.975))
    return float(low), float(high)
