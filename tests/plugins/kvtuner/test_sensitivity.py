from dataclasses import fields, replace

import pytest
import torch

from jettison.hooks import InputRefused, KVFormat
from jettison.plugins.kvtuner import codecs, quality, sensitivity, stream
from jettison.plugins.kvtuner.calibration import MIN_TOKENS, Settings, choose_pairs, costs, file_texts
from jettison.plugins.kvtuner.capture import NAME, intercept
from jettison.plugins.kvtuner.sensitivity import PAIRS, load_sensitivity, measure
from jettison.plugins.kvtuner.table import ModelShape
from kvtuner_families import FAMILIES, tiny
from kvtuner_samples import SIZE, tiny_model

SHAPE = ModelShape(name="tiny", config_sha256="0" * 64, num_layers=2, num_kv_heads=2, head_size=SIZE)


def texts(count=2, length=192):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 128, (length,), generator=generator) for _ in range(count)]


def formats(pairs, measured=None, sinks=1):
    channels = (None, None) if measured is None else (measured.key_center, measured.key_scale)
    rows = [[None if side is None else side[n].tolist() for side in channels] for n in range(len(pairs))]
    return [
        KVFormat(*pair, rotate=True, sink_tokens=sinks, key_center=center, key_scale=scale)
        for pair, (center, scale) in zip(pairs, rows, strict=True)
    ]


def test_an_intercepted_model_is_the_same_model():
    model = tiny_model()
    ids = texts()[0]
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
    before = model.config._attn_implementation
    torch.testing.assert_close(quality.log_probabilities(model, ids), expected, rtol=1e-4, atol=1e-4)
    identity = quality.log_probabilities(model, ids, formats([(16, 16)] * 2))
    torch.testing.assert_close(identity, expected, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == before != NAME


def test_the_model_is_restored_after_an_error():
    model = tiny_model()
    before = model.config._attn_implementation

    def fail(*_):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), intercept(model, fail):
        model(texts()[0][None])
    assert model.config._attn_implementation == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_prediction_is_the_kl_that_one_layer_costs():
    """The predicted KL of a pair in one layer alone agrees with a teacher-forced run, in nats, within a factor of 2."""
    model, data = tiny_model(), texts(4, 256)
    measured = measure(model, data, sink_tokens=0)
    exact = [quality.log_probabilities(model, ids) for ids in data]
    for layer in range(2):
        for pair in ((4, 16), (16, 4)):
            pairs = [(16, 16)] * 2
            pairs[layer] = pair
            found = quality.evaluate(model, data, exact, formats(pairs, measured, sinks=0)).mean_kl
            predicted = measured.kl[layer, PAIRS.index(pair)].item()
            assert 0.5 < predicted / found < 2, (
                f"layer {layer}, {pair}: predicted {predicted:.3g}, measured {found:.3g}"
            )


def test_several_sink_settings_in_one_pass_are_those_of_passes_of_their_own(monkeypatch):
    model, data, made = tiny_model(), texts(), []
    own = {sink: measure(model, data, sink_tokens=sink, seed=3) for sink in (0, 2, 1)}
    monkeypatch.setattr(sensitivity, "backward", lambda *args: made.append(1) or stream.backward(*args))
    sides = sensitivity.default_codecs(rotate=True)
    together = sensitivity.measure_sinks(model, data, (0, 2, 1), keys=sides, values=sides, seed=3)
    assert len(made) == len(data), "one backward pass per text"
    assert list(together) == [0, 2, 1]
    for sink, alone in own.items():
        for field in fields(alone):
            one, other = getattr(alone, field.name), getattr(together[sink], field.name)
            assert torch.equal(one, other) if torch.is_tensor(one) else one == other, f"{field.name} at {sink} sinks"
    assert not torch.equal(own[0].kl, own[2].kl)


def test_more_bits_cost_less():
    measured = measure(tiny_model(), texts())
    for layer in range(2):
        column = {pair: measured.kl[layer, n].item() for n, pair in enumerate(PAIRS)}
        assert column[16, 16] == 0
        assert column[8, 8] < column[4, 4] < column[2, 2], f"layer {layer}: {column}"


@pytest.mark.parametrize("fragile", [0, 1])
def test_a_fragile_layer_gets_its_bits(fragile):
    """The layer whose queries hardly look at keys gives its bits to the other, at equal bytes."""
    model, data = tiny_model(), texts(4, 256)
    with torch.no_grad():
        model.model.layers[fragile].self_attn.q_proj.weight.mul_(3)
        for name in ("q_proj", "o_proj"):
            getattr(model.model.layers[1 - fragile].self_attn, name).weight.mul_(0.05)
    measured = measure(model, data)
    settings = Settings(ratio=4 * SIZE / 49)  # 49 bytes per token and head: the mean of K8V4 (57) and K4V4 (41)
    pairs, _ = choose_pairs(measured, SHAPE, settings)
    spent = sum(costs(SHAPE, settings)[PAIRS.index(pair)] for pair in pairs)
    assert spent <= 2 * 2 * 49
    assert pairs[fragile][0] > pairs[1 - fragile][0], pairs
    exact = [quality.log_probabilities(model, ids) for ids in data]
    searched = quality.evaluate(model, data, exact, formats(pairs, measured)).mean_kl
    swapped = quality.evaluate(model, data, exact, formats(pairs[::-1], measured)).mean_kl
    assert searched < 0.7 * swapped, f"{pairs}: {searched} against {swapped} with the layers swapped"


def test_the_same_seed_gives_the_same_table():
    first, second = (measure(tiny_model(), texts(), seed=3).kl for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)


