"""Inter-layer grouping (paper section 5.2, stage B): layers that survive and err alike share one choice.

The paper says "cluster" and gives neither algorithm nor scale; here it is made free of both:

1. Layers are partitioned by their set of surviving options, and by their kind (full or sliding window). Layers of
   different partitions never share a group.
2. A layer's features are log e_o over its survivors, each option standardised over all layers, so neither the size of
   the errors nor that of the model matters. Differences below `NOISE` count as none.
3. `auto`: DBSCAN with two neighbours and, per partition, a radius at the knee of the neighbour distances; noise points
   become groups of one. Density chains: errors that grow evenly with depth end in one group. If the groups explain
   less than `EXPLAINED` of the variance, or are more than twice `TARGET`, Ward's agglomeration into `TARGET` groups
   takes over.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jettison.hooks.errors import ConfigError

How = Literal["auto", "singleton"] | int

TARGET = 6
"""Groups of the fallback: the paper's own counts are 4 to 8, and 5 options in 6 groups are 15,625 tables."""

EXPLAINED = 0.5
"""Least share of the variance of the standardised log errors that density groups must explain."""

NOISE = 0.05
"""Relative differences of e_o that a calibration text of a few thousand tokens cannot tell from chance."""

GAP = 2.0
"""Least ratio of two successive heights that separates clusters."""

_FLOOR = 1e-12


@dataclass(frozen=True)
class Group:
    """Layers that share one choice.

    Attributes:
        layers: ascending.
        options: indices of the options that every one of these layers kept, ascending.
    """

    layers: tuple[int, ...]
    options: tuple[int, ...]


def groups(
    survivors: Sequence[Sequence[int]],
    errors: Sequence[Sequence[float]],
    how: How = "auto",
    kinds: Sequence[Hashable] | None = None,
) -> list[Group]:
    """Group layers; every layer is in exactly one group, groups are ordered by their first layer.

    Args:
        survivors: per layer the indices of its surviving options, from `prune.survivors`.
        errors: [layers][options], e_o or any error that is not negative.
        how: "auto", "singleton" (every layer its own), or the number of groups.
        kinds: per layer anything hashable that must not be mixed, e.g. its window; None: all alike.

    Raises:
        ConfigError: `how` is none of these, or fewer groups are asked for than there are partitions.
    """
    kinds = [None] * len(survivors) if kinds is None else kinds
    _check(survivors, errors, kinds)
    partitions = _partitions(survivors, kinds)
    if how == "singleton":
        labels = [list(range(len(layers))) for layers, _ in partitions]
    else:
        features, ties = _features(partitions, np.asarray(errors, float))
        if how == "auto":
            labels = _auto(features, ties)
        else:
            _check_target(how, len(partitions), len(survivors))
            labels = _agglomerate(features, how)
    found = [
        Group(tuple(layer for layer, mine in zip(layers, marks, strict=True) if mine == label), options)
        for (layers, options), marks in zip(partitions, labels, strict=True)
        for label in sorted(set(marks))
    ]
    return sorted(found, key=lambda group: group.layers)


def parse_how(text: str) -> How:
    """Turn VALUE of `--groups VALUE` into `How`.

    Raises:
        ConfigError: neither auto, singleton nor a whole number from 1.
    """
    if text == "auto":
        return "auto"
    if text == "singleton":
        return "singleton"
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise ConfigError(f"--groups {text!r} is refused", allowed="allowed are auto, singleton and a number from 1")


def _check(survivors: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], kinds: Sequence[Hashable]) -> None:
    if not len(survivors) == len(errors) == len(kinds):
        raise ConfigError(
            f"survivors of {len(survivors)}, errors of {len(errors)} and kinds of {len(kinds)} layers",
            allowed="one of each per layer",
        )
    for layer, (kept, row) in enumerate(zip(survivors, errors, strict=True)):
        if not kept or not set(kept) <= set(range(len(row))):
            raise ConfigError(
                f"layer {layer} keeps the options {list(kept)}", allowed=f"allowed are some of 0 to {len(row) - 1}"
            )
        if len(row) != len(errors[0]) or not np.isfinite(row).all() or min(row) < 0:
            raise ConfigError(
                f"the errors of layer {layer} are not {len(errors[0])} finite numbers from 0",
                do="check the model and the calibration text",
            )


def _check_target(how: object, least: int, most: int) -> None:
    if not isinstance(how, int) or isinstance(how, bool) or not least <= how <= most:
        raise ConfigError(
            f"{how!r} groups are refused",
            allowed=f"allowed are auto, singleton and {least} (layers that keep different options never share a "
            f"group) to {most}",
        )


