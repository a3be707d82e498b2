"""Inter-layer search (paper section 5.3, stage C): dynamic programme first, then NSGA-II or MOEA/D on the real loss.

Predicted errors add up, so their exact front costs milliseconds; it seeds the search. What it cannot see is how the
errors of layers interact, and how a prediction from a limited text flatters what it picks: for that candidates are run
through the whole model. No candidate above the budget is ever evaluated: children are repaired before.

Each trial depends on nothing but the seed and the finished trials, so a search that is killed and started again ends
where an unbroken one ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jettison.hooks.errors import ConfigError
from jettison.hooks.quality import Quality
from jettison.plugins.kvtuner.ledger import Ledger
from jettison.plugins.kvtuner.sensitivity import Progress
from jettison.plugins.kvtuner.space import Candidate, Genes, Space

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

Sampler = Literal["dp", "nsga2", "moead"]
Evaluate = Callable[[Candidate], Quality]
WORST_KL = 1e6
"""Recorded where the model's output is not finite."""


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    Attributes:
        sampler: `nsga2`, `moead`, or `dp`: measure the programme's front and stop.
        trials: candidates in all, seeds included; each takes one evaluation, unless it was measured before.
        population: NSGA-II's population, MOEA/D's subproblems, and the number of seeds.
        seed: of all random numbers.
    """

    sampler: Sampler = "nsga2"
    trials: int = 64
    population: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in ("dp", "nsga2", "moead"):
            raise ConfigError(f"sampler {self.sampler!r} is refused", allowed="allowed are dp, nsga2 and moead")
        if self.trials < 1 or not 4 <= self.population <= 1000:
            raise ConfigError(
                f"{self.trials} trials with a population of {self.population} are refused",
                allowed="allowed are 1 trial or more, and a population of 4 to 1000",
            )


@dataclass(frozen=True)
class Found:
    """A measured candidate: bytes per token of the whole model, quality on the search text, and who proposed it."""

    candidate: Candidate
    cost: int
    quality: Quality
    origin: str


class Measurements:
    """Evaluations of candidates, each made once and kept in the ledger.

    Args:
        facts: all that the numbers depend on beside the candidate.
        evaluate: the expensive part.
        cost: bytes per token of a candidate.
    """

    def __init__(
        self, ledger: Ledger, facts: dict[str, Any], evaluate: Evaluate, cost: Callable[[Candidate], int]
    ) -> None:
        self.facts = facts
        self.made = 0
        self._study = ledger.study("measured", facts)
        self._evaluate, self._cost = evaluate, cost
        self._known = {
            trial.user_attrs["key"]: Quality(**trial.user_attrs["quality"])
            for trial in self._study.get_trials(deepcopy=False)
            if trial.values
        }

    def __call__(self, candidate: Candidate, origin: str) -> Found:
        """Return the candidate's figures, measured now if they were not before."""
        if candidate.key not in self._known:
            self._known[candidate.key] = self._measure(candidate)
        return Found(candidate, self._cost(candidate), self._known[candidate.key], origin)

    def _measure(self, candidate: Candidate) -> Quality:
        import optuna

        found = self._evaluate(candidate)
        self.made += 1
        if not np.isfinite(found.mean_kl):
            found = Quality(WORST_KL, 0.0, 0.0, WORST_KL, WORST_KL, 0.0, found.positions)
        attrs = {"key": candidate.key, "quality": asdict(found)}
        self._study.add_trial(
            optuna.create_trial(values=[found.mean_kl, float(self._cost(candidate))], user_attrs=attrs)
        )
        return found


