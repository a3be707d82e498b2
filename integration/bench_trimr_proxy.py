"""What the trimr proxy costs: added latency per token with many streams, and throughput with a dead or slow verifier.

A server in a process of its own sends tokens at a steady rate, each with the time of its sending; the proxy is the real
command in another; this process is the client and measures how old each token is when it arrives, with and without the
proxy. Nothing fires: the thinking states no answer twice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, TCPConnector, web

from jettison.hooks.results import Results

PATH = "/v1/chat/completions"
SENT = re.compile(rb'"sent": ?(\d+)')
WORDS = "so we look at part number {} of it and compute; then the answer is {}.\n\nWait, "
"""One thought of 16 words: every answer is another one, so each is compared and none agrees."""


def upstream(port: int, interval: float) -> None:
    """Serve a model that sends one token of thinking each `interval` seconds."""

    async def tokens(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        head = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m"}
        start = time.monotonic()
        for at in range(body["max_tokens"]):
            thought, word = divmod(at, 16)
            text = WORDS.format(thought, thought).split(" ")[word] + " "
            choice = {"index": 0, "delta": {"reasoning": text}, "finish_reason": None, "token_ids": [at % 30_000]}
            chunk = {**head, "choices": [choice], "sent": time.monotonic_ns()}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
            await asyncio.sleep(max(0.0, start + (at + 1) * interval - time.monotonic()))
        end = {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
        await response.write(f"data: {json.dumps(end)}\n\ndata: [DONE]\n\n".encode())
        return response

    async def stuck(request: web.Request) -> web.Response:
        await asyncio.sleep(10)
        return web.json_response({})

    app = web.Application()
    app.router.add_post(PATH, tokens)
    app.router.add_get("/health", lambda request: asyncio.sleep(0, web.Response()))
    app.router.add_post("/slow/v1/completions", stuck)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


async def load(url: str, streams: int, tokens: int) -> tuple[list[float], float, int]:
    """Run streams at once; return ages of tokens in ms at arrival, tokens per second, and how many streams failed."""
    ages: list[float] = []
    body = {"model": "m", "messages": [{"role": "user", "content": "How many?"}], "stream": True, "max_tokens": tokens}

    async def one(session: ClientSession) -> bool:
        async with session.post(url + PATH, json=body) as response:
            whole = b""
            async for part in response.content.iter_any():
                now = time.monotonic_ns()
                ages.extend((now - int(sent)) / 1e6 for sent in SENT.findall(part))
                whole = (whole + part)[-64:]
            return whole.endswith(b"[DONE]\n\n")

    started = time.monotonic()
    async with ClientSession(connector=TCPConnector(limit=0)) as session:
        done = await asyncio.gather(*(one(session) for _ in range(streams)), return_exceptions=True)
    failed = sum(outcome is not True for outcome in done)
    return ages, len(ages) / (time.monotonic() - started), failed


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def process(*command: str, port: int) -> Iterator[tuple[str, int]]:
    """A child process that serves on a port, until the block ends: its URL and its id."""
    child = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if child.poll() is not None:
                raise SystemExit(f"{command} ended: {child.communicate()[1].decode()}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", child.pid
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def measure(results: Results, streams: int, tokens: int, interval: float, rounds: int) -> int:
    """Add all figures; return the number of failed streams."""
    own, failed = [sys.executable, str(Path(__file__).resolve())], 0
    back = free_port()
    with process(*own, "--serve", str(back), "--interval", str(interval), port=back) as (direct, _):
        dead, slow = f"http://127.0.0.1:{free_port()}/v1", f"{direct}/slow/v1"
        systems: dict[str, dict[str, Any]] = {
            "none": {}, "dead": {"mode": "endpoint", "url": dead, "model": "m"},
            "slow": {"mode": "endpoint", "url": slow, "model": "m"},
        }  # fmt: skip
        for name, verifier in systems.items():
            with tempfile.TemporaryDirectory() as folder:
                options = Path(folder) / "options.json"
                section = {"verifier": verifier, "n_thres": 100_000, "min_thought_tokens": 0}
                options.write_text(json.dumps(section))
                port = free_port()
                command = [str(Path(sys.executable).with_name("jettison")), "trimr", "proxy", "--upstream", direct]
                with process(*command, "--port", str(port), "--options", str(options), port=port) as (url, pid):
                    failed += _compare(results, name, direct, (url, pid), streams, tokens, rounds)
    return failed


def _compare(
    results: Results, name: str, direct: str, proxy: tuple[str, int], streams: int, tokens: int, rounds: int
) -> int:
    """Direct and proxied load in turn, so that both meet the same machine."""
    ages: dict[str, list[float]] = {"direct": [], "proxy": []}
    rates: dict[str, list[float]] = {"direct": [], "proxy": []}
    failed, used = 0, cpu_seconds(proxy[1])
    for _ in range(rounds):
        for system, url in (("direct", direct), ("proxy", proxy[0])):
            got, rate, lost = asyncio.run(load(url, streams, tokens))
            ages[system] += got
            rates[system].append(rate)
            failed += lost
    case = {"none": f"proxy-{streams}", "dead": "proxy-verifier-dead", "slow": "proxy-verifier-slow"}[name]
    for share in (50, 95, 99):
        cut = {system: statistics.quantiles(values, n=100)[share - 1] for system, values in ages.items()}
        results.add(case, "jettison", f"added_latency_p{share}", cut["proxy"] - cut["direct"], "ms")
        results.add(case, "none", f"latency_p{share}", cut["direct"], "ms")
    ratio = statistics.median(rates["proxy"]) / statistics.median(rates["direct"])
    spent = (cpu_seconds(proxy[1]) - used) / len(ages["proxy"])
    results.add(case, "jettison", "cpu_per_token", 1e6 * spent, "us")
    results.add(case, "jettison", "throughput_ratio", ratio, "ratio")
    results.add(case, "jettison", "failed_streams", failed, "streams")
    print(case, *(f"{row.metric} {row.value:.3f}" for row in results.rows if row.case == case and row.system != "none"))
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", type=int, metavar="PORT", help="be the server")
    parser.add_argument("--interval", type=float, default=0.05, help="seconds between tokens of a stream")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "trimr_proxy.json")
    args = parser.parse_args()
    if args.serve:
        upstream(args.serve, args.interval)
        return 0
    results = Results.start()
    failed = measure(results, args.streams, args.tokens, args.interval, args.rounds)
    results.write(args.output)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