Partition = tuple[tuple[int, ...], tuple[int, ...]]
"""(layers, options)."""


def _partitions(survivors: Sequence[Sequence[int]], kinds: Sequence[Hashable]) -> list[Partition]:
    found: dict[tuple[tuple[int, ...], Hashable], list[int]] = {}
    for layer, (kept, kind) in enumerate(zip(survivors, kinds, strict=True)):
        found.setdefault((tuple(sorted(set(kept))), kind), []).append(layer)
    return [(tuple(layers), options) for (options, _), layers in found.items()]


def _features(partitions: Sequence[Partition], errors: np.ndarray) -> tuple[list[np.ndarray], list[float]]:
    """Per partition rows [layers, options], and the distance that `NOISE` in every option makes between two rows.

    The squared length of a row is the mean over its options of the squared z-scores.
    """
    positive = np.where(errors > 0, errors, np.inf).min(0)
    logs = np.log(np.maximum(errors, np.where(np.isfinite(positive), positive, _FLOOR)))
    spread = np.maximum(logs.std(0), NOISE)
    scores = (logs - logs.mean(0)) / spread
    rows = [scores[np.ix_(layers, options)] / np.sqrt(len(options)) for layers, options in partitions]
    ties = [float(np.sqrt(np.mean((NOISE / spread[list(options)]) ** 2))) for _, options in partitions]
    return rows, ties


def _auto(features: Sequence[np.ndarray], ties: Sequence[float]) -> list[list[int]]:
    from sklearn.cluster import DBSCAN

    labels = []
    for rows, tie in zip(features, ties, strict=True):
        marks = DBSCAN(eps=_radius(rows, tie), min_samples=2).fit_predict(rows)
        noise = marks < 0
        marks[noise] = marks.max() + 1 + np.arange(noise.sum())
        labels.append(marks.tolist())
    total = sum(len(rows) for rows in features)
    within = sum(_within(rows, marks) for rows, marks in zip(features, labels, strict=True))
    count = sum(len(set(marks)) for marks in labels)
    if within <= (1 - EXPLAINED) * total and count <= max(2 * TARGET, len(features)):
        return labels
    return _agglomerate(features, min(max(TARGET, len(features)), total))


def _radius(rows: np.ndarray, tie: float) -> float:
    """Radius in the largest relative gap of the single-linkage heights, the largest height if there is no such gap.

    With two neighbours per core point density clusters are the components of single linkage, so the knee is that of
    its heights: the sorted nearest-neighbour distances would split a cluster whose members pair off. Heights below
    `tie` are alike, or near-twins would make the largest gap.
    """
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import pdist

    if len(rows) < 2:
        return tie
    heights = np.maximum(np.concatenate(([tie], linkage(pdist(rows), "single")[:, 2])), tie)
    ratios = heights[1:] / heights[:-1]
    at = int(ratios.argmax())
    return float(np.sqrt(heights[at] * heights[at + 1]) if ratios[at] >= GAP else heights[-1] * (1 + 1e-9))


def _within(rows: np.ndarray, marks: Sequence[int]) -> float:
    """Sum of squared distances of the rows to the centre of their group."""
    members = [rows[np.asarray(marks) == label] for label in set(marks)]
    return float(sum(((own - own.mean(0)) ** 2).sum() for own in members))


def _agglomerate(features: Sequence[np.ndarray], target: int) -> list[list[int]]:
    """Ward's clusters, `target` over all partitions: each next split goes where it explains most."""
    cuts: list[list[list[int]]] = [_cuts(rows) for rows in features]
    within = [[_within(rows, marks) for marks in own] for rows, own in zip(features, cuts, strict=True)]
    sizes = [0] * len(features)
    for _ in range(target - len(features)):
        gains = [
            own[size] - own[size + 1] if size + 1 < len(own) else -1.0 for own, size in zip(within, sizes, strict=True)
        ]
        sizes[int(np.argmax(gains))] += 1
    return [own[size] for own, size in zip(cuts, sizes, strict=True)]


def _cuts(rows: np.ndarray) -> list[list[int]]:
    """Labels of the clusterings into 1, 2, ... len(rows) clusters."""
    from sklearn.cluster import AgglomerativeClustering

    if len(rows) == 1:
        return [[0]]
    model: Any = AgglomerativeClustering
    return [model(n_clusters=count).fit_predict(rows).tolist() for count in range(1, len(rows) + 1)]
