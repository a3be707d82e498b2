"""T6 on real vLLM: SmolLM2 behind a reasoning parser, the proxy before it, greedy tokens as the oracle."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from jettison.hooks.assets import checkpoint
from jettison.plugins.trimr.config import TrimROptions, Verifier
from jettison.plugins.trimr.metrics import Metrics
from jettison.plugins.trimr.proxy import METRICS_PATH, Proxy
from jettison.plugins.trimr.types import Check
from jettison.plugins.trimr.verifier import VerifierClient, client_session
from trimr_servers import chunks_of, joined, post, run, serving

pytestmark = [pytest.mark.assets, pytest.mark.slow]
CEILING = 12
CUTS = TrimROptions(max_think_tokens=CEILING, min_think_tokens=0, poll_tokens=1, forceful="\n\nEnough.\n{end}\n\n")
CALM = TrimROptions(M=64, n_thres=100_000, repeat={"enabled": False})
PATH = "/v1/chat/completions"
BODY = {
    "model": "m", "messages": [{"role": "user", "content": "How many legs have three cats? Think aloud."}],
    "temperature": 0, "max_tokens": 32, "stream": True, "ignore_eos": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with two of its unused special tokens renamed to the thinking strings, and a template that opens them."""
    source, folder = checkpoint(Path("build")), tmp_path_factory.mktemp("thinker")
    for file in source.iterdir():
        if file.name not in ("tokenizer.json", "chat_template.jinja"):
            (folder / file.name).symlink_to(file.resolve())
    text = (source / "tokenizer.json").read_text()
    for old, new in (("<issue_start>", "<think>"), ("<issue_comment>", "</think>")):
        text = text.replace(old, new)
    (folder / "tokenizer.json").write_text(text)
    template = (source / "chat_template.jinja").read_text()
    opened = template.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
    assert opened != template
    (folder / "chat_template.jinja").write_text(opened)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until_up(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} did not come up: {log.read_text()[-3000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(15)


@pytest.fixture(scope="module")
def server(thinker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, log = free_port(), tmp_path_factory.mktemp("log") / "vllm.log"
    command = [
        sys.executable, "-m", "jettison.hooks.vllm.serve", str(thinker), "--port", str(port), "--host", "127.0.0.1",
        "--served-model-name", "m", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024",
        "--reasoning-parser", "deepseek_r1", "--max-num-seqs", "8", "--max-logprobs", "20",
    ]  # fmt: skip
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": "",
           "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        until_up(f"http://127.0.0.1:{port}/health", process, log, 150)
        yield f"http://127.0.0.1:{port}"
    finally:
        end(process)


def proxied(server: str, body: dict[str, Any], options: TrimROptions = CUTS, path: str = PATH, **more: Any) -> bytes:
    async def work() -> bytes:
        async with serving(Proxy(options, server, **more).app()) as address:
            status, answer = await post(address + path, body)
            assert status == 200, answer
            return answer

    return run(work(), 60)


def directly(server: str, body: dict[str, Any], path: str = PATH) -> bytes:
    status, answer = run(post(server + path, body), 60)
    assert status == 200, answer
    return answer


def steady(answer: bytes) -> bytes:
    """An answer without what differs from call to call."""
    return re.sub(rb'"(id|created)":("[^"]*"|\d+)', rb'"\1":0', answer)


def ids_of(answer: bytes) -> list[int]:
    return [i for chunk in chunks_of(answer) for c in chunk["choices"] for i in c.get("token_ids") or ()]


@pytest.mark.parametrize(("stream", "usage"), [(True, False), (True, True), (False, False)])
def test_t6_off_and_calm_streams_equal_direct_access(server: str, stream: bool, usage: bool) -> None:
    body = {**BODY, "stream": stream, **({"stream_options": {"include_usage": True}} if stream and usage else {})}
    expected = steady(directly(server, body))
    assert steady(proxied(server, body, enabled=False)) == expected
    calm = steady(proxied(server, body, CALM))
    if stream:
        assert calm == expected
    else:
        ours, theirs = json.loads(calm), json.loads(expected)
        assert ours["usage"].items() <= theirs["usage"].items()
        for name in ("content", "reasoning"):
            assert ours["choices"][0]["message"].get(name) == theirs["choices"][0]["message"].get(name), name


def test_t6_a_cut_is_token_exact_and_its_usage_adds_up(server: str) -> None:
    asked = {**BODY, "return_token_ids": True, "stream_options": {"include_usage": True}}
    alone = directly(server, asked)
    prompt = next(chunk["prompt_token_ids"] for chunk in chunks_of(alone) if chunk.get("prompt_token_ids"))
    cut = proxied(server, asked)
    got, uncut = ids_of(cut), ids_of(alone)
    guidance = "\n\nEnough.\n</think>\n\n"
    forced = json.loads(directly(server, {"model": "m", "prompt": guidance, "add_special_tokens": False}, "/tokenize"))[
        "tokens"
    ]
    kept = next(n for n in range(len(got)) if got[n : n + len(forced)] == forced)
    assert kept >= CEILING
    assert got[:kept] == uncut[:kept], "what was kept is what the model said"
    rest = {**{name: BODY[name] for name in ("model", "temperature", "stream", "ignore_eos")}, "return_token_ids": True}
    oracle = {**rest, "prompt": prompt + got[: kept + len(forced)], "max_tokens": 32 - kept - len(forced)}
    expected = directly(server, oracle, "/v1/completions")
    assert got[kept + len(forced) :] == ids_of(expected), "the continuation is that of the very same tokens"
    chunks = chunks_of(cut)
    assert joined(chunks, "content") == "\n\n" + joined(chunks_of(expected), "text")
    assert joined(chunks, "reasoning").endswith("\n\nEnough.\n")
    usage = chunks[-1]["usage"]
    [done] = usage["trim"]["cuts"]
    assert (done["rule"], done["force"], done["at_token"]) == ("ceiling", "forceful", kept)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), len(got)) == (len(prompt), 32)


def test_t6_completions_and_several_choices(server: str) -> None:
    body = {"model": "m", "prompt": "Question: 2+2?\n<think>\n", "temperature": 0.8, "seed": 3, "n": 2,
            "max_tokens": 32, "stream": True, "ignore_eos": True, "skip_special_tokens": False}  # fmt: skip
    chunks = chunks_of(proxied(server, body, path="/v1/completions"))
    alone = chunks_of(directly(server, body, "/v1/completions"))
    for index in range(2):
        text, uncut = joined(chunks, "text", index=index), joined(alone, "text", index=index)
        thought, _, answer = text.partition("\n\nEnough.\n</think>\n\n")
        assert answer, text
        assert uncut.startswith(thought), f"choice {index} has the seed that vLLM gives it"


def test_t6_a_client_that_leaves_frees_the_engine(server: str) -> None:
    def running() -> float:
        with urllib.request.urlopen(f"{server}/metrics", timeout=5) as page:
            found = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", page.read().decode(), re.M)
        return sum(map(float, found))

    async def work() -> tuple[float, float]:
        async with serving(Proxy(CALM, server).app()) as address, ClientSession() as session:
            async with session.post(address + PATH, json={**BODY, "max_tokens": 900}) as response:
                await response.content.readany()
                await asyncio.sleep(0.5)
                before = await asyncio.to_thread(running)
            for _ in range(50):
                await asyncio.sleep(0.1)
                if await asyncio.to_thread(running) == 0:
                    break
            return before, await asyncio.to_thread(running)

    assert run(work(), 60) == (1.0, 0.0)


def test_t5_the_served_model_gives_scores(server: str) -> None:
    async def work() -> tuple[Any, Any]:
        async with client_session() as session:
            client = VerifierClient(Verifier(mode="self", deadline_s=30), session, Metrics(), url=f"{server}/v1")
            await client.resolve()
            exist = await client.judge(Check(0, "exist", 0, "How much is 3 times 4?", "So x equals 12."))
            equiv = await client.judge(Check(1, "equiv", 1, "How much is 3 times 4?", "It is 12.", "So 12."))
            return exist, equiv

    exist, equiv = run(work(), 60)
    assert len(exist.scores) == 1, "a real tokenizer and real log-probabilities are understood"
    assert len(equiv.scores) == 2


def test_t6_the_command_serves_and_counts(server: str, tmp_path: Path) -> None:
    options, log = tmp_path / "trimr.json", tmp_path / "proxy.log"
    options.write_text(CUTS.model_dump_json())
    port, trace = free_port(), tmp_path / "traces.jsonl"
    command = [
        str(Path(sys.executable).with_name("jettison")), "trimr", "proxy", "--upstream", server, "--port", str(port),
        "--options", str(options), "--log", str(trace),
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        until_up(f"{url}/health", process, log, 30)
        chunks = chunks_of(directly(url, BODY))
        assert joined(chunks, "reasoning").endswith("Enough.\n")
        with urllib.request.urlopen(url + METRICS_PATH, timeout=5) as page:
            counted = page.read().decode()
        assert 'jettison:thoughts_stopped_total{force="forceful",rule="ceiling",shadow="false"} 1.0' in counted
        assert "three cats" not in trace.read_text() + log.read_text(), "text is not logged unless asked for"
        assert '"decision"' in trace.read_text()
    finally:
        end(process)
    assert process.returncode == 0, log.read_text()
