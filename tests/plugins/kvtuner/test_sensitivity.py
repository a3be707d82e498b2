import pytest
import torch

from jettison.hooks import InputRefused, KVFormat
from jettison.plugins.kvtuner import quality, sensitivity
from jettison.plugins.kvtuner.calibration import MIN_TOKENS, Settings, choose_pairs, costs, file_texts
from jettison.plugins.kvtuner.capture import NAME, intercept
from jettison.plugins.kvtuner.sensitivity import PAIRS, Captured, layer_errors, measure, output_error
from jettison.plugins.kvtuner.table import ModelShape
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


def test_metrics_by_hand():
    """One head, two tokens, uniform attention: the outputs and all three metrics can be written down."""
    one = torch.zeros(1, 1, 2, SIZE)
    value = one.clone()
    value[0, 0, :, 0] = torch.tensor([2.0, 4.0])  # 16-bit exact, and 8 levels apart from 0 at any width: no error
    value[0, 0, 1, 1] = 1.0  # at 2 bits a step is 4/3: 1 is stored as 4/3
    output = one.clone()
    output[0, 0, 0, 0], output[0, 0, 1, 0], output[0, 0, 1, 1] = 2.0, 3.0, 0.5
    gradient = one.clone()
    gradient[0, 0, 1, 1] = 6.0
    text = Captured(one, one, value, output, gradient, 1.0, -1)
    found = layer_errors([text], torch.zeros(1, SIZE), torch.ones(1, SIZE), rotate=False, sink_tokens=0)
    step = float(torch.tensor(4 / 3).half())
    change = (step - 1) / 2
    column = PAIRS.index((16, 2))
    assert found[0, column].item() == pytest.approx(0.5 * (6 * change) ** 2 / 2, rel=2e-2)
    assert found[1, column].item() == pytest.approx(change / 0.5 / (2 * SIZE), rel=2e-2)
    assert found[2, column].item() == pytest.approx(change / (4 + 9 + 0.25) ** 0.5, rel=2e-2)
    assert found[:, PAIRS.index((16, 16))].abs().max() == 0


def test_relative_error_is_guarded():
    assert output_error(torch.zeros(3), torch.zeros(3)).sum() == 0
    assert output_error(torch.tensor([2.0, -4.0]), torch.tensor([1.0, 1.0])).tolist() == [0.5, 0.25]


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
