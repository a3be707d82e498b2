"""The measuring end of the demo and the benchmarks: engines in processes of their own, told what to do."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from jettison.hooks.engine_process import EngineProcess, in_turn
from jettison.hooks.errors import EnvironmentRefused

FLAGS = ("--max-model-len", "512", "--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager", "--dtype", "float32")
TEXTS = [[(7 * i + 11 * j) % 250 for i in range(200)] for j in range(2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("measure") / "llama")


@pytest.fixture(scope="module")
def engines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("logs")
    selections = {"stock": [], "k16v16": ["kvtuner=k16v16"], "k4v4": ["kvtuner=k4v4"]}
    opened: dict[str, EngineProcess] = {}
    try:
        for name, chosen in selections.items():
            opened[name] = EngineProcess(name, [str(model), *FLAGS], chosen, folder / f"{name}.log")
        yield opened
    finally:
        for engine in opened.values():
            engine.close()


def test_quality_inside_the_engine(engines, tmp_path):
    """Identity formats agree with stock; 4 bits do not; every prompt position but the last is compared."""
    file = str(tmp_path / "stock.safetensors")
    engines["stock"].ask("logits", texts=TEXTS, file=file, compare=False)
    answers = {name: engines[name].ask("logits", texts=TEXTS, file=file, compare=True) for name in ("k16v16", "k4v4")}
    for name, answer in answers.items():
        assert answer["positions"] == sum(len(text) - 1 for text in TEXTS), name
    assert 0 <= answers["k16v16"]["mean_kl"] < 1e-5
    assert answers["k16v16"]["mean_kl"] < answers["k4v4"]["mean_kl"] / 5, answers


def test_capacity_is_counted_in_real_bytes(engines):
    tokens = {name: engine.start["tokens"] for name, engine in engines.items()}
    assert tokens["k16v16"] == 2 * tokens["stock"], "stock is float32 here"
    assert tokens["k4v4"] / tokens["k16v16"] == pytest.approx(256 / (32 + 32 + 8), rel=0.03), tokens


def test_what_is_in_force_is_reported(engines):
    assert engines["stock"].start["status"] is None
    report = engines["k4v4"].start["status"][0]["plugins"]["kvtuner"]["report"]
    assert report["pairs"] == {"k4v4": tiny_models.LAYERS}


def test_speeds_are_measured_in_turn(engines):
    pair = {name: engines[name] for name in ("stock", "k4v4")}
    found = in_turn(pair, TEXTS, tokens=4, repeats=2)
    for name, figures in found.items():
        assert figures["decode_tokens_per_s"] > 0, name
        assert [len(values) for values in figures["samples"].values()] == [1, 2, 2], name


def test_a_failed_command_names_the_log_and_the_engine_lives_on(engines):
    with pytest.raises(EnvironmentRefused, match=r"engine 'stock' failed \(AttributeError.*stock.log"):
        engines["stock"].ask("no_such_command")
    assert engines["stock"].ask("generate", prompts=TEXTS, tokens=2)["texts"]


def test_an_engine_that_does_not_start_leaves_no_process(tmp_path):
    with pytest.raises(EnvironmentRefused, match=r"read .*bad\.log"):
        EngineProcess("bad", [str(tmp_path / "no-model"), *FLAGS], [], tmp_path / "bad.log")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _children():
        time.sleep(0.1)
    assert not [child for child in _children() if str(tmp_path) in child]


def _children() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"PPid:\t{os.getpid()}\n" in (entry / "status").read_text():
                    found.append((entry / "cmdline").read_text())
            except OSError:
                continue
    return found
