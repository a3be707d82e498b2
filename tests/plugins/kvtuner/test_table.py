import base64
import json
import random

import pytest
import torch

from faults.mutate import byte_level, deep, dump, judge, structural
from jettison.hooks import ConfigError, InputRefused
from jettison.hooks.files import parse_document
from jettison.plugins.kvtuner.artefact import Canary, read_pairs, write_pairs
from jettison.plugins.kvtuner.table import Table, content_sha256, encode_channels, load_table, parse_table, seal
from kvtuner_samples import HEADS, LAYERS, SIZE, content, sealed, searched

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


def test_mutated_tables_with_a_record_of_their_search():
    """The optional parts are guarded like the others."""
    rng = random.Random(3)
    original = searched()
    data = dump(original)

    def cases():
        for number in range(1500):
            if number % 3 == 0:
                yield byte_level(data, rng)
            else:
                case, damaged = structural(original, rng)
                yield case, dump(damaged)

    counts, findings = judge(cases(), read, parse_table(original))
    assert not findings, f"{len(findings)} findings in {dict(counts)}, first {findings[:3]}"
    assert counts["rejected"] > 0.8 * 1500


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


def test_a_table_of_the_first_version_is_still_valid():
    """Fields at their default are no part of the hash, and explicit ones mean the same."""
    old = content()
    assert not {"sizes", "search", "canary", "versions"} & set(old)
    assert parse_table(old).content() == old
    explicit = {**old, "search": None, "versions": {}}
    explicit["payload"] = {**old["payload"], "codec": "token-head", "group_size": None}
    assert parse_table(explicit) == parse_table(old)


def test_sealing_adds_sizes_and_hash():
    parts = {key: value for key, value in content().items() if key != "payload_sha256"}
    table = seal(parts)
    # 8.4, 4.4, 16.8 and 2.2 bits at head size 32: 32 + 16 + 8, 16 + 16 + 8, 64 + 32 + 4 and 8 + 8 + 8 bytes, and
    # one sink token of 128 bytes in a block of 128 tokens; 2 heads.
    assert table.sizes.bytes_per_token == 2 * (56 + 40 + 100 + 24 + 4)
    assert table.sizes.real_bits == table.sizes.bytes_per_token * 8 / (2 * LAYERS * HEADS * SIZE)
    assert table.sizes.nominal_bits == (12 + 8 + 24 + 4) / 8
    assert table.payload_sha256 == content_sha256(table.content())


def test_sizes_that_contradict_the_layers_are_refused():
    table = seal({key: value for key, value in content().items() if key != "payload_sha256"}).content()
    table["sizes"]["bytes_per_token"] += 1
    with pytest.raises(InputRefused, match="sizes contradict the layers"):
        parse_table(sealed(table))


def test_a_searched_table_round_trips(tmp_path):
    table = parse_table(searched())
    table.save(tmp_path / "t.json")
    assert load_table(tmp_path / "t.json") == table
    assert table.search.neighbours[0].pairs == "2xk8v4 k4v4 k2v2"
    assert table.canary.ids == [1, 2, 70_000]


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        ([(8, 4)], "k8v4"),
        ([(8, 4)] * 3 + [(16, 2), (8, 4)], "3xk8v4 k16v2 k8v4"),
        ([(2, 2)] * 1000, "1000xk2v2"),
    ],
)
def test_pairs_are_written_in_runs(pairs, text):
    assert write_pairs(pairs) == text
    assert read_pairs(text) == pairs


@pytest.mark.parametrize("text", ["", " ", "k8", "k8v3", "0xk8v4", "k8v4  k8v4", "99999xk8v4", "-1xk8v4", "k8v4\n"])
def test_other_text_is_no_run_of_pairs(text):
    with pytest.raises(ValueError, match="is not a run of pairs"):
        read_pairs(text)


@pytest.mark.parametrize("tokens", ["", "AAAA", "!!!!!!!!", "AAAAAA==", "A" * 60_000])
def test_a_canary_must_be_readable(tokens):
    table = searched()
    table["canary"]["tokens"] = tokens
    with pytest.raises(InputRefused, match=r"refused at canary"):
        parse_table(sealed(table))


def test_a_canary_holds_its_tokens():
    ids = [0, 1, 128_255, 2**32 - 1]
    assert Canary.of(ids, 0.1, 0.01).ids == ids


def test_kivi_is_for_another_cache():
    kivi = {"rotate": False, "sink_tokens": 0, "codec": "kivi", "group_size": 32, "residual": 32}
    table = parse_table(content(channels=False, **kivi))
    with pytest.raises(ConfigError, match=r"layer 1 .*codec kivi.*packed pages hold token-head"):
        table.format(1)
    for change in ({"rotate": True}, {"group_size": None}, {"residual": None}, {"sink_tokens": 1}):
        with pytest.raises(InputRefused, match="codec kivi has"):
            parse_table(content(channels=False, **{**kivi, **change}))
    with pytest.raises(InputRefused, match="codec token-head has neither"):
        parse_table(content(group_size=32))
    with pytest.raises(InputRefused, match=r"payload.codec"):
        parse_table(content(codec="other"))
