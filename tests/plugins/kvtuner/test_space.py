import itertools
import random

import numpy as np
import pytest

from jettison.csrc.layout import PageLayout
from jettison.hooks import ConfigError
from jettison.plugins.kvtuner.group import Group
from jettison.plugins.kvtuner.search import Found, pareto
from jettison.plugins.kvtuner.space import Candidate, Space
from jettison.plugins.kvtuner.surrogate import thompson
from search_samples import COSTS, OPTIONS, additive_space, quality


def test_pareto_by_hand():
    space = additive_space(0, groups=1)

    def one(cost, kl):
        return Found(Candidate(((8, 8),), 0), cost, quality(kl), "x")

    rows = [one(5, 1.0), one(4, 2.0), one(4, 1.5), one(6, 1.0), one(7, 0.5), one(3, 9.0), one(8, 0.5)]
    assert [(f.cost, f.quality.mean_kl) for f in pareto(rows)] == [(3, 9.0), (4, 1.5), (5, 1.0), (7, 0.5)]
    assert space.least == 40


@pytest.mark.parametrize("seed", range(20))
def test_repair_fits_and_never_adds_bytes(seed):
    rng = random.Random(seed)
    space = additive_space(seed, groups=rng.randint(1, 6), sinks=(0, 1))
    genes = tuple(rng.randrange(size) for size in space.sizes)
    cost = space.cost(space.candidate(genes))
    budget = rng.randint(space.least, 136 * 6)
    found = space.repair(genes, budget)
    assert space.cost(space.candidate(found)) <= budget
    assert cost > budget or found == genes, f"seed {seed}: what fits is left alone"


def test_groups_share_one_choice_and_must_be_complete():
    errors = (tuple((0.1 * layer + 0.1, 0.2) for layer in range(4)),)
    options, costs = ((8, 8), (4, 4)), ((136, 72),)
    space = Space(options, (Group((0, 2), (0, 1)), Group((1,), (1,)), Group((3,), (0, 1))), (0,), errors, costs)
    assert space.sizes == (2, 1, 2, 1)
    candidate = space.candidate((1, 0, 0, 0))
    assert candidate.pairs == ((8, 8), (4, 4), (8, 8), (4, 4)), "cheapest option first"
    assert space.cost(candidate) == 2 * 136 + 2 * 72
    assert space.predicted(candidate) == pytest.approx(0.1 + 0.2 + 0.3 + 0.2)
    with pytest.raises(ConfigError, match="every layer must be in exactly one group"):
        Space(options, (Group((0, 2), (0, 1)), Group((2,), (1,))), (0,), errors, costs)


def test_costs_of_the_samples_are_those_of_pages():
    assert tuple(PageLayout(64, *pair).bytes_per_token(128) for pair in OPTIONS) == COSTS


@pytest.mark.parametrize("seed", range(10))
def test_genes_and_candidates_are_one_to_one(seed):
    rng = random.Random(seed)
    space = additive_space(seed, groups=4, sinks=(0, 1))
    genes = tuple(rng.randrange(size) for size in space.sizes)
    assert space.genes(space.candidate(genes)) == genes
    assert space.genes(Candidate(((16, 16),) * 4, 0)) is None
    assert space.genes(Candidate(((8, 8),) * 4, 7)) is None


@pytest.mark.parametrize("seed", range(5))
def test_the_programme_solves_corrected_errors(seed):
    """Against every point of the space."""
    rng = np.random.default_rng(seed)
    space = additive_space(seed, groups=4)
    factors = [np.exp(rng.normal(size=len(OPTIONS))) for _ in range(4)]
    budget = 64 * 4
    best = min(
        sum(
            error * factors[g][gene] for g, (error, gene) in enumerate(zip(space.errors_of(genes), genes, strict=False))
        )
        for genes in itertools.product(*map(range, space.sizes))
        if space.cost(space.candidate(genes)) <= budget
    )
    error, genes = space.solve(budget, 0, factors)
    assert error == pytest.approx(best, rel=1e-12)
    assert space.cost(space.candidate(genes)) <= budget
    assert space.solve(159, 0, factors) is None


def test_measurements_correct_the_predictions():
    """One option of one group is ten times as bad as predicted: draws learn to avoid it, and only it."""
    space = additive_space(1, groups=4)
    rng = np.random.default_rng(0)
    budget = 72 * 4
    bad = space.front(budget, 0)[-1][1]
    group = max(range(4), key=lambda g: space.errors_of(bad)[g])

    def measured(genes):
        errors = space.errors_of(genes)
        return sum(errors) + 9 * errors[group] * (genes[group] == bad[group])

    assert thompson(space, [], budget, rng) is None
    tried = [tuple(int(rng.integers(size)) for size in space.sizes) for _ in range(60)]
    draws = [thompson(space, [(genes, measured(genes)) for genes in tried], budget, rng) for _ in range(20)]
    assert all(space.cost(space.candidate(genes)) <= budget for genes in draws)
    assert sum(genes[group] == bad[group] for genes in draws) <= 2, "the choice that measured badly"
    plain = [thompson(space, [(genes, sum(space.errors_of(genes))) for genes in tried], budget, rng) for _ in range(20)]
    assert sum(genes[group] == bad[group] for genes in plain) >= 10, "the same choice where it measured as predicted"
