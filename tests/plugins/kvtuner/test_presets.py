"""Acceptance A10: tables in the form that the paper's authors publish. We write the files; the averages are theirs."""

import json

import pytest
import yaml

from jettison.hooks.cli import main
from jettison.hooks.errors import ConfigError, InputRefused
from jettison.plugins.kvtuner.hf_cache import PackedCache
from jettison.plugins.kvtuner.kivi_cache import ChannelLayer
from jettison.plugins.kvtuner.presets import check_groups, mode_of, model_shape, parse_preset, read_preset, to_table
from jettison.plugins.kvtuner.table import load_table
from kvtuner_samples import tiny_model

LLAMA, MISTRAL, QWEN_3B, QWEN_7B = 32, 32, 36, 28
PUBLISHED = {
    "Llama-3.1-8B-Instruct_kivi": (LLAMA, (3.06, 3.25, 5.06, 4.91)),
    "Llama-3.1-8B-Instruct_pertoken": (LLAMA, (3.59, 3.97, 5.84, 5.44)),
    "Mistral-7B-v0.3_pertoken": (MISTRAL, (3.66, 3.78, 5.53, 5.38)),
    "Qwen2.5-7B-Instruct_pertoken": (QWEN_7B, (4.00, 3.93, 5.79, 5.00)),
    "Qwen2.5-7B-Instruct_kivi": (QWEN_7B, (3.93, 3.18, 5.96, 5.18)),
    "Qwen2.5-3B-Instruct_pertoken": (QWEN_3B, (3.64, 4.00, 5.06, 5.14)),
}
"""Layers and the averages of the four files of each, section 3.6."""
FILES = ("4_0", "4_1", "6_0", "6_1")

QWEN_7B_C4 = {
    **dict.fromkeys(range(28), (4, 4)),
    **dict.fromkeys((1, 2, 4, 5, 8, 24, 25), (4, 2)),
    **dict.fromkeys((3, 13, 27), (8, 2)),
    0: (8, 8),
}
"""Qwen2.5-7B, per token, C4.0: spelt out in section 3.6."""


def published(pairs):
    """The text of a preset file."""
    return yaml.safe_dump({layer: {"nbits_key": k, "nbits_value": v} for layer, (k, v) in pairs.items()})


def pairs_with_average(layers, average):
    """Pairs of {2, 4, 8} bits whose mean rounds to `average`."""
    total = next(total for total in range(4 * layers, 16 * layers, 2) if round(total / (2 * layers), 2) == average)
    bits = [2] * (2 * layers)
    for at in range(len(bits)):
        for wider in (8, 4):
            if sum(bits) - bits[at] + wider <= total:
                bits[at] = wider
                break
    assert sum(bits) == total
    return {layer: (bits[2 * layer], bits[2 * layer + 1]) for layer in range(layers)}


def checkpoint(folder, layers, **changes):
    """A folder with a configuration only."""
    tiny_model(num_hidden_layers=1).config.__class__(
        **{
            "hidden_size": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "num_hidden_layers": layers,
            **changes,
        }
    ).save_pretrained(folder)
    return str(folder)


CASES = [(name, layers, *each) for name, (layers, four) in PUBLISHED.items() for each in zip(FILES, four, strict=True)]


@pytest.mark.parametrize(("name", "layers", "file", "average"), CASES)
def test_a10_published_files_load_and_their_averages_are_recomputed(tmp_path, capsys, name, layers, file, average):
    path, table = tmp_path / f"{name}_KVTuner{file}.yaml", tmp_path / "table.json"
    path.write_text(published(pairs_with_average(layers, average)))
    model = checkpoint(tmp_path / "model", layers)
    assert main(["kvtuner", "import", str(path), "--model", model, "-o", str(table)]) == 0
    printed = capsys.readouterr().out
    assert f"{layers} layers" in printed
    assert f"{average:.2f} bits as published" in printed, printed
    kivi = "_kivi" in name
    assert ("for the Hugging Face cache only" in printed) == kivi
    loaded = load_table(table)
    assert dict(enumerate(loaded.payload.pairs)) == pairs_with_average(layers, average)
    assert loaded.payload.codec == ("kivi" if kivi else "token-head")
    assert loaded.sizes.nominal_bits == pytest.approx(average, abs=0.005)


