"""The detector on real tiny models: planted outlier keys collapse the plain codec, and the verdict says so."""

import math
from dataclasses import replace

import pytest
import torch

from jettison.plugins.kvtuner import detector
from jettison.plugins.kvtuner.detector import Run, Verdict, check, level, to_blame
from jettison.plugins.kvtuner.quality import log_probabilities
from jettison.plugins.kvtuner.sensitivity import PAIRS, measure
from kvtuner_families import tiny

CHANNELS = (3, 19)
"""One RoPE pair of 32 channels: scaling both, and the queries' inversely, leaves the model's function alone."""


def texts(seeds, length=256):
    return [torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def planted(layers, factor=80.0):
    model = tiny("llama", initializer_range=0.12)
    with torch.no_grad():
        for layer in layers:
            attention = model.model.layers[layer].self_attn
            attention.k_proj.weight.unflatten(0, (2, 32))[:, CHANNELS] *= factor
            attention.q_proj.weight.unflatten(0, (4, 32))[:, CHANNELS] /= factor
    return model


def verdict_of(model):
    return check(model, texts((2, 3)), measure(model, texts((0, 1))), name="tiny")


def test_the_planted_model_computes_the_same():
    ids = texts((0,))[0]
    torch.testing.assert_close(
        log_probabilities(planted(range(4)), ids), log_probabilities(planted(()), ids), rtol=1e-3, atol=1e-3
    )


def test_outlier_keys_collapse_uniform_4_bits_and_the_measured_codec_repairs_them():
    sound, broken = verdict_of(planted(())), verdict_of(planted(range(4)))
    assert sound.run("k4v4", "plain").level == "bears", sound.runs
    assert sound.sentence.startswith("tiny bears uniform 4-bit keys and values: perplexity times 1.0")
    assert "Any 4-bit cache will do" in sound.recommendation
    assert broken.run("k4v4", "plain").level == "collapses with", broken.runs
    assert broken.run("k8v4", "plain").level == "bears", "it is the keys"
    assert broken.run("k4v4", "measured").level == "bears", "rotation and equalisation repair outlier channels"
    assert broken.sentence.startswith("tiny collapses with uniform 4-bit keys and values")
    assert broken.sentence.endswith("which it bears.")
    assert "with rotation and key statistics only: jettison kvtuner search MODEL --bits 5" in broken.recommendation
    assert [run.pair for run in broken.runs if run.codec == "plain"] == ["k8v8", "k8v4", "k4v8", "k4v4"]


@pytest.mark.parametrize("fragile", [0, 3])
def test_the_layer_to_blame_is_named_and_its_8_bit_keys_rescue_the_model(fragile):
    """One layer's queries look 60 times as hard at its keys, and the others count less: no rotation helps."""
    model = tiny("llama", initializer_range=0.12)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.q_proj.weight.mul_(60 if number == fragile else 1)
            layer.self_attn.o_proj.weight.mul_(2 if number == fragile else 0.02)
    verdict = verdict_of(model)
    assert verdict.culprits == (fragile,), verdict
    assert verdict.share > 0.5
    ours, rescued = verdict.run("k4v4", "measured"), verdict.run("k4v4+", "measured")
    assert ours.level != "bears", verdict.runs
    assert rescued.kl < 0.5 * ours.kl, verdict.runs
    assert f"layer {fragile} holds" in verdict.recommendation


@pytest.mark.parametrize(
    ("kl", "name"),
    [
        (0.0, "bears"),
        (math.log(1.05) - 1e-9, "bears"),
        (math.log(1.05), "suffers from"),
        (math.log(1.5) - 1e-9, "suffers from"),
        (math.log(1.5), "collapses with"),
        (50.0, "collapses with"),
        (math.inf, "collapses with"),
        (math.nan, "collapses with"),
    ],
)
def test_levels_are_factors_of_perplexity(kl, name):
    assert level(kl) == name


def test_a_model_that_returns_nan_has_collapsed():
    """A cache whose rows are NaN must not pass as harmless."""
    model = planted(())
    measured = measure(model, texts((0, 1)))
    broken = replace(measured, key_center=torch.full_like(measured.key_center, 60000.0))
    verdict = check(model, texts((2,)), broken, name="tiny")
    assert verdict.run("k4v4", "measured").level == "collapses with"
    assert verdict.run("k4v4", "measured").growth >= 1.5


def test_the_layers_to_blame_are_the_fewest_that_hold_half():
    measured = measure(tiny("llama"), texts((0,), 64), gradients=False)

    def with_losses(losses):
        kl = torch.zeros_like(measured.kl)
        kl[:, PAIRS.index((4, 16))] = torch.tensor(losses).double()
        return to_blame(replace(measured, kl=kl))

    assert with_losses([1.0, 6.0, 2.0, 1.0]) == ((1,), 0.6)
    assert with_losses([3.0, 1.0, 3.0, 3.0]) == ((0, 2), 0.6)
    assert with_losses([0.0, 0.0, 0.0, 0.0]) == ((), 0.0)


def verdict(plain, ours, *, k8v4=0.0, k4v8=1.0, rescued=None):
    kl = {("k8v4", "measured"): k8v4, ("k4v8", "measured"): k4v8, ("k4v4", "plain"): plain, ("k4v4", "measured"): ours}
    runs = [Run(pair, codec, value, 0.0, 1.0) for (pair, codec), value in kl.items()]
    if rescued is not None:
        runs.append(Run("k4v4+", "measured", rescued, 0.0, 1.0))
    return Verdict("m", 1, tuple(runs), (0, 27), 0.8, 4.25)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (verdict(0.01, 0.01), "--bits 3.25"),
        (verdict(3.0, 0.01), "with rotation and key statistics only: jettison kvtuner search MODEL --bits 4.25"),
        (verdict(3.0, 3.0, rescued=0.01), "layers 0, 27 hold 80% .* grows by 1.0% only: use a searched table"),
        (verdict(3.0, 3.0, rescued=1.0), "Serve --with kvtuner=k8v4, .* never a uniform 4-bit key cache"),
        (verdict(3.0, 3.0, k8v4=1.0, rescued=1.0), "k8v8 or the 16-bit cache"),
        (verdict(3.0, 3.0, k8v4=2.0, k4v8=0.1, rescued=1.0), "Values are to blame"),
    ],
)
def test_every_verdict_has_its_recommendation(found, sentence):
    import re

    assert re.search(sentence, found.recommendation), found.recommendation


def test_the_verdict_is_plain_json():
    import json

    content = json.loads(json.dumps(verdict(3.0, 0.01).as_json()))
    assert content["runs"][2]["level"] == "collapses with"
    assert content["runs"][2]["perplexity_factor"] == pytest.approx(math.exp(3))
    assert {"sentence", "recommendation", "culprits", "share"} <= set(content)
    assert detector.UNIFORM[-1] == (4, 4), "check reads the last run"
