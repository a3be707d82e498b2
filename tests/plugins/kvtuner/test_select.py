import itertools
import random

import pytest

from jettison.hooks import ConfigError
from jettison.plugins.kvtuner.select import choose


@pytest.mark.parametrize("seed", range(60))
def test_the_optimum_is_found(seed):
    rng = random.Random(seed)
    layers, options = rng.randint(1, 5), rng.randint(1, 5)
    unit = rng.choice((1, 4, 12))
    errors = [[rng.choice((0.0, rng.random(), 1e-9)) for _ in range(options)] for _ in range(layers)]
    costs = [[unit * rng.randint(0, 30) for _ in range(options)] for _ in range(layers)]
    budget = rng.randint(sum(map(min, costs)), sum(map(max, costs)) + 5)
    best = min(
        sum(errors[n][i] for n, i in enumerate(pick))
        for pick in itertools.product(range(options), repeat=layers)
        if sum(costs[n][i] for n, i in enumerate(pick)) <= budget
    )
    found = choose(errors, costs, budget)
    assert sum(costs[n][i] for n, i in enumerate(found)) <= budget, f"seed {seed}: over the budget {budget}"
    assert sum(errors[n][i] for n, i in enumerate(found)) == pytest.approx(best, abs=1e-12), f"seed {seed}"


def test_of_equal_errors_the_cheaper_is_taken():
    assert choose([[0.0, 0.0, 1.0]], [[9, 3, 1]], 9) == [1]


def test_an_impossible_budget_is_refused():
    with pytest.raises(ConfigError, match="budget of 19 bytes is too small; the smallest cache takes 20"):
        choose([[0.0, 1.0]] * 2, [[30, 10]] * 2, 19)


def test_many_layers_take_no_time():
    rng = random.Random(0)
    errors = [sorted(rng.random() for _ in range(16)) for _ in range(80)]
    costs = [[8 * (40 + 12 * (16 - n)) for n in range(16)] for _ in range(80)]
    assert len(choose(errors, costs, 80 * 8 * 100)) == 80
