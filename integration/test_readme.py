"""Every command of the README, executed. Benchmarks run at a small size, the server until its first token."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MODEL = "build/SmolLM2-135M-Instruct"
SMALL = {
    "python integration/bench_kv_cpu.py": "--contexts 64 --requests 2 --repeats 1 --prefills 1 --starts 0",
    "python integration/bench_kl_curve.py": "--quick --positions 64",
    "python integration/bench_kv_quality.py": "--quick",
}
FEW = {
    "jettison kvtuner search": "--trials 6 --population 4 --length 128 --search-length 64 --finalists 2 --items 0",
    "jettison kvtuner compare": "--texts 1 --length 128",
    "jettison kvtuner check": "--texts 1 --length 128",
    "jettison kvtuner drift": "--length 128",
}
"""Options that make a command of the README short."""
WITHOUT_CUDA = {"python integration/check_cuda.py": 3, "python integration/bench_kv_gpu.py": 3}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def run(command: str, seconds: float = 400) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(BIN), os.environ["PATH"]))
    # Under `make test` this is a make within a make; it must behave as at a prompt.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "MAKE", "MFLAGS"))}
    return subprocess.run(
        shlex.split(command), cwd=ROOT, env={**kept, "PATH": path}, capture_output=True, text=True, timeout=seconds,
        check=False,
    )  # fmt: skip


def test_the_readme_has_the_commands_of_this_file() -> None:
    found = commands()
    assert found[:2] == ["make demo", "make test"]
    assert all(command in found for command in (*SMALL, *WITHOUT_CUDA)), found


@pytest.mark.slow
def test_make_demo_is_the_main_job() -> None:
    done = run("make demo", 600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = json.loads((ROOT / "build/demo.json").read_text())
    assert facts["missed"] == []
    assert facts["kv_capacity_ratio"] >= 3.0
    assert facts["mean_kl"] <= 0.02
    assert facts["top1_agreement"] >= 0.94
    assert facts["positions"] >= 2000


def test_make_test_runs_both_sets() -> None:
    done = run("make -n test")
    for folder in ("tests", "integration"):
        assert f"-m pytest {folder}" in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith(("make ", "jettison serve "))])
def test_command(command: str, tmp_path: Path) -> None:
    """In the order of the README, after `make demo` has made the checkpoint."""
    small = f" {SMALL[command]} -o {tmp_path / 'results.json'}" if command in SMALL else ""
    few = next((f" {options}" for name, options in FEW.items() if command.startswith(name)), "")
    done = run(command + small + few)
    expected = 0 if _cuda() else WITHOUT_CUDA.get(command, 0)
    assert done.returncode == expected, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    if command in SMALL:
        assert json.loads((tmp_path / "results.json").read_text())["rows"]


@pytest.mark.slow
def test_the_hugging_face_example(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    monkeypatch.chdir(ROOT)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    inputs = {**tokenizer("The capital of France is", return_tensors="pt"), "max_new_tokens": 8, "do_sample": False}
    names = {"model": model, "inputs": inputs}
    exec(block, names)  # the README's own text
    cache = names["cache"]
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 7
    assert cache.nbytes > 0


@pytest.mark.slow
def test_the_server_answers(tmp_path: Path) -> None:
    (command,) = [c for c in commands() if c.startswith("jettison serve ")]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [str(BIN / "jettison"), *shlex.split(command)[1:]]
    words += ["--port", str(port), "--host", "127.0.0.1", "--enforce-eager"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    log = tmp_path / "server.log"
    with log.open("w") as out:
        env = {**kept, "VLLM_CPU_KVCACHE_SPACE": "1"}
        server = subprocess.Popen(words, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        body = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        answer = _ask(server, f"http://127.0.0.1:{port}", body, log)
        assert answer["usage"]["completion_tokens"] == 8
        assert "Paris" in answer["choices"][0]["text"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def _ask(server: subprocess.Popen[bytes], url: str, body: dict[str, object], log: Path) -> dict[str, object]:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    end = time.monotonic() + 180
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))
        time.sleep(0.5)
    raise AssertionError(f"no answer within three minutes: {log.read_text()[-3000:]}")


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
