"""Decode, prefill and start-up of vLLM with and without a packed KV cache: SmolLM2, 16 requests at 4,096 and at 512.

    python integration/bench_kv_cpu.py [--contexts 4096 512] [--requests 16] [--repeats 5]

Stock vLLM, the default table and uniform K8V8 stand side by side, each in its own process, and are measured in turn; a
figure is the median over the repeats, a ratio is the median of the ratios within one round. The physical limit of a
decode step is the bytes that it must read (weights once, every cached token once) over the read bandwidth of this
machine, measured in the same run; arithmetic is not in it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jettison.hooks import assets
from jettison.hooks.console import print_table
from jettison.hooks.engine_process import EngineProcess, in_turn
from jettison.hooks.results import Results

HERE = Path(__file__).resolve().parent
KV_BYTES = 2 << 30
DECODED = 33
"""Tokens per request that the longest sample adds to a context."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=HERE.parent / "build")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 512])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="decode samples of each engine")
    parser.add_argument("--prefills", type=int, default=2, help="prefill samples of each engine")
    parser.add_argument("--starts", type=int, default=3, help="starts of stock and of the table, in turn")
    parser.add_argument("--table", type=Path, help="default: the 3x table, measured on first use")
    parser.add_argument(
        "--compile", action="store_true", help="with torch.compile, vLLM's default (default here: eager)"
    )
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "kv_cpu.json")
    options = parser.parse_args()
    results = Results.start()
    model = assets.checkpoint(options.build)
    systems = {"vllm": [], "jettison": [f"kvtuner={options.table or _table(options.build, model)}"]}
    systems["jettison k8v8"] = ["kvtuner=k8v8"]
    bandwidth = _read_bandwidth()
    results.add("machine", "memory", "read_bandwidth", bandwidth / 1e9, "GB/s")
    flags = _flags(model, options)
    _starts(results, systems, flags, options)
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(EngineProcess(name, flags, chosen, options.build / f"bench-{n}.log"))
            for n, (name, chosen) in enumerate(systems.items())
        }
        for context in options.contexts:
            case = f"{options.requests}x{context}"
            prompts = _prompts(model, options.requests, context)
            found = in_turn(
                engines, prompts, tokens=DECODED - 1, repeats=options.repeats, prefills=options.prefills, note=_note
            )
            weights = (model / "model.safetensors").stat().st_size
            for name, figures in found.items():
                per_token = KV_BYTES / engines[name].start["tokens"]
                step = weights + options.requests * (context + DECODED / 2) * per_token
                _record(results, case, name, figures, found["vllm"], options.requests * bandwidth / step)
                results.add(case, name, "kv_bytes_per_token", per_token, "bytes")
            results.write(options.output)
    _show(results, systems, options)


def _flags(model: Path, options: argparse.Namespace) -> list[str]:
    longest = max(options.contexts) + DECODED + 1
    flags = [
        str(model),
        "--dtype",
        "bfloat16",
        "--max-model-len",
        str(longest),
        "--max-num-seqs",
        str(options.requests),
    ]
    flags += ["--kv-cache-memory-bytes", str(KV_BYTES), "--max-num-batched-tokens", "2048"]
    return flags if options.compile else [*flags, "--enforce-eager"]


def _starts(results: Results, systems: dict[str, list[str]], flags: list[str], options: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {"vllm": [], "jettison": []}
    for number in range(options.starts):
        for name, found in seconds.items():
            _note(f"{name}: start {number + 1} of {options.starts}")
            with EngineProcess(name, flags, systems[name], options.build / "bench-start.log") as engine:
                found.append(engine.start["start_s"])
    for name, found in seconds.items():
        if found:
            results.add("start", name, "start_s", statistics.median(found), "s")
    if options.starts:
        pairs = zip(seconds["jettison"], seconds["vllm"], strict=True)
        results.add("start", "jettison", "start_ratio", statistics.median(a / b for a, b in pairs), "ratio")


def _record(
    results: Results, case: str, name: str, figures: dict[str, Any], stock: dict[str, Any], limit: float
) -> None:
    for what in ("decode", "prefill"):
        key = f"{what}_tokens_per_s"
        results.add(case, name, key, figures[key], "tokens/s")
        rounds = zip(figures["samples"][key], stock["samples"][key], strict=True)
        results.add(case, name, f"{what}_ratio", statistics.median(a / b for a, b in rounds), "ratio")
    results.add(case, name, "decode_limit_tokens_per_s", limit, "tokens/s")
    results.add(case, name, "decode_share_of_limit", figures["decode_tokens_per_s"] / limit, "ratio")


def _table(build: Path, model: Path) -> Path:
    table = build / "kvtuner-bench.json"
    if not table.exists():
        _note("table: sensitivity pass")
        program = "import sys; from jettison.hooks.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", program, "kvtuner", "sensitivity", str(model), "-o", str(table), "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return table


def _prompts(model: Path, count: int, length: int) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids: list[int] = []
    for article in assets.texts("held-out")[1]:
        ids += tokenizer.encode(article).ids
        if len(ids) >= count * length:
            return [ids[n * length : (n + 1) * length] for n in range(count)]
    raise SystemExit(f"the packaged articles hold {len(ids)} tokens, {count * length} are needed")


def _read_bandwidth() -> float:
    """Bytes/s of summing 1 GiB in memory with all threads, best of five."""
    import torch

    data = torch.ones(1 << 27, dtype=torch.int64)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - started))
    return best


def _note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def _show(results: Results, systems: dict[str, list[str]], options: argparse.Namespace) -> None:
    metrics = ("decode_tokens_per_s", "decode_ratio", "decode_share_of_limit", "prefill_tokens_per_s", "prefill_ratio")
    cases = [f"{options.requests}x{context}" for context in options.contexts]
    rows = [
        (case, name, *(results.value(case, metric, name) for metric in metrics)) for case in cases for name in systems
    ]
    print_table(("case", "system", *metrics), rows, title=f"written: {options.output}")


if __name__ == "__main__":
    main()
