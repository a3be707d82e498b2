"""The space that the search walks: one option per group of layers, and the number of 16-bit sink tokens.

A point of it is a tuple of *genes*: for each group the index of one of its options, cheapest first (paper, section
5.3: "one integer per group into its survivor list"), then the index of the sink setting. Predicted errors add up over
layers (`sensitivity`); they seed the search and repair points that are too large, they are never its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jettison.hooks.errors import ConfigError
from jettison.plugins.kvtuner.artefact import Choice
from jettison.plugins.kvtuner.codecs import nominal_bits
from jettison.plugins.kvtuner.group import Group
from jettison.plugins.kvtuner.select import choose, front

Genes = tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """One way to store a model's cache: bits or codecs of every layer, and the first tokens kept at 16 bits."""

    pairs: tuple[Choice, ...]
    sink_tokens: int

    @property
    def key(self) -> str:
        """Text that tells candidates apart, e.g. `1:8.4,4.4` or `0:fp8/int4,fp8/fp8`."""
        words = (f"{key}/{value}" if isinstance(key, str) else f"{key}.{value}" for key, value in self.pairs)
        return f"{self.sink_tokens}:" + ",".join(words)

    @property
    def nominal_bits(self) -> float:
        """Mean bits per element, without scales, zeros and sink area."""
        return sum(nominal_bits(side) for pair in self.pairs for side in pair) / (2 * len(self.pairs))


