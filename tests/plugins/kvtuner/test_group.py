import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jettison.hooks import ConfigError
from jettison.plugins.kvtuner.group import Group, groups, parse_how

OPTIONS = (0, 1, 2)


def planted(seed, levels, each=5, noise=0.03):
    """Errors [layers, 3] of `levels` clusters, shuffled, and the layers of each cluster."""
    random = np.random.default_rng(seed)
    member = random.permutation(np.repeat(np.arange(len(levels)), each))
    errors = np.array(levels)[member][:, None] * [1, 2, 4] * np.exp(random.normal(0, noise, (len(member), 3)))
    return errors, {tuple(np.flatnonzero(member == cluster).tolist()) for cluster in range(len(levels))}


def layers_of(found):
    return {group.layers for group in found}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a6_planted_clusters_are_recovered_at_any_scale(seed, scale):
    errors, expected = planted(seed, [0.01, 0.1, 1.0])
    found = groups([OPTIONS] * len(errors), (errors * scale).tolist())
    assert layers_of(found) == expected, f"seed {seed}, scale {scale:g}"


@pytest.mark.parametrize("seed", range(10))
def test_a6_a_target_gives_the_planted_clusters_too(seed):
    errors, expected = planted(seed, [1.0, 2.0, 4.0])
    assert layers_of(groups([OPTIONS] * len(errors), errors.tolist(), 3)) == expected, f"seed {seed}"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a6_every_layer_is_in_one_group_and_survivor_sets_are_never_mixed(data):
    count = data.draw(st.integers(1, 14))
    kept = data.draw(st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=count, max_size=count))
    errors = data.draw(st.lists(st.lists(st.floats(0, 1e9), min_size=4, max_size=4), min_size=count, max_size=count))
    kinds = data.draw(st.lists(st.sampled_from([-1, 64]), min_size=count, max_size=count))
    least = len({(frozenset(own), kind) for own, kind in zip(kept, kinds, strict=True)})
    how = data.draw(st.one_of(st.sampled_from(["auto", "singleton"]), st.integers(least, count)))
    found = groups([sorted(own) for own in kept], errors, how, kinds)
    assert sorted(layer for group in found for layer in group.layers) == list(range(count))
    for group in found:
        assert {frozenset(kept[layer]) for layer in group.layers} == {frozenset(group.options)}
        assert len({kinds[layer] for layer in group.layers}) == 1
    if isinstance(how, int):
        assert len(found) == how
    if how == "singleton":
        assert len(found) == count
    assert found == sorted(found, key=lambda group: group.layers)


def test_errors_that_grow_evenly_fall_back_to_six_groups():
    """Density chains 30 evenly spaced layers into one group, which would leave uniform tables only."""
    errors = np.linspace(1, 9, 30)[:, None] * [1, 2, 4]
    found = groups([OPTIONS] * 30, errors.tolist())
    assert len(found) == 6
    assert all(np.ptp(group.layers) == len(group.layers) - 1 for group in found), "groups of neighbours in error"


def test_layers_alike_within_noise_share_one_group():
    random = np.random.default_rng(0)
    errors = np.array([1.0, 2.0, 4.0]) * np.exp(random.normal(0, 0.01, (12, 3)))
    assert groups([OPTIONS] * 12, errors.tolist()) == [Group(tuple(range(12)), OPTIONS)]


def test_an_outlier_is_a_group_of_its_own():
    errors = np.array([[1.0, 2.0, 4.0]] * 6)
    errors[3] *= 50
    assert layers_of(groups([OPTIONS] * 6, errors.tolist())) == {(0, 1, 2, 4, 5), (3,)}


def test_the_shape_of_the_errors_separates_layers_of_equal_mean():
    """Layers whose 2-bit error is high and 8-bit error low differ from the reverse, though their means agree."""
    errors = [[1.0, 16.0], [1.0, 16.0], [4.0, 4.0], [4.0, 4.0]]
    assert layers_of(groups([(0, 1)] * 4, errors)) == {(0, 1), (2, 3)}


def test_dropped_options_do_not_separate_layers():
    errors = [[1.0, 1.0], [1.0, 500.0], [1.0, 1.0]]
    assert groups([(0,)] * 3, errors) == [Group((0, 1, 2), (0,))]


def test_the_same_input_gives_the_same_groups():
    errors = np.random.default_rng(5).lognormal(0, 1, (24, 3)).tolist()
    assert groups([OPTIONS] * 24, errors) == groups([OPTIONS] * 24, errors)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [(1, "1 groups are refused.*and 2"), (4, "4 groups are refused.*to 3"), ("six", "'six'"), (True, "True")],
)
def test_impossible_numbers_of_groups_are_refused(how, sentence):
    with pytest.raises(ConfigError, match=sentence):
        groups([(0,), (0,), (0, 1)], [[1.0, 2.0]] * 3, how)


@pytest.mark.parametrize(
    ("kept", "errors", "sentence"),
    [
        ([(0,)], [[1.0], [1.0]], "survivors of 1, errors of 2"),
        ([()], [[1.0]], r"layer 0 keeps the options \[\]"),
        ([(2,)], [[1.0, 1.0]], "layer 0 keeps"),
        ([(0,), (0,)], [[1.0], [float("nan")]], "the errors of layer 1"),
        ([(0,), (0,)], [[1.0], [1.0, 2.0]], "the errors of layer 1"),
    ],
)
def test_bad_input_is_refused(kept, errors, sentence):
    with pytest.raises(ConfigError, match=sentence):
        groups(kept, errors)


def test_the_flag_is_read():
    assert [parse_how(text) for text in ("auto", "singleton", "6")] == ["auto", "singleton", 6]
    for text in ("0", "-1", "many", "", "1.5", "²"):
        with pytest.raises(ConfigError, match="allowed are auto, singleton and a number"):
            parse_how(text)
