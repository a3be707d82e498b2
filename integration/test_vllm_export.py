"""Acceptance A12: what `jettison kvtuner export --to vllm` prints, vLLM's own parser reads and its engine does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from jettison.hooks.cli import main
from jettison.plugins.kvtuner.presets import model_shape
from jettison.plugins.kvtuner.table import Table, seal
from jettison.plugins.kvtuner.vllm_export import FORMATS, recipe
from vllm_engines import KV_BYTES, PROMPTS, generate, layers_of, num_blocks, running

S, E, F, K = (16, 16), (8, 8), (4, 4), (8, 4)
BLOCK = 64


def table(model: Path, *pairs: tuple[int, int]) -> Table:
    layers = [{"layer": n, "key_bits": k, "value_bits": v} for n, (k, v) in enumerate(pairs)]
    shape = model_shape(str(model)).model_copy(update={"num_layers": len(pairs)})
    source = {
        "method": "test", "data": "none", "data_sha256": "1" * 64, "tokens": 0, "seed": 0, "capacity_ratio": 1.0,
        "block_size": BLOCK, "predicted_kl": 0.0,
    }  # fmt: skip
    payload = {"layers": layers, "rotate": False, "sink_tokens": 0, "key_center": None, "key_scale": None}
    return seal(
        {
            "schema": 1,
            "kind": "kvtuner.table",
            "created": "2026-11-23T12:00:00Z",
            "jettison": "0.1.0",
            "model": shape,
            "source": source,
            "payload": payload,
        }
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    return tiny_models.llama(tmp_path_factory.mktemp("export") / "llama", torch.bfloat16)


def parsed(arguments: list[str]) -> Any:
    """The engine arguments as `vllm serve` understands the flags."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return EngineArgs.from_cli_args(make_arg_parser(FlexibleArgumentParser()).parse_args(arguments))


CASES = {
    "fp8": (S, E, E, S, E),
    "int8_per_token_head": (E, E, S),
    "fp8_per_token_head": (S, E),
    "int4_per_token_head": (F, S, F),
    "turboquant_k8v4": (S, S, K, K, S, S),
    "auto": (S, S),
}


@pytest.mark.parametrize("cache_dtype", CASES)
def test_a12_emitted_flags_are_parsed_by_vllm(model, tmp_path, capsys, cache_dtype):
    pairs, path = CASES[cache_dtype], tmp_path / "table.json"
    table(model, *pairs).save(path)
    chosen = [] if cache_dtype == "auto" else ["--format", cache_dtype]
    assert main(["kvtuner", "export", str(path), "--to", "vllm", "--json", *chosen]) == 0
    flags = json.loads(capsys.readouterr().out)["flags"]
    found = parsed(["--model", str(model), *flags])
    assert found.kv_cache_dtype == cache_dtype
    assert found.model == str(model)
    skipped = [str(layer) for layer, pair in enumerate(pairs) if pair == S and cache_dtype != "auto"]
    assert found.kv_cache_dtype_skip_layers == skipped


def test_a12_all_formats_are_vllms():
    from typing import get_args

    from vllm.config.cache import CacheDType

    assert set(FORMATS) <= set(get_args(CacheDType))


def test_a12_the_engine_stores_what_the_table_says(model):
    """Layers 1 and 2 in fp8, the others in the model's type, and as many tokens as the recipe's bytes promise."""
    found = recipe(table(model, S, E, E, S))
    options = {
        "kv_cache_dtype": found.cache_dtype,
        "kv_cache_dtype_skip_layers": [str(layer) for layer in found.skip_layers],
        "dtype": "bfloat16",
        "block_size": BLOCK,
    }
    with running(model, **options) as llm:
        layers = layers_of(llm)
        assert [layer.kv_cache_dtype for layer in layers.values()] == ["auto", "fp8", "fp8", "auto"]
        size = llm.llm_engine.vllm_config.cache_config.block_size
        assert num_blocks(llm) * size == pytest.approx(KV_BYTES / found.bytes_per_token, rel=0.01), (
            num_blocks(llm),
            size,
        )
        assert [len(answer.tokens) for answer in generate(llm)] == [12] * len(PROMPTS)