@dataclass(frozen=True)
class Space:
    """What can be chosen, at which price and with which predicted error.

    Attributes:
        options: (key bits, value bits) of each option, or (key codec, value codec) by name.
        groups: layers that share one choice, and the options left to them; together all layers, each once.
        sinks: the sink settings to choose from.
        errors: [sink settings][layers][options], predicted error of one layer alone; they are added.
        costs: [sink settings][options], bytes per token of one layer, all KV heads.
    """

    options: tuple[Choice, ...]
    groups: tuple[Group, ...]
    sinks: tuple[int, ...]
    errors: tuple[tuple[tuple[float, ...], ...], ...]
    costs: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        found = sorted(layer for group in self.groups for layer in group.layers)
        if found != list(range(len(found))) or not found:
            raise ConfigError(f"the groups hold the layers {found}", allowed="every layer must be in exactly one group")
        layers = {len(rows) for rows in self.errors}
        if layers != {len(found)} or not len(self.sinks) == len(self.errors) == len(self.costs):
            raise ConfigError("errors, costs and sink settings do not fit the groups", do="measure the model again")

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.errors[0])

    @cached_property
    def ordered(self) -> tuple[tuple[int, ...], ...]:
        """Options of each group, cheapest first, then by index."""
        price = self.costs[0]
        return tuple(tuple(sorted(group.options, key=lambda o: (price[o], o))) for group in self.groups)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each gene."""
        return (*(len(options) for options in self.ordered), len(self.sinks))

    @cached_property
    def _tables(self) -> tuple[tuple[tuple[np.ndarray, np.ndarray], ...], ...]:
        """Per sink setting and group: error and cost of each of its ordered options."""
        return tuple(
            tuple(
                (
                    np.array([sum(errors[layer][option] for layer in group.layers) for option in options]),
                    np.array([len(group.layers) * costs[option] for option in options]),
                )
                for group, options in zip(self.groups, self.ordered, strict=True)
            )
            for errors, costs in zip(self.errors, self.costs, strict=True)
        )

    def candidate(self, genes: Sequence[int]) -> Candidate:
        """Return what `genes` stand for."""
        pairs: list[Choice] = [(16, 16)] * self.num_layers
        for group, options, gene in zip(self.groups, self.ordered, genes, strict=False):
            for layer in group.layers:
                pairs[layer] = self.options[options[gene]]
        return Candidate(tuple(pairs), self.sinks[genes[-1]])

    def genes(self, candidate: Candidate) -> Genes | None:
        """Return the genes that stand for `candidate`, or None if it is not in the space."""
        if candidate.sink_tokens not in self.sinks:
            return None
        found = []
        for group, options in zip(self.groups, self.ordered, strict=True):
            pairs = {candidate.pairs[layer] for layer in group.layers}
            fitting = [gene for gene, option in enumerate(options) if pairs == {self.options[option]}]
            if not fitting:
                return None
            found.append(fitting[0])
        return (*found, self.sinks.index(candidate.sink_tokens))

    def cost(self, candidate: Candidate) -> int:
        """Bytes per token of all layers and KV heads, scales, zeros and sink area included."""
        price = self.costs[self.sinks.index(candidate.sink_tokens)]
        return sum(price[self.options.index(pair)] for pair in candidate.pairs)

    def predicted(self, candidate: Candidate) -> float:
        """Sum of the predicted errors of the layers."""
        errors = self.errors[self.sinks.index(candidate.sink_tokens)]
        return sum(row[self.options.index(pair)] for row, pair in zip(errors, candidate.pairs, strict=True))

    @property
    def least(self) -> int:
        """Bytes per token of the smallest candidate."""
        return min(sum(int(costs.min()) for _, costs in tables) for tables in self._tables)

    def check_budget(self, budget: int) -> None:
        """Raise ConfigError unless some candidate fits `budget` bytes per token."""
        if self.least > budget:
            raise ConfigError(
                f"the budget of {budget} bytes per token is too small",
                allowed=f"the smallest cache takes {self.least}",
                do="raise the budget",
            )

    def front(self, budget: int, sink: int) -> list[tuple[int, Genes]]:
        """Exact front of the predicted error at the sink setting `sink` (an index): (cost, genes), cheapest first."""
        tables = self._tables[sink]
        if sum(int(costs.min()) for _, costs in tables) > budget:
            return []
        errors, costs = [row.tolist() for row, _ in tables], [row.tolist() for _, row in tables]
        return [(cost, (*picks, sink)) for cost, picks in front(errors, costs, budget)]

    def errors_of(self, genes: Sequence[int]) -> list[float]:
        """Predicted error of each group."""
        return [float(errors[gene]) for (errors, _), gene in zip(self._tables[genes[-1]], genes, strict=False)]

    def solve(self, budget: int, sink: int, factors: Sequence[np.ndarray]) -> tuple[float, Genes] | None:
        """(error, genes) of the optimum within `budget` if the errors of group g are `factors[g]` times the predicted.

        None if nothing fits at the sink setting `sink` (an index).
        """
        tables = self._tables[sink]
        if sum(int(costs.min()) for _, costs in tables) > budget:
            return None
        errors = [row * factor for (row, _), factor in zip(tables, factors, strict=True)]
        picks = choose([row.tolist() for row in errors], [row.tolist() for _, row in tables], budget)
        return sum(float(row[pick]) for row, pick in zip(errors, picks, strict=True)), (*picks, sink)

    def repair(self, genes: Sequence[int], budget: int) -> Genes:
        """Return `genes`, made to fit `budget`: the cheapest predicted error per saved byte goes first.

        Raises:
            ConfigError: nothing fits.
        """
        self.check_budget(budget)
        now = list(genes)
        while (excess := self._cost(now) - budget) > 0:
            move = self._best_saving(now, excess)
            if move is None:
                now[-1] = min(range(len(self.sinks)), key=lambda s: sum(int(c.min()) for _, c in self._tables[s]))
            else:
                now[move[0]] = move[1]
        return tuple(now)

    def _cost(self, genes: Sequence[int]) -> int:
        tables = self._tables[genes[-1]]
        return sum(int(costs[gene]) for (_, costs), gene in zip(tables, genes, strict=False))

    def _best_saving(self, genes: Sequence[int], excess: int) -> tuple[int, int] | None:
        """(group, option) of the least predicted error per byte saved; bytes beyond `excess` count for nothing."""
        best: tuple[float, int, int] | None = None
        for group, ((errors, costs), gene) in enumerate(zip(self._tables[genes[-1]], genes, strict=False)):
            for option in range(len(costs)):
                saved = min(int(costs[gene] - costs[option]), excess)
                if saved > 0:
                    move = (float(errors[option] - errors[gene]) / saved, group, option)
                    best = move if best is None else min(best, move)
        return best and best[1:]
