"""Drift between two domains: by hand on planted sensitivities, and on a real tiny model."""

from dataclasses import replace

import pytest
import torch

from jettison.hooks import ConfigError, InputRefused, KVFormat
from jettison.plugins.kvtuner.drift import METRICS, SHOWN, drift
from jettison.plugins.kvtuner.metrics import rank_correlation
from jettison.plugins.kvtuner.sensitivity import PAIRS, measure
from kvtuner_families import tiny


def texts(seeds, low=3, high=128, length=160):
    return [torch.randint(low, high, (length,), generator=torch.Generator().manual_seed(seed)) for seed in seeds]


@pytest.fixture(scope="module")
def graded():
    """Four layers whose outputs count 1, 0.3, 0.1 and 0.03: their ranking cannot hang on the text."""
    model = tiny("llama", initializer_range=0.12)
    with torch.no_grad():
        for layer, factor in zip(model.model.layers, (1.0, 0.3, 0.1, 0.03), strict=True):
            layer.self_attn.o_proj.weight.mul_(factor)
    return model


def test_one_kind_of_text_twice_does_not_drift(graded):
    domains = {"a": texts((0, 1)), "b": texts((2, 3))}
    found = drift(graded, domains, held_out={"a": texts((4,)), "b": texts((5,))}, real_bits=5.5, name="tiny")
    assert [(ranking.metric, ranking.pair) for ranking in found.rankings] == [
        (metric, f"k{key}v{value}") for metric in METRICS for key, value in SHOWN
    ]
    for ranking in found.rankings:
        if ranking.metric == "KL":
            assert ranking.within == ranking.across == pytest.approx(1), ranking
    assert len(found.transfers) == 8, "four tables on two domains"
    assert found.real_bits <= 5.5
    assert found.penalty < 1.25, found.transfers
    assert "same on a and b: 6 of 6 by KL" in found.sentence


def test_drift_by_hand(graded):
    """Planted losses: domain a ranks layers 0 1 2 3 (one half swaps two neighbours), domain b the other way round."""
    template = measure(graded, texts((0,), length=64), gradients=False)
    orders = {"a0": [1, 2, 3, 4], "a1": [1, 3, 2, 4], "b0": [4, 3, 2, 1], "b1": [4, 3, 2, 1]}
    domains = {"a": texts((0, 1)), "b": texts((2, 3))}
    planted = {
        domains[name[0]][int(name[1])].sum().item(): replace(
            template, kl=(torch.tensor(order).double()[:, None] * (1 - torch.eye(16)[0])), tokens=1
        )
        for name, order in orders.items()
    }

    def measuring(_model, halves, **_):
        (ids,) = halves
        return planted[ids.sum().item()]

    held_out = {"a": texts((4,)), "b": texts((5,))}
    found = drift(graded, domains, held_out=held_out, measuring=measuring, real_bits=5.5)
    first = found.rankings[0]
    assert first.metric == "KL"
    assert first.within == pytest.approx((rank_correlation(orders["a0"], orders["a1"]) + 1) / 2) == 0.9
    assert first.across == pytest.approx((-1 - 1 - 0.8 - 0.8) / 4)
    assert first.drifts
    assert "0 of 6 by KL, 6 of 6 by e_o" in found.sentence
    assert "-0.90 across, 0.90 within" in found.sentence
    assert found.losses[0] == (1, 2.5, 2.5, 4)
    assert found.losses[1] == (4, 3, 2, 1)


def test_the_penalty_is_the_other_domains_tables_over_the_own_ones(graded):
    domains, held_out = {"a": texts((0, 1)), "b": texts((2, 3))}, {"a": texts((4,)), "b": texts((5,))}
    found = drift(graded, domains, held_out=held_out, real_bits=5.5)
    runs = {(run.table, run.half, run.domain): run.kl for run in found.transfers}
    on_a = (runs["b", 0, "a"] + runs["b", 1, "a"]) / (runs["a", 0, "a"] + runs["a", 1, "a"])
    on_b = (runs["a", 0, "b"] + runs["a", 1, "b"]) / (runs["b", 0, "b"] + runs["b", 1, "b"])
    assert found.penalty == pytest.approx(max(on_a, on_b))
    costly = replace(found, transfers=tuple(
        replace(run, kl=run.kl * (2 if run.table != run.domain else 1)) for run in found.transfers
    ))  # fmt: skip
    assert "Calibrate with text of every domain" in costly.recommendation


def test_given_tables_are_run_instead(graded):
    domains, held_out = {"a": texts((0, 1)), "b": texts((2, 3))}, {"a": texts((4,)), "b": texts((5,))}
    tables = {"exact": [KVFormat(16, 16)] * 4, "k2v2": [KVFormat(2, 2)] * 4}
    found = drift(graded, domains, held_out=held_out, tables=tables)
    assert found.penalty is None
    assert found.real_bits is None
    kl = {(run.table, run.domain): run.kl for run in found.transfers}
    assert set(kl) == {(table, domain) for table in tables for domain in domains}
    for domain in domains:
        assert abs(kl["exact", domain]) < 1e-6
        assert kl["k2v2", domain] > 1e-3
    assert found.as_json()["penalty"] is None


@pytest.mark.parametrize(
    ("domains", "held_out", "sentence"),
    [
        ({}, {}, "no domains"),
        ({"a": texts((0, 1))}, {"a": texts((2,))}, "a with 2 texts; drift is measured between two domains"),
        ({"a": texts((0, 1)), "b": texts((0,))}, {"a": texts((2,))}, "b with 1 texts"),
        ({"a": texts((0, 1)), "b": texts((0, 1))}, {"a": texts((2,))}, "a domain has no held-out text"),
    ],
)
def test_domains_that_cannot_be_compared_are_refused(graded, domains, held_out, sentence):
    with pytest.raises(InputRefused, match=sentence):
        drift(graded, domains, held_out=held_out)


def test_a_budget_below_the_smallest_table_is_refused(graded):
    domains = {"a": texts((0, 1), length=64), "b": texts((2, 3), length=64)}
    with pytest.raises(ConfigError, match=r"1 real bits are too few; the smallest table of this model takes 3\.125"):
        drift(graded, domains, held_out=domains, real_bits=1.0)


def test_the_smallest_table_is_k2v2():
    assert PAIRS[-1] == (2, 2)