def search(
    space: Space,
    measure: Measurements,
    ledger: Ledger,
    budget: int,
    settings: SearchSettings,
    start: Sequence[Candidate] = (),
    *,
    progress: Progress = lambda _what, _done, _total: None,
) -> list[Found]:
    """Search `space` within `budget` bytes per token and return everything that was measured, in order of trials.

    The programme's front comes first, then those of `start` that fit, then the sampler.

    Raises:
        ConfigError: even the smallest candidate exceeds the budget.
    """
    space.check_budget(budget)
    seeds, origins = _seeds(space, start, budget, settings)
    facts = {**measure.facts, "space": _facts(space), "budget": budget, "settings": _identity(settings), "seeds": seeds}
    walker = _walker(space, seeds, budget, settings)
    study = ledger.study("search", facts, walker)
    trials = min(settings.trials, len(seeds)) if settings.sampler == "dp" else settings.trials
    import optuna

    done: list[Found] = []
    for old in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])[:trials]:
        done.append(measure(space.candidate(_genes(space, old.params)), old.user_attrs["origin"]))
    while len(done) < trials:
        progress("search", len(done), trials)
        trial = study.ask(space_distributions(space))
        found = measure(
            space.candidate(_genes(space, trial.params)),
            origins[len(done)] if len(done) < len(origins) else settings.sampler,
        )
        if found.cost > budget:
            raise AssertionError(f"{found.candidate.key} takes {found.cost} of {budget} bytes")
        trial.set_user_attr("origin", found.origin)
        study.tell(trial, [found.quality.mean_kl, float(found.cost)])
        done.append(found)
    return done


def _seeds(
    space: Space, start: Sequence[Candidate], budget: int, settings: SearchSettings
) -> tuple[list[Genes], list[str]]:
    """Genes to begin with, and who proposed each."""
    seeds = seed_genes(space, budget, settings.population)
    origins = ["dp"] * len(seeds)
    for candidate in start:
        genes = space.genes(candidate)
        if genes is not None and genes not in seeds and space.cost(candidate) <= budget:
            seeds.append(genes)
            origins.append("start")
    return seeds, origins


def seed_genes(space: Space, budget: int, count: int) -> list[Genes]:
    """`count` points of the exact predicted fronts of all sink settings or fewer, closest to the budget first.

    They lie denser near the budget; of several sink settings each place takes the one predicted best.
    """
    points = [(cost, genes) for sink in range(len(space.sinks)) for cost, genes in space.front(budget, sink)]
    if len(points) <= count:
        return [genes for _, genes in sorted(points, reverse=True)]
    error = {genes: space.predicted(space.candidate(genes)) for _, genes in points}
    least = min(cost for cost, _ in points)
    chosen: list[Genes] = []
    for n in range(count):
        place = budget - (budget - least) * (n / (count - 1)) ** 3
        within = [genes for cost, genes in points if cost <= place and genes not in chosen]
        if within:
            chosen.append(min(within, key=lambda genes: (error[genes], genes)))
    return chosen


def pareto(found: Iterable[Found]) -> list[Found]:
    """Undominated in bytes and KL, cheapest first; of equals the one found first."""
    front: list[Found] = []
    for one in sorted(found, key=lambda f: (f.cost, f.quality.mean_kl)):
        if not front or one.quality.mean_kl < front[-1].quality.mean_kl:
            front.append(one)
    return front


def space_distributions(space: Space) -> dict[str, Any]:
    """The Optuna parameters of `space`: g0, g1, ... for the groups and `sinks`."""
    from optuna.distributions import IntDistribution

    return {name: IntDistribution(0, size - 1) for name, size in zip(_names(space), space.sizes, strict=True)}


def _names(space: Space) -> list[str]:
    return [*(f"g{number}" for number in range(len(space.groups))), "sinks"]


def _genes(space: Space, params: dict[str, Any]) -> Genes:
    return tuple(int(params[name]) for name in _names(space))


def _identity(settings: SearchSettings) -> dict[str, Any]:
    """Settings without the number of trials: more of them continue the same study."""
    return {name: value for name, value in asdict(settings).items() if name != "trials"}


def _facts(space: Space) -> dict[str, Any]:
    return {
        "options": space.options,
        "groups": [(group.layers, group.options) for group in space.groups],
        "sinks": space.sinks,
        "costs": space.costs,
        "errors": [[[f"{error:.6e}" for error in row] for row in rows] for rows in space.errors],
    }


def _walker(space: Space, seeds: Sequence[Genes], budget: int, settings: SearchSettings) -> BaseSampler:
    from jettison.plugins.kvtuner.walk import Walk

    return Walk(space, seeds, budget, settings)
