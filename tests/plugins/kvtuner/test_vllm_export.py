"""Acceptance A12, the part without vLLM: what is said, and what is refused. The parser is asked in `integration/`."""

import json

import pytest

from jettison.hooks.cli import main
from jettison.hooks.errors import ConfigError
from jettison.plugins.kvtuner.table import parse_table, seal
from jettison.plugins.kvtuner.vllm_export import FORMATS, recipe
from kvtuner_samples import HEADS, SIZE, content

S, E, F = (16, 16), (8, 8), (4, 4)


def table(*pairs, **payload):
    base = content(len(pairs), channels=False)
    layers = [{"layer": n, "key_bits": k, "value_bits": v} for n, (k, v) in enumerate(pairs)]
    rest = {key: value for key, value in base.items() if key != "payload_sha256"}
    return seal({**rest, "payload": {**base["payload"], "layers": layers, **payload}})


@pytest.mark.parametrize(
    ("pairs", "flags"),
    [
        ((S, E, E, S), ["--kv-cache-dtype", "fp8", "--kv-cache-dtype-skip-layers", "0", "3"]),
        ((E, E), ["--kv-cache-dtype", "fp8"]),
        ((S, S, S), ["--kv-cache-dtype", "auto"]),
        ((F, S, F), ["--kv-cache-dtype", "int4_per_token_head", "--kv-cache-dtype-skip-layers", "1"]),
        (
            (S, S, (8, 4), S, S),
            ["--kv-cache-dtype", "turboquant_k8v4", "--kv-cache-dtype-skip-layers", "0", "1", "3", "4"],
        ),
    ],
)
def test_a12_flags(pairs, flags):
    found = recipe(table(*pairs))
    assert found.flags == flags
    assert found.command == "vllm serve tiny " + " ".join(flags)


@pytest.mark.parametrize(
    ("pairs", "chosen", "sentence"),
    [
        ((S, E, F, E), None, "layer 2 is k4v4, .* beside 16 bits, fp8 stores k8v8 in all other layers"),
        ((S, (4, 2), S), None, "layer 1 is k4v2, .* one of k8v8, k4v4, k8v4"),
        ((S, (16, 8), S), None, "layer 1 is k16v8"),
        ((E, F), "int4_per_token_head", "layer 0 is k8v8"),
        (((8, 4),) * 6, None, "layer 0 is k8v4, .* turboquant_k8v4 keeps the first and last 2 layers at 16 bits"),
        ((S, S, (8, 4), (8, 4), S), None, "layer 3 is k8v4"),
    ],
)
def test_a12_what_vllm_cannot_store_is_refused_and_the_layer_named(pairs, chosen, sentence):
    with pytest.raises(ConfigError, match=f"{sentence}.*jettison serve"):
        recipe(table(*pairs), chosen)


def test_a12_per_channel_tables_and_other_formats_are_refused():
    kivi = {"rotate": False, "sink_tokens": 0, "codec": "kivi", "group_size": 32, "residual": 32}
    with pytest.raises(ConfigError, match="has the codec kivi"):
        recipe(table(E, E, **kivi))
    with pytest.raises(ConfigError, match="'fp4' is not one we emit; allowed are fp8, int8_per_token_head"):
        recipe(table(E, E), "fp4")


@pytest.mark.parametrize(
    ("name", "per_head"),
    [("fp8", 64), ("int8_per_token_head", 72), ("fp8_per_token_head", 72)],
)
def test_bytes_are_vllms(name, per_head):
    """Head size 32: two sides of 32 bytes; per token and head two float32 scales."""
    found = recipe(table(S, E, E), name)
    assert found.bytes_per_token == HEADS * (4 * SIZE + 2 * per_head)
    assert found.bf16_bytes_per_token == 3 * HEADS * 4 * SIZE
    assert recipe(table(S, F)).bytes_per_token == HEADS * (4 * SIZE + 32 + 8)
    assert recipe(table(S, S)).bytes_per_token == 2 * HEADS * 4 * SIZE


def test_every_pair_has_a_default():
    assert {form.pair for form in FORMATS.values()} == {(8, 8), (4, 4), (8, 4)}
    assert recipe(table(S, E)).cache_dtype == "fp8"


def test_the_command(tmp_path, capsys):
    path, out = tmp_path / "table.json", tmp_path / "recipe.json"
    table(S, E, E).save(path)
    assert main(["kvtuner", "export", str(path), "--to", "vllm", "-o", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == "vllm serve tiny --kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 0"
    assert "10.67 real bits" in printed.err
    assert "KL does not hold" in printed.err
    assert json.loads(out.read_text())["flags"] == ["--kv-cache-dtype", "fp8", "--kv-cache-dtype-skip-layers", "0"]
    parse_table(content()).save(path)
    out.unlink()
    assert main(["kvtuner", "export", str(path), "--to", "vllm", "-o", str(out)]) == 2
    assert "layer 0 is k8v4" in capsys.readouterr().err
    assert not out.exists()
