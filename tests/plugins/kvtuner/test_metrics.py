"""A3 and A4: the metrics by hand, against a float64 definition, and what they say about keys and values."""

import math

import pytest
import torch

from jettison.plugins.kvtuner.capture import Rule
from jettison.plugins.kvtuner.codecs import Native, PerChannel, PerToken, store
from jettison.plugins.kvtuner.metrics import (
    Disagreement,
    LayerMeter,
    disagreements,
    rank_correlation,
    relative_error,
    warning,
)
from jettison.plugins.kvtuner.stream import Seen

NAMES = {"16": Native(), "8": PerToken(8, False), "4": PerToken(4, False), "2": PerToken(2, False)}


class Replace:
    """Reads back a given tensor."""

    name, bits, page_bits = "replace", 1, None

    def __init__(self, stored):
        self.stored = stored

    def bytes_per_token(self, head_size):
        return head_size / 8

    def round_trip(self, x):
        return self.stored.expand_as(x)


def measured(seen, keys, values, **options):
    meter = LayerMeter(keys, values, **options)
    meter.add(seen)
    return meter.result()


def test_a3_metrics_by_hand():
    """One head, two tokens of two channels; the second query weighs both keys with 1/4 and 3/4.

    Scores of token 1 are 0 and ln 3: a = (1/4, 3/4). The stored key of token 1 is zero: a' = (1/2, 1/2).
    Values (4, 8) and (8, 0) give o_1 = (7, 2); stored values (4, 4) and (8, 0) with a' give o'_1 = (6, 2).
    """
    query = torch.tensor([[[[0.0, 0.0], [1.0, 0.0]]]])
    key = torch.tensor([[[[0.0, 1.0], [math.log(3), 2.0]]]])
    value = torch.tensor([[[[4.0, 8.0], [8.0, 0.0]]]])
    stored_key = torch.tensor([[[[0.0, 1.0], [0.0, 3.0]]]])
    stored_value = torch.tensor([[[[4.0, 4.0], [8.0, 0.0]]]])
    gradient = torch.tensor([[[[0.0, 1.0], [2.0, 1.0]]]])
    seen = Seen(query, key, value, Rule(1.0), gradient)
    found = measured(seen, [Native(), Replace(stored_key)], [Native(), Replace(stored_value)])
    # NOTES: |0 - 0| / |0| is 0 by the guard; the four key errors are 0, 0, 1, 1/2.
    assert found.key.tolist() == pytest.approx([0, (1 + 1 / 2) / 4], abs=1e-6)
    assert found.value.tolist() == pytest.approx([0, (4 / 8) / 4], abs=1e-6)
    assert found.attention.tolist() == pytest.approx([0, (0 + 1 / 4 + 1 / 4) / 3], abs=1e-6)
    # o_0 = (4, 8), o_1 = (7, 2). Values alone: o'_0 = (4, 4), o'_1 = (7, 1). Keys alone: o'_1 = (6, 4).
    output = [[0, (4 / 8 + 1 / 2) / 4], [(1 / 7 + 2 / 2) / 4, (4 / 8 + 1 / 7 + 0) / 4]]
    torch.testing.assert_close(found.output, torch.tensor(output).double(), rtol=0, atol=1e-6)
    norm = 16 + 64 + 49 + 4
    ratio = [[0, math.sqrt((16 + 1) / norm)], [math.sqrt((1 + 4) / norm), math.sqrt((16 + 1) / norm)]]
    torch.testing.assert_close(found.norm_ratio, torch.tensor(ratio).double(), rtol=0, atol=1e-6)
    # 1/2 (g.d)^2 per token: values alone -4 and -1; keys alone 0 and -2 + 2; both -4 and -2.
    kl = [[0, (16 + 1) / 4], [0, (16 + 4) / 4]]
    torch.testing.assert_close(found.kl, torch.tensor(kl).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [-1, 7, 290])
