"""The main job on a real model: SmolLM2 in vLLM, stock beside Jettison, in the same KV-cache memory.

It runs what a user runs: `jettison kvtuner sensitivity` makes the table, and the engine gets the flags of
`jettison serve --with kvtuner=TABLE`. Results go to `build/demo.json` and to stdout, progress to stderr.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from jettison.hooks import assets
from jettison.hooks.console import print_json, print_table
from jettison.hooks.engine_process import EngineProcess, in_turn
from jettison.hooks.errors import EnvironmentRefused
from jettison.hooks.files import write_atomically
from jettison.hooks.results import Results

RATIO = 3.0
KV_BYTES = 1 << 30
REPEATS = 3
GATES = {"kv_capacity_ratio": (">=", 3.0), "mean_kl": ("<=", 0.02), "top1_agreement": (">=", 0.94)}
Note = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """What both engines are given, as token ids.

    Attributes:
        held_out: texts for KL and top-1, none of them used for calibration.
        questions: title and prompt of each output example.
        load: prompts of the concurrent requests of the speed measurement.
    """

    held_out: list[list[int]]
    questions: list[tuple[str, list[int]]]
    load: list[list[int]]


def run(build: Path, *, as_json: bool = False) -> int:
    """Run the demo and write `demo.json` in `build`; return 0, or 1 if a gate was missed.

    Raises:
        JettisonError: a package is missing, or an engine failed.
    """
    started = time.perf_counter()

    def note(text: str) -> None:
        click.echo(f"[{time.perf_counter() - started:5.0f} s] {text}", err=True)

    build.mkdir(parents=True, exist_ok=True)
    note("model: packaged SmolLM2-135M-Instruct as a bf16 checkpoint")
    model = assets.checkpoint(build)
    table = _table(build, model, note)
    measured = _measure(build, model, table, prepare(model), note)
    facts = _facts(measured, table, time.perf_counter() - started)
    missed = [name for name, (sign, bound) in GATES.items() if not _passes(facts[name], sign, bound)]
    write_atomically(build / "demo.json", json.dumps({**facts, "missed": missed}, indent=1) + "\n")
    if as_json:
        print_json(facts)
    else:
        _show(facts)
    note(f"written: {build / 'demo.json'}" + (f"; missed: {', '.join(missed)}" if missed else ""))
    return 1 if missed else 0


def prepare(model: Path) -> Work:
    """Tokenize the held-out texts, the two questions and the load."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text).ids
        return found

    problems, articles = assets.texts("held-out")
    mathematics = ids(problems[:20_000])
    held_out = [mathematics[:1024], mathematics[1024:2048], *(ids(text)[:1024] for text in articles[:2])]
    tasks = {
        "GSM8K question": assets.gsm8k()[-1]["question"],
        "long document": f"Summarise this text in two sentences.\n\n{assets.long_passage()}",
    }
    load = [ids(text)[:1024] for text in articles[2:10]]
    return Work(held_out, [(title, ids(_chat(task))) for title, task in tasks.items()], load)


