import itertools
import math

import pytest
import torch

from jettison.csrc.layout import PageLayout
from jettison.hooks import ConfigError
from jettison.plugins.kvtuner.prune import prune, survivors


def dominated(option, errors, costs):
    mine = errors[option], costs[option]
    return any(
        error <= mine[0] and cost <= mine[1] and (error, cost) != mine
        for error, cost in zip(errors, costs, strict=True)
    )


@pytest.mark.parametrize("seed", range(200))
def test_a5_pareto_keeps_exactly_the_undominated(seed):
    """Brute force over the nine pairs of the paper, with ties in either coordinate and in both."""
    generator = torch.Generator().manual_seed(seed)
    pairs = list(itertools.product((8, 4, 2), repeat=2))
    costs = [PageLayout(64, *pair).bytes_per_token(16) for pair in pairs]
    errors = torch.randint(0, 6, (9,), generator=generator).div(4).tolist()
    expected = [option for option in range(9) if not dominated(option, errors, costs)]
    assert survivors(errors, costs) == expected, f"seed {seed}: errors {errors}, costs {costs}"


def test_a5_no_key_priority_is_built_in():
    """Mirrored errors give mirrored survivors: whether K8V4 or K4V8 stays is for the errors to say (section 3.3)."""
    pairs = list(itertools.product((8, 4, 2), repeat=2))
    costs = [PageLayout(128, *pair).bytes_per_token(16) for pair in pairs]
    hard, easy = {8: 0.1, 4: 1.0, 2: 4.0}, {8: 0.01, 4: 0.1, 2: 0.4}
    keys_matter = [pairs[n] for n in survivors([hard[k] + easy[v] for k, v in pairs], costs)]
    values_matter = [pairs[n] for n in survivors([easy[k] + hard[v] for k, v in pairs], costs)]
    assert (8, 4) in keys_matter
    assert (4, 8) not in keys_matter
    assert sorted(values_matter) == sorted((v, k) for k, v in keys_matter)


def test_the_cost_is_what_the_cache_pays():
    """A dearer option of equal error goes, however few its nominal bits."""
    assert survivors([1.0, 1.0, 0.5], [48, 40, 60]) == [1, 2]


def test_every_layer_is_pruned_alone():
    assert prune([[1.0, 2.0], [2.0, 1.0]], [[1, 2], [1, 2]]) == [[0], [0, 1]]


@pytest.mark.parametrize(
    ("errors", "costs", "sentence"),
    [
        ([], [], "0 errors"),
        ([1.0], [1, 2], "1 errors and 2 costs"),
        ([math.nan, 1.0], [1, 2], "the error of option 0 is nan"),
        ([1.0, -1.0], [1, 2], "the error of option 1 is -1"),
        ([1.0, 1.0], [1, math.inf], "the cost of option 1 is inf"),
    ],
)
def test_bad_numbers_are_refused(errors, costs, sentence):
    with pytest.raises(ConfigError, match=sentence):
        survivors(errors, costs)
    with pytest.raises(ConfigError, match=f"layer 1: {sentence}"):
        prune([[1.0], errors], [[1], costs])