@pytest.mark.parametrize(("softcap", "sunk"), [(None, False), (5.0, False), (None, True)])
def test_a3_metrics_follow_their_definition_in_float64(window, softcap, sunk):
    """Grouped heads, several chunks of queries, windows, soft caps and sinks, against one dense float64 pass."""
    torch.manual_seed(window + 10)
    length, heads, kv_heads, size = 300, 4, 2, 32
    query, gradient = torch.randn(1, heads, length, size) * 2, torch.randn(1, heads, length, size)
    key, value = torch.randn(2, 1, kv_heads, length, size).unbind(0)
    value = value + 8  # away from zero, where e_o amplifies the rounding of float32
    sinks = torch.randn(heads) if sunk else None
    codec = PerToken(2, False)
    rule = Rule(size**-0.5, window, softcap, sinks)
    found = measured(Seen(query, key, value, rule, gradient), [Native(), codec], [Native(), codec])

    def dense(key):
        scores = query[0].double() @ key[0].double().repeat_interleave(2, 0).transpose(-1, -2) * rule.scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & ((distance < window) | (window < 0))
        weights = scores.masked_fill(~seen, -torch.inf).exp()
        extra = 0 if sinks is None else sinks.double().exp()[:, None, None]
        return weights / (weights.sum(-1, keepdim=True) + extra), seen

    stored_key, stored_value = store(codec, key), store(codec, value)
    (exact, seen), (changed, _) = dense(key), dense(stored_key)
    attention = ((exact - changed).abs().sum() / (heads * seen.sum())).item()
    assert found.attention[1].item() == pytest.approx(attention, rel=1e-4)
    output = exact @ value[0].double().repeat_interleave(2, 0)
    for i, weights in enumerate((exact, changed)):
        for j, stored in enumerate((value, stored_value)):
            change = weights @ stored[0].double().repeat_interleave(2, 0) - output
            case = f"key {i}, value {j}, window {window}, softcap {softcap}, sinks {sunk}"
            expected = (change.abs() / output.abs().clamp_min(1e-8)).mean().item()
            assert found.output[i, j].item() == pytest.approx(expected, rel=1e-4, abs=1e-9), case
            ratio = (change.square().sum((1, 2)) / output.square().sum((1, 2))).sqrt().mean().item()
            assert found.norm_ratio[i, j].item() == pytest.approx(ratio, rel=1e-4, abs=1e-9), case
            kl = (0.5 * (gradient[0].double() * change).sum((0, 2)).square()).mean().item()
            assert found.kl[i, j].item() == pytest.approx(kl, rel=1e-3, abs=1e-9), case


def test_a3_the_identity_costs_nothing():
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 90, 32), torch.randn(1, 2, 90, 32), torch.randn(1, 2, 90, 32)
    seen = Seen(query, key, value, Rule(0.2), torch.randn(1, 4, 90, 32))
    same = type("Same", (Replace,), {"round_trip": lambda _, x: x.clone()})(None)
    for codec in (Native(), same):
        found = measured(seen, [codec], [codec])
        for name in ("key", "value", "attention", "output", "norm_ratio", "kl"):
            assert getattr(found, name).abs().max() == 0, f"{type(codec).__name__}: {name}"


def test_texts_are_weighted_by_their_tokens():
    """Two texts added one after the other are the mean over all their tokens."""
    torch.manual_seed(1)
    parts = [Seen(*torch.randn(3, 1, 2, length, 32).unbind(0), Rule(0.2), None) for length in (40, 120)]
    both = LayerMeter([NAMES["2"]], [NAMES["2"]])
    for part in parts:
        both.add(part)
    single = [measured(part, [NAMES["2"]], [NAMES["2"]]) for part in parts]
    for name in ("key", "value", "output"):
        expected = sum(getattr(own, name) * weight for own, weight in zip(single, (40, 120), strict=True)) / 160
        torch.testing.assert_close(getattr(both.result(), name), expected, msg=lambda m, n=name: f"{n}: {m}")


