"""What needs vLLM's own processes: TP=2, plugin faults in a spawned worker (T-3), servers that stop and die (T-9)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vllm_engines import HERE, PROMPTS, WORKER, Answer, difference, generate, install_plugin, install_probe, running

CENTER = [[(head + 1) * 0.01 * (channel % 7) for channel in range(64)] for head in range(2)]
SCALE = [[1.0 + 0.5 * head + 0.01 * channel for channel in range(64)] for head in range(2)]
SECTION = {"probe": {"kv": [[8, 8], [4, 4]], "rotate": True, "sink_tokens": 4, "center": CENTER, "scale": SCALE}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny_models

    return tiny_models.llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def search_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return install_probe(tmp_path_factory.mktemp("probe"))


def environment(search_path: str, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return kept | {"PYTHONPATH": search_path, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **more}


def child(
    model: Path, section: dict[str, Any], env: dict[str, str], *, tokens: int = 8, **options: Any
) -> subprocess.CompletedProcess[str]:
    engine = {
        "model": str(model), "dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 16,
        "block_size": 32, "worker_extension_cls": WORKER, "additional_config": {"jettison": section}, **options,
    }  # fmt: skip
    order = json.dumps({"engine": engine, "tokens": tokens, "prompts": PROMPTS})
    command = [sys.executable, str(HERE / "vllm_child.py"), order]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)


def read_answers(done: subprocess.CompletedProcess[str]) -> tuple[list[Answer], dict[str, Any]]:
    """What a child printed: the answers, and everything as it was printed."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(lines[0].removeprefix("ANSWER "))
    steps = [[{int(t): v for t, v in step.items()} for step in a["logprobs"]] for a in found["answers"]]
    answers = [Answer(tuple(a["tokens"]), tuple(s)) for a, s in zip(found["answers"], steps, strict=True)]
    return answers, dict(found)


def test_two_ranks_give_the_answers_of_one(model: Path, search_path: str) -> None:
    with running(model, SECTION) as llm:
        alone = generate(llm, tokens=8)
    env = environment(search_path, VLLM_CPU_OMP_THREADS_BIND="0|1", VLLM_LOGGING_LEVEL="ERROR")
    done = child(model, SECTION, env, tensor_parallel_size=2)
    split, found = read_answers(done)
    worst = difference(split, alone)
    assert worst < 5e-3, f"two ranks: log-probabilities differ by {worst}"
    assert [s["process"]["rank"] for s in found["status"]] == [0, 1]
    first, second = ({k: s[k] for k in ("layers", "plugins", "faults")} for s in found["status"])
    assert first == second


def test_a_plugin_whose_module_is_broken_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "broken_probe.py").write_text("raise ImportError('broken on purpose')\n")
    search_path = install_plugin(tmp_path, "brokenprobe", "broken_probe", tmp_path)
    done = child(model, {"brokenprobe": {}}, environment(search_path))
    assert done.returncode != 0
    assert "ANSWER" not in done.stdout
    text = done.stdout + done.stderr
    assert "plugin 'brokenprobe'" in text, text[-3000:]
    assert "broken on purpose" in text


def test_a_filter_that_leaves_us_out_is_named(model: Path, search_path: str) -> None:
    done = child(model, SECTION, environment(search_path, VLLM_PLUGINS="other"))
    assert done.returncode != 0
    assert "VLLM_PLUGINS=other keeps vLLM from loading the plugin 'jettison'" in done.stdout + done.stderr


class Server:
    """A real server process in a session of its own, so that every process it starts can be found."""

    def __init__(self, model: Path, search_path: str, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.model = str(model)
        command = [
            Path(sys.executable).with_name("jettison"), "serve", self.model, "--host", "127.0.0.1", "--port",
            str(self.port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024",
            "--with", f"probe={json.dumps(SECTION['probe'])}",
        ]  # fmt: skip
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, env=environment(search_path), stdout=out, stderr=out, start_new_session=True
            )
        self._until(self._healthy, 120, "became healthy")

    def _healthy(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
            return True
        return False

    def complete(self, tokens: int) -> int:
        """Ask for tokens; return how many came, 0 if the server ended the request, -1 if it left it hanging."""
        body = {"model": self.model, "prompt": list(PROMPTS[1]), "max_tokens": tokens, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return int(json.load(answer)["usage"]["completion_tokens"])
        except OSError as error:
            return -1 if isinstance(getattr(error, "reason", error), TimeoutError) else 0

    def members(self) -> list[int]:
        """The living processes of the server's session."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ProcessLookupError):
                fields = stat.read_text().rsplit(")", 1)[1].split()
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found.append(int(stat.parent.name))
        return found

    def engine(self) -> int:
        """The engine core's process."""
        for pid in self.members():
            if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise AssertionError("no engine process")

    def gone(self, seconds: float) -> None:
        self.process.wait(seconds)
        self._until(lambda: not self.members(), 20, "left no process behind")

    def _until(self, done: Any, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, f"the server never {what}: {self.members()} {self.log.read_text()[-3000:]}"
            time.sleep(0.2)

    def kill(self) -> None:
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def servers(model: Path, search_path: str, tmp_path: Path) -> Iterator[Any]:
    started: list[Server] = []

    def start() -> Server:
        started.append(Server(model, search_path, tmp_path / f"server-{len(started)}.log"))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.mark.slow
def test_servers_start_stop_and_die_cleanly(servers: Any) -> None:
    shared = set(os.listdir("/dev/shm"))
    for end in ("SIGTERM with streams", "SIGKILL of the engine"):
        server = servers()
        assert server.complete(4) == 4
        with ThreadPoolExecutor(8) as pool:
            streams = [pool.submit(server.complete, 800) for _ in range(8)]
            time.sleep(1.0)
            if end.startswith("SIGTERM"):
                server.process.terminate()
            else:
                os.kill(server.engine(), signal.SIGKILL)
            server.gone(60)
            answered = [stream.result() for stream in streams]
        # NOTES: vLLM ends what is under way with the tokens so far, or our middleware with status 503.
        assert -1 not in answered, f"{end}: {answered}"
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", server.port))
        left = {name for name in set(os.listdir("/dev/shm")) - shared if not name.startswith("sem.")}
        assert not left, f"{end}: shared memory was left behind: {left}"
