from dataclasses import replace

import pytest

from jettison.hooks import AttentionLayer, ConfigError, InputRefused
from jettison.hooks.config import parse_section
from jettison.plugins import kvtuner
from jettison.plugins.kvtuner.config import KVTunerOptions
from jettison.plugins.kvtuner.table import parse_table
from kvtuner_samples import HEADS, LAYERS, SIZE, content


def options(section):
    return parse_section(KVTunerOptions, "kvtuner", section)


def layer(index=0, num_layers=LAYERS, num_kv_heads=HEADS, head_size=SIZE):
    return AttentionLayer(
        index, f"model.layers.{index}.attn", 2 * num_kv_heads, num_kv_heads, head_size, None, num_layers
    )


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({}, "exactly one of 'table' and 'pair' is needed, found neither"),
        ({"pair": "k8v4", "table": content()}, "found both"),
        ({"pair": "k8v3"}, "kvtuner.pair"),
        ({"pair": "K8V4"}, "kvtuner.pair"),
        ({"pair": "k8v4\n"}, "kvtuner.pair"),
        ({"pair": "k8v4", "sink_tokens": 17}, "sink_tokens"),
        ({"pair": "k8v4", "rotate": "yes"}, "rotate"),
        ({"table": content(), "rotate": False}, "a table has its own"),
        ({"table": content(sink_tokens=99)}, "table.payload.sink_tokens"),
        ({"pairs": "k8v4"}, "did you mean 'pair'"),
    ],
)
def test_bad_sections_are_refused(section, sentence):
    with pytest.raises(ConfigError, match=sentence):
        options(section)


def test_a_pair_holds_for_all_layers():
    engine = kvtuner.activate(options=options({"pair": "k8v4", "sink_tokens": 2}))
    forms = [engine.kv_cache_format(layer=layer(n)) for n in range(LAYERS)]
    assert {(f.key_bits, f.value_bits, f.rotate, f.sink_tokens, f.key_center) for f in forms} == {(8, 4, True, 2, None)}


def test_a_table_answers_per_layer():
    table = parse_table(content())
    engine = kvtuner.activate(options=options({"table": content()}))
    for n in range(LAYERS):
        assert engine.kv_cache_format(layer=layer(n)) == table.format(n), f"layer {n}"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_layers": LAYERS + 1}, r"the model of layer 0 \(.*\) has 5, 2 and 32"),
        ({"num_kv_heads": 1}, r"the model of layer 0 \(.*\) has 4, 1 and 32"),
        ({"head_size": 64}, r"the model of layer 0 \(.*\) has 4, 2 and 64"),
        ({"index": LAYERS}, "is layer 4; layers are 0 to 3"),
        ({"index": -1}, "is layer -1; layers are 0 to 3"),
    ],
)
def test_a_model_of_another_shape_is_refused(changes, sentence):
    engine = kvtuner.activate(options=options({"table": content()}))
    with pytest.raises(ConfigError, match=sentence):
        engine.kv_cache_format(layer=layer(**changes))


def test_the_report_counts_real_bytes():
    engine = kvtuner.activate(options=options({"pair": "k8v4", "sink_tokens": 1}))
    for n in range(LAYERS):
        engine.kv_cache_format(layer=layer(n, head_size=64))
    per_head = 64 + 32 + 8 + 2  # codes of K, codes of V, scales and zeros, the 16-bit sink token over 128 tokens
    assert engine.report() == {
        "source": "pair",
        "layers": LAYERS,
        "pairs": {"k8v4": LAYERS},
        "bytes_per_token": LAYERS * HEADS * per_head,
        "bf16_bytes_per_token": LAYERS * HEADS * 256,
        "capacity_ratio": round(256 / per_head, 4),
    }


def test_flags_become_sections(tmp_path):
    assert KVTunerOptions.from_flag("k16v8") == {"pair": "k16v8"}
    parse_table(content()).save(tmp_path / "t.json")
    section = KVTunerOptions.from_flag(str(tmp_path / "t.json"))
    assert options(section).table == parse_table(content())


@pytest.mark.parametrize("value", ["", "k8", "k8v4x", "missing.json", "k8v4.txt"])
def test_bad_flags_are_refused(value):
    with pytest.raises(InputRefused):
        KVTunerOptions.from_flag(value)


@pytest.mark.parametrize(("config", "differs"), [(None, None), ("0" * 64, False), ("1" * 64, True)])
def test_another_config_is_warned_of_once_and_reported(caplog, config, differs):
    engine = kvtuner.activate(options=options({"table": content()}))
    for n in range(LAYERS):
        engine.kv_cache_format(layer=replace(layer(n), config_sha256=config))
    assert sum("another config.json" in message for message in caplog.messages) == bool(differs)
    assert engine.report().get("config_differs") == differs