def test_a4_an_outlier_channel_hurts_per_token_keys_and_makes_keys_the_dearer_side():
    """One key channel times 50: per-token scales drown the others, per-channel ones do not; K8V4 beats K4V8."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 128, 64).unbind(0)
    key[..., 11] *= 50
    query[..., 11] *= 0.02
    seen = Seen(query, key, value, Rule(64**-0.5))
    found = measured(seen, [PerToken(4, False), PerChannel(4), PerToken(8, False)], [NAMES["4"], NAMES["8"]])
    per_token, per_channel, _ = found.attention.tolist()
    assert per_token > 5 * per_channel, f"per token {per_token}, per channel {per_channel}"
    k4v8, k8v4 = found.output[0, 1].item(), found.output[2, 0].item()
    assert k8v4 < k4v8, f"K8V4 {k8v4}, K4V8 {k4v8}"
    assert found.norm_ratio[2, 0] < found.norm_ratio[0, 1]


def test_a4_flat_attention_over_outlier_values_makes_values_the_dearer_side():
    """Queries that hardly look and a value channel times 50: K4V8 beats K8V4, so no key priority is built in."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 128, 64).unbind(0)
    query *= 0.01
    value[..., 11] *= 50
    found = measured(Seen(query, key, value, Rule(64**-0.5)), [NAMES["4"], NAMES["8"]], [NAMES["4"], NAMES["8"]])
    k4v8, k8v4 = found.output[0, 1].item(), found.output[1, 0].item()
    assert k4v8 < k8v4, f"K4V8 {k4v8}, K8V4 {k8v4}"
    assert found.norm_ratio[0, 1] < found.norm_ratio[1, 0]


def test_relative_error_is_guarded():
    assert relative_error(torch.zeros(3), torch.zeros(3)).sum() == 0
    assert relative_error(torch.tensor([2.0, -4.0]), torch.tensor([1.0, -3.0])).tolist() == [0.5, 0.25]
    assert relative_error(torch.zeros(1), torch.tensor([1e-8])).item() == pytest.approx(1)


def test_rank_correlation_by_hand():
    """1 - 6 sum d^2 / (n (n^2 - 1)): one swap of neighbours in four leaves 0.8."""
    assert rank_correlation([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1], [2, 2]) == 1
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def test_rankings_that_disagree_are_named():
    agree = [0.1, 0.2, 0.3, 0.4, 0.5]
    output, ratio = torch.tensor([agree, agree]).T, torch.tensor([agree, agree[::-1]]).T
    (found,) = disagreements(output, ratio, ["int4/int4", "int2/int2"])
    assert found.option == "int2/int2"
    assert found.correlation == pytest.approx(-1)
    assert "differently at int2/int2 (Spearman -1.00 at int2/int2)" in warning([found])
    several = [Disagreement(name, value) for name, value in zip("abcde", (0.5, 0.1, 0.7, 0.2, 0.3), strict=True)]
    assert "at a, b, c and 2 more (Spearman 0.10 at b)" in warning(several)
    assert warning([]) is None
    assert disagreements(output[:3], ratio[:3], ["a", "b"]) == []


def test_an_output_near_zero_makes_the_two_metrics_disagree():
    """The reason for e_o': one element of 1e-7 among 64 makes e_o of a harmless layer the largest of all."""
    torch.manual_seed(0)
    rows = []
    for layer in range(5):
        query, key, value = torch.randn(3, 1, 1, 64, 64).unbind(0)
        key, query = key * 0, query * 0
        if layer == 0:
            value += torch.tensor([-4.0, 4.0]).repeat(32)
            value[..., 0] = 1e-7
        rows.append(measured(Seen(query, key, value, Rule(1.0)), [Native()], [PerToken((8, 8, 4, 4, 2)[layer], False)]))
    output, ratio = (torch.stack([getattr(row, name).flatten() for row in rows]) for name in ("output", "norm_ratio"))
    assert output[0] == output.max()
    assert ratio[0] == ratio.min()
    assert len(disagreements(output, ratio, ["16/x"])) == 1