def test_dead_channels_give_finite_statistics():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[:SIZE] = 0
        model.model.layers[1].self_attn.q_proj.weight.zero_()
    measured = sensitivity.measure(model, texts(1, 128))
    for name in ("kl", "output_error", "output_norm_ratio", "key_center", "key_scale"):
        assert torch.isfinite(getattr(measured, name)).all(), name
    assert (measured.key_scale > 0).all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"ratio": 0.5}, "ratio 0.5"), ({"ratio": float("nan")}, "ratio nan"), ({"block_size": 24}, "block size 24"),
     ({"sink_tokens": 17}, "sink tokens 17")],
)  # fmt: skip
def test_bad_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**settings)


def test_short_texts_are_refused(tmp_path):
    def tokenizer(text):
        return type("Encoding", (), {"input_ids": text.split()})

    file = tmp_path / "a.txt"
    file.write_text("1 " * (MIN_TOKENS - 1))
    with pytest.raises(InputRefused, match="has 63 tokens; at least 64"):
        file_texts(tokenizer, [file], 128)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured(family):
    """Finite, exact at 16 bits, and better with more bits (relative errors need not be: elements near zero)."""
    measured = measure(tiny(family), texts(1, 150), sink_tokens=0)
    assert measured.windows == tuple(FAMILIES[family][2])
    for name in ("kl", "output_error", "output_norm_ratio"):
        table = getattr(measured, name)
        assert torch.isfinite(table).all(), (family, name)
        assert (table[:, PAIRS.index((16, 16))] == 0).all(), (family, name)
        for more, fewer in (((8, 8), (4, 4)), ((4, 4), (2, 2))) if name != "output_error" else ():
            assert (table[:, PAIRS.index(more)] < table[:, PAIRS.index(fewer)]).all(), (family, name, more, fewer)
    for name in ("key_error", "attention_error", "value_error"):
        errors = getattr(measured, name)
        assert (errors[:, 0] == 0).all(), (family, name)
        assert (errors[:, 1:] > 0).all(), (family, name)
    assert (measured.attention_error.diff(dim=1) > 0).all(), family


def test_without_gradients_the_other_metrics_are_the_same():
    full, quick = (measure(tiny_model(), texts(1), gradients=flag) for flag in (True, False))
    assert (quick.kl == 0).all()
    for name in ("output_error", "output_norm_ratio", "key_error", "value_error", "attention_error", "key_center"):
        torch.testing.assert_close(getattr(quick, name), getattr(full, name), rtol=1e-4, atol=1e-7)


def test_statistics_of_the_keys_by_hand():
    """Mean of the keys and (std / rms of queries)^0.5 of mean 1, over two texts, without their first four tokens."""
    model, data, keys, queries = tiny_model(), texts(2, 90), [], []

    def keep(layer, seen):
        if layer == 1:
            keys.append(seen.key[0, :, 4:])
            queries.append(seen.query[0].unflatten(0, (2, 2)))

    for ids in data:
        stream.forward(model, ids, keep)
    measured = measure(model, data, gradients=False)
    key, query = torch.cat(keys, 1).double(), torch.cat(queries, 2).double()
    torch.testing.assert_close(measured.key_center[1].double(), key.mean(1), rtol=1e-3, atol=1e-3)
    scale = (key.std(1) / query.square().mean((1, 2)).sqrt()).sqrt()
    torch.testing.assert_close(measured.key_scale[1].double(), scale / scale.mean(-1, keepdim=True), rtol=2e-3, atol=0)


def test_other_codecs_are_measured_like_ours():
    """KIVI and fp8 beside int4: columns are named and in the order of the product."""
    keys, values = [codecs.get("kivi4"), codecs.get("int4")], [codecs.get("16"), codecs.get("fp8")]
    measured = measure(tiny_model(), texts(1), keys=keys, values=values, gradients=False)
    assert measured.options == ["kivi4/16", "kivi4/fp8", "int4/16", "int4/fp8"]
    assert measured.kl.shape == (2, 4)
    alone = measure(tiny_model(), texts(1), keys=keys[1:], values=values[1:], gradients=False)
    torch.testing.assert_close(alone.output_error[:, 0], measured.output_error[:, 3], rtol=1e-4, atol=0)


def test_a_measurement_is_kept_on_disk(tmp_path):
    measured = measure(tiny_model(), texts(1))
    measured.save(tmp_path / "a.safetensors")
    back = load_sensitivity(tmp_path / "a.safetensors")
    for field in fields(measured):
        before, after = getattr(measured, field.name), getattr(back, field.name)
        same = torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
        assert same, field.name


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda file: file.unlink(), "No such file"),
        (lambda file: file.write_bytes(b"not safetensors"), "holds no sensitivities"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "holds no sensitivities"),
        (lambda file: file.write_bytes(file.read_bytes().replace(b'schema\\": 1', b'schema\\": 2')), "another schema"),
        (lambda file: file.write_bytes(file.read_bytes().replace(b"kvtuner.sens", b"kvtuner.xxxx")), "KeyError"),
        (lambda file: replace(measure(tiny_model(), texts(1), gradients=False), windows=(-1,)).save(file), "kl is not"),
    ],
)
def test_a_damaged_measurement_is_refused(tmp_path, damage, sentence):
    file = tmp_path / "a.safetensors"
    measure(tiny_model(), texts(1), gradients=False).save(file)
    damage(file)
    with pytest.raises(InputRefused, match=sentence):
        load_sensitivity(file)


@pytest.mark.parametrize("data", [[], [torch.arange(4)]])
def test_too_little_text_is_refused(data):
    with pytest.raises(InputRefused, match="at least one is needed, each of more than 4 tokens"):
        measure(tiny_model(), data)
