"""The canary: holds for the model and formats that it was made of, fails for others."""

import json

import pytest
import torch

from jettison.hooks.cli import main
from jettison.hooks.errors import ConfigError, EnvironmentRefused, InputRefused
from jettison.hooks.quality import compare
from jettison.plugins.kvtuner.artefact import Canary
from jettison.plugins.kvtuner.canary import ABSOLUTE, LIKELIHOOD, RELATIVE, Verdict, record, tolerance, verify
from jettison.plugins.kvtuner.engine_canary import verdict as engine_verdict
from jettison.plugins.kvtuner.hf_cache import PackedCache
from jettison.plugins.kvtuner.table import parse_table, seal
from kvtuner_samples import content, tiny_model

IDS = torch.randint(0, 128, (160,), generator=torch.Generator().manual_seed(4)).tolist()


def measured(model, table):
    """Mean KL of the sample by another route: the real packed cache, fed at once."""
    ids = torch.tensor([IDS])
    with torch.no_grad():
        exact = model(ids).logits[0]
        stored = model(ids, past_key_values=PackedCache.from_table(table, model.config)).logits[0]
    return compare(exact, stored)[0].mean().item()


def table_with_canary(kl=None, nll=None):
    base = {key: value for key, value in content(2).items() if key != "payload_sha256"}
    found = measured(tiny_model(), seal(base)) if kl is None else kl
    return seal({**base, "canary": Canary.of(IDS, found, 0.01, nll)})


def likelihood(model):
    """Nats per token of the sample, by the model's own loss."""
    ids = torch.tensor([IDS])
    with torch.no_grad():
        return model(ids, labels=ids).loss.item()


def test_it_holds_for_what_it_was_made_of():
    table = table_with_canary(nll=likelihood(tiny_model()))
    verdict = verify(table, tiny_model())
    assert verdict.holds, verdict
    assert verdict.tokens == len(IDS)
    assert verdict.found_kl > 0
    assert 0 < verdict.top1_agreement < 1
    verdict.check(table)


def test_what_is_recorded_is_what_is_found():
    table, model = table_with_canary(0.0), tiny_model()
    canary = record(model, IDS, [table.format(layer) for layer in range(2)])
    assert canary.ids == IDS
    assert canary.kl == pytest.approx(measured(model, table), rel=RELATIVE / 5), "a fifth of what may differ"
    assert canary.nll == pytest.approx(likelihood(model), rel=1e-5)
    assert canary.standard_error > 0


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [{"layer": n, "key_bits": 8, "value_bits": 4} for n in range(2)]},
        {"key_scale": None},
        {"rotate": False},
        {"sink_tokens": 16},
    ],
    ids=["bits", "scale", "rotation", "sinks"],
)
def test_it_fails_for_another_format(change):
    base = _parts(table_with_canary())
    table = seal({**base, "payload": {**base["payload"], **change}})
    verdict = verify(table, tiny_model())
    assert not verdict.holds, verdict
    with pytest.raises(InputRefused, match=r"the canary of the table of 'tiny' has a KL of .* nats here, .* when"):
        verdict.check(table)


def test_it_fails_for_other_weights():
    """Keys half as large again hardly move the KL; the likelihood of the sample tells."""
    table, model = table_with_canary(nll=likelihood(tiny_model())), tiny_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    verdict = verify(table, model)
    assert not verdict.same_model, verdict
    assert not verdict.holds
    with pytest.raises(InputRefused, match=r"the model finds the canary .* nats per token, the one it was made on at"):
        verdict.check(table)


def _parts(table):
    return {key: value for key, value in table.content().items() if key not in ("payload_sha256", "sizes")}


def verdict(stored, found, nll=None):
    return Verdict(stored, found, tolerance(stored), nll, 3.0, 1.0, 1)


def test_the_tolerances_are_the_stated_ones():
    assert (RELATIVE, ABSOLUTE, LIKELIHOOD) == (0.05, 1e-5, 0.01)
    assert tolerance(0.02) == pytest.approx(0.00101)
    assert verdict(0.02, 0.02100).holds
    assert not verdict(0.02, 0.02102).holds
    assert not verdict(0.02, 0.01898).holds, "a KL that is too good is another table's"
    assert verdict(0.0, 1e-5).holds
    assert verdict(0.02, 0.02, 3.009).holds
    assert not verdict(0.02, 0.02, 3.011).holds
    assert not verdict(0.02, 0.02, 2.989).holds


def test_other_models_are_refused_before_they_run():
    table = table_with_canary(0.5)
    with pytest.raises(ConfigError, match="is for 2 layers, 2 KV heads and head size 32, but the model has 3"):
        verify(table, tiny_model(num_hidden_layers=3))
    with pytest.raises(InputRefused, match=r"has token 1\d\d, the model knows 64"):
        verify(table, tiny_model(vocab_size=64))
    with pytest.raises(ConfigError, match="load it in float32"):
        verify(table, tiny_model().bfloat16())
    with pytest.raises(InputRefused, match="the table of 'tiny' has no canary; make the table with jettison kvtuner"):
        verify(parse_table(content(2)), tiny_model())


