"""MOEA/D for Optuna: a front by decomposition into weighted Tchebycheff problems (Zhang and Li, 2007).

KVTuner's paper names Optuna with MOEA/D (its appendix, table of settings); Optuna itself ships NSGA-II only. Nothing
is kept between trials: the incumbents are recomputed from the finished trials, and the random numbers come from the
seed and the number of finished trials. So a study that was killed goes on exactly as if it had not been.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

_FLOOR = 1e-12


class MOEADSampler(BaseSampler):
    """Two objectives, both minimised, integer parameters.

    Args:
        seed: of all random numbers.
        subproblems: number of weight vectors, at least 2; each trial serves the next one.
        neighbours: weight vectors of which parents are taken, the nearest ones.
        logarithmic: which objectives are compared by their logarithm.
        crossover, mutation: chance that a child has two parents, and that a gene is drawn anew (None: one gene in the
            mean).
    """

    def __init__(
        self,
        *,
        seed: int,
        subproblems: int = 16,
        neighbours: int = 5,
        logarithmic: tuple[bool, bool] = (False, False),
        crossover: float = 0.9,
        mutation: float | None = None,
    ) -> None:
        if subproblems < 2 or not 2 <= neighbours <= subproblems:
            raise ValueError(f"{neighbours} neighbours of {subproblems} subproblems; both must be 2 or more")
        share = np.linspace(0.0, 1.0, subproblems)
        self._weights = np.maximum(np.stack((share, 1 - share), 1), 1e-3)
        self._neighbours = neighbours
        self._logarithmic = logarithmic
        self._crossover, self._mutation = crossover, mutation
        self._seed = seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return nothing: `propose` is given the whole space by its caller."""
        return {}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        """Return one child: the integer parameters of `search_space`, or nothing before two trials are finished."""
        finished = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if len(finished) < 2 or not search_space:
            return {}
        rng = np.random.default_rng([self._seed, len(finished)])
        problem = len(finished) % len(self._weights)
        near = np.argsort(np.abs(np.arange(len(self._weights)) - problem), kind="stable")[: self._neighbours]
        incumbents = self._incumbents(np.array([t.values for t in finished]))[near]
        mother, father = (finished[incumbents[i]].params for i in rng.choice(len(near), 2, replace=False))
        return self._child(mother, father, search_space, rng)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one parameter uniformly."""
        if not isinstance(param_distribution, IntDistribution):
            raise TypeError(f"{param_name} is not an integer parameter")
        rng = np.random.default_rng([self._seed, trial.number, *param_name.encode()])
        return int(rng.integers(param_distribution.low, param_distribution.high + 1))

    def _incumbents(self, values: np.ndarray) -> np.ndarray:
        """Index of the best of `values` [trials, 2] for each weight vector, the earliest of equals."""
        scaled = values.astype(float)
        for column, logarithmic in enumerate(self._logarithmic):
            if logarithmic:
                scaled[:, column] = np.log(np.maximum(scaled[:, column], _FLOOR))
        low, high = scaled.min(0), scaled.max(0)
        scaled = (scaled - low) / np.where(high > low, high - low, 1.0)
        weighted = self._weights[:, None] * scaled[None]
        distance = weighted.max(2) + 1e-3 * weighted.sum(2)
        return np.asarray(distance.argmin(1))

    def _child(
        self, mother: dict[str, Any], father: dict[str, Any], space: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Any]:
        mixed = rng.random() < self._crossover
        rate = 1 / max(1, len(space)) if self._mutation is None else self._mutation
        child = {}
        for name, distribution in space.items():
            parent = father if mixed and rng.random() < 0.5 else mother
            gene = parent[name] - distribution.low
            if rng.random() < rate:
                gene = step(gene, distribution.high - distribution.low + 1, rng)
            child[name] = distribution.low + gene
        return child


def step(gene: int, size: int, rng: np.random.Generator) -> int:
    """Mutate one of `size` ordered choices: mostly to a neighbour, now and then (one in eight) to any."""
    if rng.random() < 1 / 8:
        return int(rng.integers(size))
    return int(np.clip(gene + rng.choice((-1, 1)), 0, size - 1))
