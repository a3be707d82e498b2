"""The sampler of a search: seeds first, then in turn a child of NSGA-II or MOEA/D and a draw of `surrogate`.

Whatever they propose is made complete, fitted to the budget, and different from all that was tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from jettison.plugins.kvtuner.moead import MOEADSampler, step
from jettison.plugins.kvtuner.space import Genes, Space
from jettison.plugins.kvtuner.surrogate import thompson

if TYPE_CHECKING:
    from jettison.plugins.kvtuner.search import SearchSettings

ATTEMPTS = 50
"""Draws for a child that was not tried before; after that a repetition is accepted, which costs no evaluation."""


class Walk(BaseSampler):
    """Proposes genes of `space`; see `jettison.plugins.kvtuner.search` for the arguments."""

    def __init__(self, space: Space, seeds: Sequence[Genes], budget: int, settings: SearchSettings) -> None:
        self._space, self._seeds, self._budget, self._settings = space, list(seeds), budget, settings

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters: a child is made as a whole."""
        from jettison.plugins.kvtuner.search import space_distributions

        return space_distributions(self._space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the next seed, or a child."""
        done = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        rng = np.random.default_rng([self._settings.seed, len(done)])
        inner = self._inner(int(rng.integers(2**31)))
        if isinstance(inner, NSGAIISampler):
            inner.get_trial_generation(study, trial)
        if len(done) < len(self._seeds):
            return dict(zip(search_space, self._seeds[len(done)], strict=True))
        tried = [(tuple(t.params[name] for name in search_space), t.values[0]) for t in done]
        genes = thompson(self._space, tried, self._budget, rng) if len(done) % 2 else None
        if genes is None:
            proposed = inner.sample_relative(study, trial, search_space)
            model = tried[int(rng.integers(len(tried)))][0]
            genes = tuple(
                proposed.get(name, step(model[index], size, rng))
                for index, (name, size) in enumerate(zip(search_space, self._space.sizes, strict=True))
            )
        return dict(zip(search_space, self._new(genes, {own for own, _ in tried}, rng), strict=True))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never asked: `sample_relative` returns every parameter."""
        raise AssertionError(f"{param_name} was not proposed")

    def _inner(self, seed: int) -> NSGAIISampler | MOEADSampler:
        size = self._settings.population
        if self._settings.sampler == "moead":
            return MOEADSampler(seed=seed, subproblems=size, neighbours=min(5, size), logarithmic=(True, False))
        return NSGAIISampler(seed=seed, population_size=size)

    def _new(self, genes: Genes, tried: set[Genes], rng: np.random.Generator) -> Genes:
        """`genes` within the budget, changed one gene after another until they are none of `tried`."""
        child = self._space.repair(genes, self._budget)
        changed = list(child)
        free = [index for index, size in enumerate(self._space.sizes) if size > 1]
        for _ in range(ATTEMPTS if free else 0):
            if child not in tried:
                break
            index = int(rng.choice(free))
            changed[index] = step(changed[index], self._space.sizes[index], rng)
            child = self._space.repair(changed, self._budget)
        return child
