import base64
import json
import random

import pytest
import torch

from faults.mutate import byte_level, deep, dump, judge, structural
from jettison.hooks import InputRefused
from jettison.hooks.files import parse_document
from jettison.plugins.kvtuner.table import Table, encode_channels, load_table, parse_table
from kvtuner_samples import HEADS, LAYERS, SIZE, content, sealed

MUTATIONS = 10_000


def read(data: bytes) -> Table:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputRefused("not UTF-8", do="write it again") from error
    return parse_table(parse_document(text, "table"))


def test_a_saved_table_loads_as_it_was(tmp_path):
    table = parse_table(content())
    table.save(tmp_path / "t.json")
    assert load_table(tmp_path / "t.json") == table
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_formats_carry_bits_and_channels():
    table = parse_table(content())
    center = torch.frombuffer(bytearray(base64.b64decode(content()["payload"]["key_center"])), dtype=torch.float16)
    for layer in range(LAYERS):
        form = table.format(layer)
        expected = center.view(LAYERS, HEADS, SIZE)[layer].float().tolist()
        assert [list(row) for row in form.key_center] == expected, f"layer {layer}"
        assert (form.key_bits, form.value_bits) == table.payload.pairs[layer], f"layer {layer}"
        assert form.rotate
        assert form.sink_tokens == 1


def test_channels_are_optional():
    form = parse_table(content(channels=False)).format(0)
    assert form.key_center is None
    assert form.key_scale is None


@pytest.mark.parametrize("channels", [True, False])
def test_mutated_tables(channels):
    """10,000 damaged tables: each is rejected with one sentence, or means exactly what the original meant."""
    seed = 20_261_123
    rng = random.Random(seed)
    original = content(channels=channels)
    data = dump(original)

    def cases():
        for number in range(MUTATIONS // 2):
            if number % 3 == 0:
                yield byte_level(data, rng)
            else:
                case, damaged = structural(original, rng)
                for _ in range(rng.randrange(3)):
                    more, damaged = structural(damaged, rng) if damaged else ("", damaged)
                    case += f", {more}"
                yield case, dump(damaged)

    counts, findings = judge(cases(), read, parse_table(original))
    assert not findings, f"seed {seed}: {len(findings)} findings in {dict(counts)}, first {findings[:3]}"
    assert counts["rejected"] > 0.9 * MUTATIONS / 2


@pytest.mark.parametrize("channels", [True, False])
def test_mutated_and_resealed_tables(channels):
    """A forger who also repairs the hash gets through only with a table that is valid in itself."""
    rng = random.Random(7)
    accepted = 0
    for number in range(1000):
        case, damaged = structural(content(channels=channels), rng)
        try:
            table = parse_table(sealed(damaged))
        except InputRefused:
            continue
        except (TypeError, ValueError) as error:
            if "JSON" in str(error) or "nan" in str(error).lower() or "surrogate" in str(error):
                continue
            raise AssertionError(f"case {number}, {case}: {error!r}") from error
        accepted += 1
        for layer in range(table.model.num_layers):
            table.format(layer)
        assert all(bits in (2, 4, 8, 16) for pair in table.payload.pairs for bits in pair), case
    assert accepted < 500


def layers_of(table, *numbers):
    bits = {"key_bits": 4, "value_bits": 4}
    table["payload"]["layers"] = [{"layer": n, **bits} for n in numbers]


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ((0, 1, 2), "layer 3 is missing"),
        ((0, 1, 1, 3), "layer 1 occurs twice, layer 2 is missing"),
        ((0, 1, 2, 4), "layer 3 is missing, layer 4 is unknown"),
        ((0, 1, 2, 3, 3), "layer 3 occurs twice"),
        ((1, 0, 2, 3), "out of order"),
    ],
)
def test_layers_must_be_complete(numbers, sentence):
    table = content()
    layers_of(table, *numbers)
    with pytest.raises(InputRefused, match=sentence):
        parse_table(sealed(table))


@pytest.mark.parametrize("side", ["key_bits", "value_bits"])
@pytest.mark.parametrize("bits", [0, 1, 3, 6, 32, "8", 8.5, True])
def test_bits_are_checked(side, bits):
    table = content()
    table["payload"]["layers"][2][side] = bits
    with pytest.raises(InputRefused, match=rf"payload.layers.2.{side}"):
        parse_table(sealed(table))


@pytest.mark.parametrize("name", ["key_center", "key_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_channels_must_be_finite(name, value):
    values = torch.ones(LAYERS, HEADS, SIZE, dtype=torch.float16)
    values[1, 1, 5] = value
    table = content(**{name: base64.b64encode(values.numpy().tobytes()).decode()})
    with pytest.raises(InputRefused, match=rf"payload.{name} element {(1 * HEADS + 1) * SIZE + 5} is"):
        parse_table(table)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-9])
def test_scales_must_be_positive(value):
    values = torch.ones(LAYERS, HEADS, SIZE)
    values[0, 0, 3] = value
    with pytest.raises(InputRefused, match=r"element 3 is .*above 0"):
        parse_table(content(key_scale=encode_channels(values)))


@pytest.mark.parametrize("text", ["", "AAAA", "!" * 8, "A" * 20_000])
def test_channels_must_fit_the_shape(text):
    with pytest.raises(InputRefused, match=r"payload.key_center"):
        parse_table(content(key_center=text))


def test_a_table_of_another_shape_is_refused():
    table = content()
    table["model"]["num_kv_heads"] = 3
    with pytest.raises(InputRefused, match="the model's shape needs"):
        parse_table(sealed(table))


@pytest.mark.parametrize("document", [None, [], 1, "x", {}, {"schema": 1}, {"schema": 2, "kind": "kvtuner.table"}])
def test_other_documents_are_refused(document):
    with pytest.raises(InputRefused, match="is refused at"):
        parse_table(document)


@pytest.mark.parametrize("text", ["", "{", "nul", '{"schema": 1, "schema": 1}', "NaN", deep(), "[" * 100_000])
def test_malformed_files_are_refused(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(InputRefused):
        load_table(path)


def test_yaml_means_the_same(tmp_path):
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content()))))
    assert load_table(path) == parse_table(content())
