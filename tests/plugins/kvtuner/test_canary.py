"""The canary: holds for the model and formats that it was made of, fails for others."""

import json

import pytest
import torch

from jettison.hooks.cli import main
from jettison.hooks.errors import ConfigError, InputRefused
from jettison.hooks.quality import compare
from jettison.plugins.kvtuner.artefact import Canary
from jettison.plugins.kvtuner.canary import ABSOLUTE, LIKELIHOOD, RELATIVE, Verdict, record, tolerance, verify
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
