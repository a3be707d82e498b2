"""Decode, prefill and capacity on one GPU: vLLM with bf16, fp8 and int4 caches, and with packed pages of Jettison.

    python integration/bench_kv_gpu.py [--systems bf16 jettison-4.25] [--cases 64x8192 1x8192] [--preempting]

Llama-3.1-8B's shape with dummy weights. Every system runs in a process of its own with a time limit. A figure
replaces the one that the result file has of it, so that systems and cases can be measured in several runs on one kind
of device. Without a CUDA device nothing is measured (exit code 3).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jettison.hooks.console import print_table
from jettison.hooks.results import Results, load
from kv_gpu_engine import PACKED, STOCK, SYSTEMS, write_model

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
OTHER_CASES = ("1x8192", "8x8192", "256x2048", "64x512", "16x32768", "4x131072")


def main() -> int:
    options = _options()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 3
    results = _begin(options)
    model = write_model(options.build / "llama-3.1-8b-shape")
    failed = []
    for system in options.systems:
        for command in _commands(system, model, options):
            ended = _measure(results, system, command, options)
            failed += [f"{system}: {ended}"] if ended else []
            results.write(options.output)
    _show(results)
    print("\n".join(failed) or f"written: {options.output}")
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--cases", nargs="*", default=["64x8192"], help=f"REQUESTSxCONTEXT; others: {OTHER_CASES}")
    parser.add_argument("--decoded", type=int, default=128, help="decode steps that are timed together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--preempting", action="store_true", help="also long answers to more requests than bf16 can hold"
    )
    parser.add_argument("--requests", type=int, default=320, help="of the preempting workload")
    parser.add_argument("--prompt", type=int, nargs=2, default=[256, 2048], help="tokens, lowest and highest")
    parser.add_argument("--answer", type=int, nargs=2, default=[2048, 6144], help="tokens, lowest and highest")
    parser.add_argument("--profile", type=Path, help="folder for torch profiles of a few steps of the first case")
    parser.add_argument("--no-kernels", action="store_true", help="leave the kernels' own figures out")
    parser.add_argument("--memory", type=float, default=0.9, help="vLLM's --gpu-memory-utilization")
    parser.add_argument("--seconds", type=float, default=540.0, help="limit of each process")
    parser.add_argument("--fresh", action="store_true", help="forget what the result file holds")
    parser.add_argument("--build", type=Path, default=HERE.parent / "build")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "kv_gpu.json")
    return parser.parse_args()


def _begin(options: argparse.Namespace) -> Results:
    results = Results.start()
    if options.output.exists() and not options.fresh:
        before = load(options.output)
        if before.device == results.device:
            results.rows = before.rows
    return results


def _commands(system: str, model: Path, options: argparse.Namespace) -> Iterator[list[str]]:
    if system in PACKED and not options.no_kernels:
        yield [sys.executable, str(HERE / "kv_gpu_kernels.py"), system]
    cases = [tuple(map(int, case.split("x"))) for case in options.cases]
    longest = max([context + options.decoded for _, context in cases] + [sum((options.prompt[1], options.answer[1]))])
    engine: dict[str, Any] = {
        "max_model_len": longest + 16,
        "max_num_seqs": max([64, *(requests for requests, _ in cases)] + [options.requests] * options.preempting),
        "gpu_memory_utilization": options.memory,
        "dtype": "bfloat16",
    }
    if options.profile:
        engine["profiler_config"] = {
            "profiler": "torch",
            "torch_profiler_dir": str(options.profile.resolve() / system),
            "torch_profiler_with_stack": False,
        }
    order: dict[str, Any] = {
        "system": system,
        "model": str(model),
        "engine": engine,
        "cases": cases,
        "decoded": options.decoded,
        "repeats": options.repeats,
        "profile": bool(options.profile),
        "preempting": None,
    }
    if options.preempting:
        order["preempting"] = {"requests": options.requests, "prompt": options.prompt, "output": options.answer}
    yield [sys.executable, str(HERE / "kv_gpu_engine.py"), json.dumps(order)]


def _measure(results: Results, system: str, command: list[str], options: argparse.Namespace) -> str:
    """Run one process and take its figures; returns what went wrong, or nothing."""
    log = options.build / f"bench-gpu-{system}-{Path(command[1]).stem}.log"
    plugins = {"VLLM_PLUGINS": ""} if system in STOCK else {}
    started = time.monotonic()
    print(f"{system}: {Path(command[1]).name}, log in {log}", file=sys.stderr, flush=True)
    with log.open("w") as errors, log.with_suffix(".out").open("w+") as out:
        child = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT, **plugins}, stdout=out, stderr=errors, start_new_session=True
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(options.seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # vLLM's engine process outlives its client
        child.wait()
        out.seek(0)
        text = out.read()
    for line in text.splitlines():
        if line.startswith("RESULT "):
            figure = json.loads(line.removeprefix("RESULT "))
            again = (figure["case"], system, figure["metric"])
            results.rows = [row for row in results.rows if (row.case, row.system, row.metric) != again]
            row = results.add(system=system, **figure)
            print(f"RESULT {row.case} {row.system} {row.metric} {row.value:.5g} {row.unit}", flush=True)
    if child.returncode == 0:
        return ""
    ended = f"exit code {child.returncode} after {time.monotonic() - started:.0f} s"
    return f"{ended}: {' | '.join(log.read_text().strip().splitlines()[-3:])}"


def _show(results: Results) -> None:
    metrics = list(dict.fromkeys((row.case, row.metric, row.unit) for row in results.rows))
    found = {(row.case, row.metric, row.system): row.value for row in results.rows}
    rows = [
        (case, f"{metric}, {unit}", *(found.get((case, metric, system)) for system in SYSTEMS))
        for case, metric, unit in metrics
    ]
    print_table(("case", "metric", *SYSTEMS), rows, title=results.device)


if __name__ == "__main__":
    sys.exit(main())
