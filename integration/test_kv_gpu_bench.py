"""The GPU benchmark's own machinery on the CPU engine: every figure arrives, and counts what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kv_gpu_engine
from jettison.csrc.layout import PageLayout

HERE = Path(__file__).parent
BLOCKS = 12
SMALL = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPECTED = {
    ("start", "start_s"), ("64x8192", "capacity_tokens"), ("2x96", "prefill_s"), ("2x96", "cached_prefill_s"),
    ("2x96", "decode_ms_per_step"),
    ("2x96", "decode_tok_s"), ("preempting", "output_tok_s"), ("preempting", "preemptions"),
    ("preempting", "tokens_wanted"),
}  # fmt: skip


def measure(system: str, folder: Path) -> dict[tuple[str, str], Any]:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**kv_gpu_engine.LLAMA_8B, **SMALL}))
    order = {
        "system": system, "model": str(folder), "vocabulary": 500, "cases": [[2, 96]], "decoded": 8, "repeats": 1,
        "engine": {"max_model_len": 256, "max_num_seqs": 8, "dtype": "float32", "enforce_eager": True,
                   "block_size": 32, "num_gpu_blocks_override": BLOCKS},
        "preempting": {"requests": 8, "prompt": [60, 90], "output": [30, 60]},
    }  # fmt: skip
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, str(HERE / "kv_gpu_engine.py"), json.dumps(order)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return {(row["case"], row["metric"]): row["value"] for row in map(json.loads, lines)}


@pytest.mark.parametrize("system", ["bf16", "jettison-3.25"])
def test_an_engine_reports_every_figure(system: str, tmp_path: Path) -> None:
    found = measure(system, tmp_path / "model")
    assert found.keys() == EXPECTED
    assert found["64x8192", "capacity_tokens"] == BLOCKS * 32
    assert found["2x96", "prefill_s"] > 0
    assert found["2x96", "decode_tok_s"] * found["2x96", "decode_ms_per_step"] == pytest.approx(2e3)
    assert found["preempting", "preemptions"] > 0, "8 requests of up to 150 tokens do not fit into 384"
    assert found["preempting", "tokens_wanted"] > BLOCKS * 32


def test_the_fixed_tables_have_the_real_bits_of_their_names() -> None:
    for system, pairs in kv_gpu_engine.PACKED.items():
        content = kv_gpu_engine.table(kv_gpu_engine.LLAMA_8B, pairs, "0" * 64)
        bits = [(layer["key_bits"], layer["value_bits"]) for layer in content["payload"]["layers"]]
        real = sum(PageLayout(128, *pair).bytes_per_token(128) * 8 for pair in bits) / (256 * len(bits))
        named = system.removeprefix("jettison-")
        assert real == (6.25 if named == "k8v4" else float(named)), system


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "kv_gpu.json"
    command = [sys.executable, str(HERE / "bench_kv_gpu.py"), "--build", str(tmp_path), "-o", str(output)]
    done = subprocess.run(
        command,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 3
    assert "no CUDA device" in done.stderr
    assert not output.exists()
