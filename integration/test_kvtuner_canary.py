"""The canary against a real server: SmolLM2-135M-Instruct in vLLM with a table, asked over HTTP."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jettison.hooks import assets
from jettison.hooks.cli import main
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner import calibration, canary
from jettison.plugins.kvtuner.presets import model_shape
from jettison.plugins.kvtuner.table import Table, seal

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 192
SERVED = (4, 4)
Pair = tuple[int, int]

pytestmark = [pytest.mark.assets, pytest.mark.slow]


def table(folder: str, pair: Pair, recorded: Any) -> Table:
    """Every layer at `pair`, rotated; `recorded` is the canary."""
    shape = model_shape(folder)
    layers = [{"layer": n, "key_bits": pair[0], "value_bits": pair[1]} for n in range(shape.num_layers)]
    return seal(
        {
            "schema": 1,
            "kind": "kvtuner.table",
            "created": "2026-11-23T12:00:00Z",
            "jettison": "0.1.0",
            "model": shape,
            "source": {
                "method": "test", "data": "none", "data_sha256": "1" * 64, "tokens": 0, "seed": 0,
                "capacity_ratio": 1.0, "block_size": 128,
            },
            "payload": {"layers": layers, "rotate": True, "sink_tokens": 0, "key_center": None, "key_scale": None},
            "canary": recorded,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint() -> str:
    return str(assets.checkpoint(ROOT / "build"))


@pytest.fixture(scope="module")
def tables(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tables of SmolLM2 by what their canary was recorded with; `other` with weights 10 % off."""
    folder = tmp_path_factory.mktemp("tables")
    model, tokenizer = calibration.load_model(checkpoint)
    (ids,) = calibration.token_texts(tokenizer, "held-out", 1, LENGTH)
    paths = {}
    for name, pair in (("k4v4", SERVED), ("k8v8", (8, 8)), ("k2v2", (2, 2)), ("other", SERVED)):
        if name == "other":
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * 0.1)
        formats = [KVFormat(*pair, rotate=True)] * model.config.num_hidden_layers
        paths[name] = folder / f"{name}.json"
        table(checkpoint, pair, canary.record(model, ids.tolist(), formats)).save(paths[name])
    return paths


@pytest.fixture(scope="module")
def server(checkpoint: str, tables: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`jettison serve` with the table of 4 bits, in the checkpoint's own type (bfloat16)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        Path(sys.executable).with_name("jettison"), "serve", checkpoint, "--with", f"kvtuner={tables['k4v4']}",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512", "--enforce-eager",
    ]  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=kept | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 150
        while not healthy(url):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def healthy(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
        return True
    return False


def verify(capsys: pytest.CaptureFixture[str], path: Path, url: str) -> tuple[int, dict[str, Any], str]:
    code = main(["kvtuner", "verify", str(path), "--url", url, "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out.splitlines()[0] if code == 3 else said.out.split('\n{"error"')[0]), said.err


def test_the_served_table_holds(server: str, tables: dict[str, Path], capsys: Any) -> None:
    code, found, said = verify(capsys, tables["k4v4"], server)
    assert (code, found["holds"], found["quantises"]) == (0, True, True), (found, said)
    assert found["tokens"] == LENGTH
    assert found["places"] == LENGTH - 1
    code, again, _ = verify(capsys, tables["k4v4"], server + "/v1/")
    assert (code, again) == (0, found), "the same server, the same figures"
    assert main(["kvtuner", "verify", str(tables["k4v4"]), "--url", server]) == 0
    assert "the server quantises" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("name", ["k8v8", "other"])
def test_a_server_that_errs_more_than_the_table_is_refused(
    server: str, tables: dict[str, Path], name: str, capsys: Any
) -> None:
    """A table of 8 bits served at 4, and a table of other weights."""
    code, found, said = verify(capsys, tables[name], server)
    assert (code, found["holds"]) == (4, False), (name, found)
    assert "the engine differs from the model that the table of" in said, (name, said)


def test_a_server_that_errs_far_less_does_not_quantise_so(server: str, tables: dict[str, Path], capsys: Any) -> None:
    code, found, _ = verify(capsys, tables["k2v2"], server)
    assert (code, found["quantises"]) == (0, False), found


class Stranger(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": []}')

    def log_message(self, *_: Any) -> None:
        return


def test_what_is_no_vllm_server_is_one_sentence(tables: dict[str, Path], checkpoint: str, capsys: Any) -> None:
    path = str(tables["k4v4"])
    with http.server.HTTPServer(("127.0.0.1", 0), Stranger) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{stranger.server_address[1]}"
        assert main(["kvtuner", "verify", path, "--url", url]) == 3
        stranger.shutdown()
    assert "does not answer as a vLLM server" in capsys.readouterr().err
    assert main(["kvtuner", "verify", path, "--url", url]) == 3, "nobody listens any more"
    assert main(["kvtuner", "verify", path, "--url", "file:///etc/hosts"]) == 2
    assert main(["kvtuner", "verify", path]) == 2
    assert main(["kvtuner", "verify", path, checkpoint, "--url", url]) == 2
    old = json.loads(Path(path).read_text())["canary"]
    del old["log_likelihoods"], old["effect"]
    older = Path(path).with_name("older.json")
    table(checkpoint, SERVED, old).save(older)
    capsys.readouterr()
    assert main(["kvtuner", "verify", str(older), "--url", url]) == 4
    assert "has no log-probabilities to compare an engine with" in capsys.readouterr().err