def test_the_command(tmp_path, capsys):
    import transformers

    folder, path = tmp_path / "model", tmp_path / "table.json"
    tiny_model().save_pretrained(folder)
    words = {f"w{n}": n for n in range(128)}
    from tokenizers import Tokenizer, models

    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))
    ).save_pretrained(folder)
    table = table_with_canary()
    table.save(path)
    assert main(["kvtuner", "verify", str(path), str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["holds"] is True
    assert facts["stored_kl"] == table.canary.kl
    table_with_canary(table.canary.kl * 1.5).save(path)
    assert main(["kvtuner", "verify", str(path), str(folder)]) == 4
    assert "when it was made" in capsys.readouterr().err
    parse_table(content(2)).save(path)
    assert main(["kvtuner", "verify", str(path), str(tmp_path / "absent")]) == 4
    assert "has no canary" in capsys.readouterr().err


def test_what_an_engine_is_compared_with_is_what_the_model_gave():
    """Places, log-probabilities and effect, against transformers and the real packed cache."""
    table, model = table_with_canary(0.0), tiny_model()
    canary = record(model, IDS, [table.format(layer) for layer in range(2)])
    ids = torch.tensor([IDS])
    with torch.no_grad():
        exact, stored = (
            model(ids, past_key_values=cache).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            for cache in (None, PackedCache.from_table(table, model.config))
        )
    assert list(canary.places) == list(range(1, 160))
    assert canary.exact == pytest.approx(exact.tolist(), rel=2**-10, abs=1e-4)
    assert canary.effect == pytest.approx((exact - stored).abs().mean().item(), rel=RELATIVE / 5)


def test_an_engine_is_judged_by_hand_computed_numbers():
    rows = [-1.0, -2.0, -3.0, -4.0], [-1.5, -2.0, -3.0, -4.5]
    canary = Canary.of([7, 8, 9, 10, 11], 0.1, 0.01, rows=rows)
    assert (canary.exact, canary.effect) == (rows[0], 0.25)
    near = engine_verdict(canary, [None, -1.25, -1.75, -3.25, -4.25])
    assert (near.found, near.limit, near.places, near.tokens) == (0.25, pytest.approx(0.3625), 4, 5)
    assert (near.holds, near.quantises) == (True, True)
    assert engine_verdict(canary, [None, -1.36, -2.36, -3.36, -4.36]).holds
    far = engine_verdict(canary, [None, -1.37, -2.37, -3.37, -4.37])
    assert not far.holds
    with pytest.raises(InputRefused, match=r"by 0\.3700 nats per token, the table by 0\.2500 .* allowed is 0\.3625"):
        far.check(parse_table(content(2)))
    assert engine_verdict(canary, [None, *rows[0]]).quantises is False, "a stock engine"
    cut = engine_verdict(canary, [None, -1.5, -2.0])
    assert (cut.found, cut.places, cut.tokens) == (0.25, 2, 3)
    assert not engine_verdict(canary, [None, float("nan"), -2.0, -3.0, -4.0]).holds
    with pytest.raises(EnvironmentRefused, match="no log-probabilities of the sample"):
        engine_verdict(canary, [None])
    slight = Canary.of([7, 8], 0.1, 0.01, rows=([-1.0], [-1.05]))
    assert engine_verdict(slight, [None, -1.0]).quantises is None, "16-bit arithmetic errs as much"


@pytest.mark.parametrize("length", [2, 3, 512, 513, 514, 1025, 1026, 2048, 8192])
def test_at_most_512_places_are_kept_evenly(length):
    rows = [[-(n % 50) / 4 for n in range(1, length)] for _ in range(2)]
    canary = Canary.of([1] * length, 0.1, 0.01, rows=rows)
    steps = {later - place for place, later in zip(canary.places, canary.places[1:], strict=False)}
    assert canary.places[0] == 1
    assert 1 <= len(canary.places) <= 512
    assert len(steps) <= 1
    assert canary.places[-1] > length - 1 - max(steps, default=1)
    assert canary.exact == [-(place % 50) / 4 for place in canary.places]


@pytest.mark.parametrize(
    "change",
    [
        {"log_likelihoods": "AAAA"},
        {"log_likelihoods": "AL4AvgC+Ar"},
        {"log_likelihoods": "ADwAvAC8"},
        {"log_likelihoods": "AH4AvAC8"},
        {"effect": None},
        {"log_likelihoods": None},
        {"effect": -1.0},
    ],
    ids=["too few", "no base64", "above 0", "NaN", "no effect", "effect alone", "negative effect"],
)
def test_damaged_log_likelihoods_are_refused(change):
    rows = [-1.0, -1.0, -1.0]
    good = Canary.of([1, 2, 3, 4], 0.1, 0.01, rows=(rows, rows)).model_dump()
    assert Canary(**good).exact == rows
    with pytest.raises(ValueError, match=r"canary|effect"):
        Canary(**{**good, **change})