def _chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def _table(build: Path, model: Path, note: Note) -> Path:
    """The default table, measured on first use and kept under a name that tells what it was made from."""
    table = build / f"kvtuner-{_fingerprint(model)}.json"
    if table.exists():
        note(f"table: {table.name}, measured before")
        return table
    note("table: sensitivity of every layer, one forward and one backward pass")
    program = "import sys; from jettison.hooks.cli import main; sys.exit(main())"
    arguments = ["kvtuner", "sensitivity", str(model), "--ratio", str(RATIO), "-o", str(table), "--json"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise EnvironmentRefused("jettison kvtuner sensitivity failed", do="see its message above")
    return table


def _fingerprint(model: Path) -> str:
    digest = hashlib.sha256((model / assets.STAMP).read_bytes() + assets.TEXT_PACKAGE.encode() + str(RATIO).encode())
    spec = find_spec("jettison.plugins.kvtuner")
    if spec is None or spec.origin is None:
        raise EnvironmentRefused("plugin 'kvtuner' is not installed", do="reinstall jettison")
    for source in sorted(Path(spec.origin).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def _measure(build: Path, model: Path, table: Path, work: Work, note: Note) -> dict[str, dict[str, Any]]:
    flags = ["--max-model-len", "4096", "--max-num-batched-tokens", "4096", "--max-num-seqs", "16"]
    flags += ["--kv-cache-memory-bytes", str(KV_BYTES), "--enforce-eager", "--dtype", "bfloat16", "--block-size", "128"]
    scratch = Path(tempfile.mkdtemp(prefix=".demo-", dir=build))
    engines: dict[str, EngineProcess] = {}
    found: dict[str, dict[str, Any]] = {}
    try:
        with ExitStack() as stack:
            for name, selections in (("stock", []), ("jettison", [f"kvtuner={table}"])):
                note(f"{name}: start vLLM")
                log = build / f"demo-{name}.log"
                engines[name] = stack.enter_context(EngineProcess(name, [str(model), *flags], selections, log))
                found[name] = _answers(name, engines[name], work, scratch / "stock.safetensors", note)
            note(f"both in turn: speed of {len(work.load)} requests with {len(work.load[0]):,} tokens each")
            for name, speed in in_turn(engines, work.load, tokens=32, repeats=REPEATS).items():
                found[name]["speed"] = speed
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def _answers(name: str, engine: EngineProcess, work: Work, file: Path, note: Note) -> dict[str, Any]:
    note(f"{name}: next-token distributions of {sum(map(len, work.held_out)) - len(work.held_out):,} positions")
    quality = engine.ask("logits", texts=work.held_out, file=str(file), compare=name != "stock")
    note(f"{name}: answers to {len(work.questions)} questions")
    answers = engine.ask("generate", prompts=[prompt for _, prompt in work.questions], tokens=64)["texts"]
    examples = dict(zip((title for title, _ in work.questions), answers, strict=True))
    return {"start": engine.start, "quality": quality, "examples": examples}


def _facts(measured: dict[str, dict[str, Any]], table: Path, seconds: float) -> dict[str, Any]:
    stock, ours = measured["stock"], measured["jettison"]
    report = ours["start"]["status"][0]["plugins"]["kvtuner"]["report"]
    origin = Results.start("jettison demo").model_dump(exclude={"rows"})
    capacities = [side["start"]["tokens"] for side in (stock, ours)]
    decode = [side["speed"]["decode_tokens_per_s"] for side in (stock, ours)]
    prefill = [side["speed"]["prefill_tokens_per_s"] for side in (stock, ours)]
    return {
        **origin,
        "model": "SmolLM2-135M-Instruct",
        "table": {"file": table.name, **report},
        "kv_memory_bytes": KV_BYTES,
        "kv_capacity_tokens": dict(zip(("stock", "jettison"), capacities, strict=True)),
        "kv_capacity_ratio": capacities[1] / capacities[0],
        "bytes_per_token": {"stock": KV_BYTES / capacities[0], "jettison": KV_BYTES / capacities[1]},
        **ours["quality"],
        "decode_tokens_per_s": dict(zip(("stock", "jettison"), decode, strict=True)),
        "decode_ratio": decode[1] / decode[0],
        "prefill_tokens_per_s": dict(zip(("stock", "jettison"), prefill, strict=True)),
        "prefill_ratio": prefill[1] / prefill[0],
        "start_s": {name: side["start"]["start_s"] for name, side in measured.items()},
        "examples": {
            title: {name: side["examples"][title] for name, side in measured.items()} for title in stock["examples"]
        },
        "seconds": seconds,
    }


def _passes(value: float, sign: str, bound: float) -> bool:
    return value >= bound if sign == ">=" else value <= bound


def _show(facts: dict[str, Any]) -> None:
    def pair(name: str, form: str = ",.0f") -> Sequence[str]:
        return [format(facts[name][side], form) for side in ("stock", "jettison")]

    rows = [
        ("KV cache, tokens in 1 GiB", *pair("kv_capacity_tokens"), f"{facts['kv_capacity_ratio']:.2f}x"),
        ("KV cache, bytes per token", *pair("bytes_per_token"), f"1/{facts['kv_capacity_ratio']:.2f}"),
        ("decode, tokens/s", *pair("decode_tokens_per_s", ",.1f"), f"{facts['decode_ratio']:.2f}x"),
        ("prefill, tokens/s", *pair("prefill_tokens_per_s", ",.0f"), f"{facts['prefill_ratio']:.2f}x"),
        ("start, s", *pair("start_s", ".1f"), ""),
        (f"mean KL, nats ({facts['positions']:,} positions)", "0", f"{facts['mean_kl']:.4f}", "limit 0.02"),
        ("same most likely token", "100 %", f"{facts['top1_agreement']:.1%}", "limit 94 %"),
    ]
    layers = ", ".join(f"{count} x {name}" for name, count in facts["table"]["pairs"].items())
    print_table(("", "stock vLLM", "with Jettison", ""), rows, title=f"{facts['model']}: {layers}")
    examples = [(title, *answers.values()) for title, answers in facts["examples"].items()]
    print_table(("asked", "stock vLLM", "with Jettison"), examples)
    click.echo(f"{facts['seconds']:.0f} s in all. Your own: jettison serve MODEL --with kvtuner=TABLE")