def test_a10_qwen_7b_c4(tmp_path, capsys):
    """Section 3.6: 4.00 bits; real bits at a head size of 128 add 32 / 128 on each side."""
    path = tmp_path / "Qwen2.5-7B-Instruct_pertoken_KVTuner4_0.yaml"
    path.write_text(published(QWEN_7B_C4))
    model = checkpoint(tmp_path / "model", 28, hidden_size=3584, num_attention_heads=28, num_key_value_heads=4)
    assert main(["kvtuner", "import", str(path), "--model", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["nominal_bits"] == 4.0
    assert facts["real_bits"] == 4.25
    assert facts["bytes_per_token"] == 28 * 4 * 2 * (64 + 4)
    assert facts["mode"] == "per-token"


def test_per_channel_real_bytes(tmp_path):
    """Keys in groups of 32 cost one bit more; the values 4 bytes per token and head."""
    path = tmp_path / "m_kivi_KVTuner4_0.yaml"
    path.write_text(published(dict.fromkeys(range(2), (4, 2))))
    table = to_table(read_preset(path), model_shape(checkpoint(tmp_path / "model", 2)))
    assert table.sizes.bytes_per_token == 2 * 2 * (32 * (4 + 1) // 8 + 32 * 2 // 8 + 4)
    with pytest.raises(ConfigError, match="codec kivi"):
        table.format(0)


@pytest.mark.parametrize("mode", ["kivi", "pertoken"])
def test_an_imported_table_sets_the_hugging_face_cache(tmp_path, mode):
    path = tmp_path / f"tiny_{mode}_KVTuner4_0.yaml"
    path.write_text(published({0: (8, 4), 1: (2, 4)}))
    model = tiny_model()
    folder = tmp_path / "model"
    model.config.save_pretrained(folder)
    cache = PackedCache.from_table(to_table(read_preset(path), model_shape(str(folder))), model.config)
    assert [(layer.form.key_bits, layer.form.value_bits) for layer in cache.layers] == [(8, 4), (2, 4)]
    assert all(isinstance(layer, ChannelLayer) == (mode == "kivi") for layer in cache.layers)
    assert not any(layer.form.rotate for layer in cache.layers)


LINE = "{0}: {{nbits_key: {1}, nbits_value: {2}}}\n"
GOOD = LINE.format(0, 8, 4) + LINE.format(1, 4, 2) + LINE.format(2, 4, 4)
DEFECTS = {
    "duplicate": (GOOD + LINE.format(1, 8, 8), r"layer 1 occurs twice, in lines 2 and 4"),
    "duplicate as text": (GOOD + LINE.format("'1'", 8, 8), r"layer 1 occurs twice, in lines 2 and 4"),
    "missing": (GOOD + LINE.format(4, 4, 4), r"layer 3 is missing, but layer 4 is there"),
    "missing first": (GOOD.split("\n", 1)[1], r"layer 0 is missing"),
    "negative": (GOOD + LINE.format(-1, 4, 4), r"line 4 has '-1' where a layer's number"),
    "name": (GOOD + LINE.format("model", 4, 4), r"line 4 has 'model' where a layer's number"),
    "octal": (GOOD + LINE.format("03", 4, 4), r"line 4 has '03' where a layer's number"),
    "bits 3": (GOOD + LINE.format(3, 3, 4), r"nbits_key of layer 3 \(line 4\) is '3'; allowed are 16, 8, 4, 2"),
    "bits 0": (GOOD + LINE.format(3, 4, 0), r"nbits_value of layer 3 .* is '0'"),
    "bits 4.0": (GOOD + LINE.format(3, "4.0", 4), r"nbits_key of layer 3 .* is '4.0'"),
    "bits text": (GOOD + LINE.format(3, "'4'", 4), r"nbits_key of layer 3 .* is '4'"),
    "bits true": (GOOD + LINE.format(3, "true", 4), r"nbits_key of layer 3 .* is 'true'"),
    "bits list": (GOOD + LINE.format(3, "[4]", 4), r"nbits_key of layer 3 .* is a collection"),
    "no value": (GOOD + "3: {nbits_key: 4}\n", r"layer 3 \(line 4\) has no nbits_value"),
    "no key": (GOOD + "3: {nbits_value: 4}\n", r"layer 3 \(line 4\) has no nbits_key"),
    "twice": (GOOD + "3: {nbits_key: 4, nbits_key: 8, nbits_value: 4}\n", r"layer 3 has nbits_key twice \(line 4\)"),
    "unknown": (GOOD + "3: {nbits_key: 4, nbits_value: 4, group: 2}\n", r"layer 3 has the unknown key 'group'"),
    "per head": (GOOD + "3: {0: {nbits_key: 4, nbits_value: 4}}\n", r"layer 3 has bits per KV head"),
    "number": (GOOD + "3: 4\n", r"layer 3 \(line 4\) is no mapping of nbits_key and nbits_value"),
    "list": ("- {nbits_key: 4, nbits_value: 4}\n", r"it is no mapping of layers"),
    "empty": ("", r"it is no mapping of layers"),
    "nothing": ("{}", r"it is no mapping of layers"),
    "two documents": (GOOD + "---\n" + GOOD, r"is not YAML"),
    "broken": (GOOD + "3: {", r"is not YAML"),
    "object": ("!!python/object/apply:os.system ['true']\n", r"it is no mapping of layers"),
    "object key": (
        GOOD + "!!python/name:os.system 3: {nbits_key: 4, nbits_value: 4}\n",
        r"line 4 has '3' where a layer",
    ),
    "merge": ("a: &a {nbits_key: 4, nbits_value: 4}\n0:\n  <<: *a\n", r"line 1 has 'a' where a layer's number"),
    "deep": ("[" * 5000, r"is not YAML"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a10_defects_are_rejected_with_the_reason(defect):
    text, sentence = DEFECTS[defect]
    with pytest.raises(InputRefused, match=sentence):
        parse_preset(text, "preset.yaml")
    assert parse_preset(GOOD, "preset.yaml") == ((8, 4), (4, 2), (4, 4)), "the rest of the file was fine"


def test_anchors_are_read_but_do_not_grow():
    text = "0: &a {nbits_key: 4, nbits_value: 4}\n" + "".join(f"{n}: *a\n" for n in range(1, 9))
    assert parse_preset(text, "x") == ((4, 4),) * 9


def replaced(groups, number, *layers):
    return [(*group, *layers) if at == number else group for at, group in enumerate(groups)]


def test_a10_the_two_defective_groupings_are_rejected():
    """Qwen2.5-14B (48 layers) lists layer 25 twice, 32B (64 layers) 22, 24 and 25 (section 3.4); ours are like that."""
    fourteen = [tuple(range(20)), tuple(range(20, 30)), tuple(range(30, 48))]
    thirty_two = [tuple(range(22)), tuple(range(22, 40)), tuple(range(40, 64))]
    check_groups(fourteen, 48)
    check_groups(thirty_two, 64)
    with pytest.raises(InputRefused, match="layer 25 is in group 1 and in group 2"):
        check_groups(replaced(fourteen, 2, 25), 48)
    with pytest.raises(InputRefused, match="layer 22 is in group 0 and in group 1"):
        check_groups(replaced(thirty_two, 0, 22, 24, 25), 64)


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([(0, 1), (3,)], "layer 2 is in no group"),
        ([(0, 1, 1), (2, 3)], "layer 1 is in group 0 and in group 0"),
        ([(0, 1), (2, 3, 4)], "group 1 holds layer 4, but the model has 4 layers"),
        ([(0, 1), (2, 3, -1)], "group 1 holds layer -1"),
        ([(0, 1), (2, True)], "group 1 holds layer True"),
        ([], "layer 0 is in no group"),
    ],
)
def test_other_defective_groupings(groups, sentence):
    with pytest.raises(InputRefused, match=sentence):
        check_groups(groups, 4)


def test_bad_use_leaves_nothing_behind(tmp_path, capsys):
    """One sentence, the right exit code, and no output file."""
    good, output = tmp_path / "a_pertoken_b.yaml", tmp_path / "out.json"
    good.write_text(GOOD)
    nameless = tmp_path / "preset.yaml"
    nameless.write_text(GOOD)
    broken = tmp_path / "b_pertoken_c.yaml"
    broken.write_text(GOOD + LINE.format(1, 8, 8))
    model = checkpoint(tmp_path / "model", 3)
    other = checkpoint(tmp_path / "other", 4)
    cases = [
        (["import", str(broken), "--model", model], 4, "layer 1 occurs twice"),
        (["import", str(nameless), "--model", model], 2, "does not tell how the preset quantises"),
        (["import", str(good), "--model", other], 4, "is for 3 layers, other has 4"),
        (["import", str(good), "--model", str(tmp_path / "none")], 4, "has no readable configuration"),
        (["import", str(tmp_path / "none.yaml"), "--model", model], 4, "cannot read"),
        (["import", str(nameless), "--model", model, "--mode", "per-channel", "--rotate"], 2, "cannot be rotated"),
    ]
    for words, code, sentence in cases:
        assert main(["kvtuner", *words, "-o", str(output)]) == code, words
        error = capsys.readouterr().err
        assert sentence in error, words
        assert not output.exists(), words
    assert main(["kvtuner", "import", str(nameless), "--model", model, "--mode", "per-token", "-o", str(output)]) == 0
    assert load_table(output).payload.pairs == [(8, 4), (4, 2), (4, 4)]


def test_large_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "x_kivi_y.yaml"
    path.write_bytes(b"\xff\xfe0: 1")
    with pytest.raises(InputRefused, match="cannot read"):
        read_preset(path)
    path.write_text("#" + "x" * (1 << 20) + "\n" + GOOD)
    with pytest.raises(InputRefused, match="larger than"):
        read_preset(path)


def test_the_mode_is_in_the_name():
    assert mode_of("Llama-3.1-8B-Instruct_kivi_KVTuner4_0") == "per-channel"
    assert mode_of("Llama-3.1-8B-Instruct_pertoken_KVTuner6_1") == "per-token"
    with pytest.raises(ConfigError, match="--mode per-token or --mode per-channel"):
        mode_of("kivitable")


def test_an_mla_model_has_no_such_table(tmp_path):
    import transformers

    transformers.DeepseekV3Config(num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="multi-head latent attention"):
        model_shape(str(tmp_path))
