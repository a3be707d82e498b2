"""Real vLLM engines on tiny models, in this process, for the tests beside this file.

Import it before vLLM: it sets the environment that vLLM reads at import.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import tiny_models

WORKER = "jettison.hooks.vllm.worker.JettisonWorker"
POLICIES = "jettison.hooks.vllm.policies:PolicyProcessor"
HERE = Path(__file__).parent
KV_BYTES = 1 << 30
PROMPTS = tuple(tuple((i * 7 + j * 13) % 250 for i in range(30 + 45 * j)) for j in range(4))
"""Four prompts of 30 to 165 token ids: shorter and longer than a block of 32, a chunk of 48 and a window of 64."""


@dataclass(frozen=True)
class Answer:
    """One request's output: token ids, and for each the log-probabilities of the likeliest 20 ids."""

    tokens: tuple[int, ...]
    logprobs: tuple[Mapping[int, float], ...]


def install_probe(folder: Path) -> str:
    """Write the metadata that makes `probe_plugin` an installed plugin; return the PYTHONPATH for child processes."""
    return install_plugin(folder, "probe", "probe_plugin", HERE)


def install_plugin(folder: Path, name: str, module: str, source: Path) -> str:
    """Make `module`, found in `source`, the plugin `name` of this process; return the PYTHONPATH for children."""
    info = folder / f"jettison_{name}-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: jettison-{name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[jettison.plugins]\n{name} = {module}\n")
    for path in (str(folder), str(source)):
        if path not in sys.path:
            sys.path.append(path)
    importlib.invalidate_caches()
    forget_host()
    return os.pathsep.join([str(folder), str(source)])


def forget_host() -> None:
    """Have the next engine discover the plugins anew."""
    from jettison.hooks.vllm import engine

    engine.host.cache_clear()


@contextmanager
def running(model: Path, section: Mapping[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """A vLLM engine in this process with this `jettison` section; None is a stock engine, with our worker extension.

    One at a time: vLLM keeps the groups of its ranks per process, and an engine that ends takes them along.
    """
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "block_size": 32,
        "disable_log_stats": True,
        "worker_extension_cls": WORKER,
        "additional_config": {} if section is None else {"jettison": dict(section)},
    }
    llm = LLM(model=str(model), **{**settings, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def generate(
    llm: Any,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    *,
    tokens: int = 12,
    extra: Sequence[Mapping[str, Any] | None] | None = None,
    logprobs: int | None = 20,
    **sampling: Any,
) -> list[Answer]:
    """Greedy answers (unless `sampling` says otherwise) to all prompts in one batch; `extra` is per request."""
    from vllm import SamplingParams

    options = {"temperature": 0.0, "max_tokens": tokens, "logprobs": logprobs, "ignore_eos": True, **sampling}
    params = [SamplingParams(**options, extra_args=dict(e) if e else None) for e in extra or [None] * len(prompts)]
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
    return [_answer(output.outputs[0]) for output in outputs]


def _answer(output: Any) -> Answer:
    steps = [{token: entry.logprob for token, entry in step.items()} for step in output.logprobs or []]
    return Answer(tuple(output.token_ids), tuple(steps))


def difference(ours: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    """Largest difference of a log-probability that both report; the tokens must agree."""
    worst = 0.0
    for row, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.tokens == b.tokens, f"request {row}: {a.tokens} instead of {b.tokens}"
        for step, (x, y) in enumerate(zip(a.logprobs, b.logprobs, strict=True)):
            common = x.keys() & y.keys()
            assert len(common) >= len(x) // 2, f"request {row}, step {step}: the likeliest ids differ"
            worst = max(worst, *(abs(x[t] - y[t]) for t in common))
    return worst


def layers_of(llm: Any) -> dict[str, Any]:
    """The attention layers of an engine in this process, by name."""
    return dict(runner_of(llm).compilation_config.static_forward_context)


def runner_of(llm: Any) -> Any:
    """The model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def num_blocks(llm: Any) -> int:
    """Blocks in the engine's pool."""
    return int(llm.llm_engine.vllm_config.cache_config.num_gpu_blocks)


def status_of(llm: Any) -> dict[str, Any]:
    """What the worker says is in force."""
    answer = llm.collective_rpc("jettison_status")[0]
    assert isinstance(answer, dict)
    return answer


def models(folder: Path) -> dict[str, Path]:
    """Write the tiny models into `folder`: float32 ones, and `llama_bf16`."""
    import torch

    made = {name: getattr(tiny_models, name)(folder / name) for name in ("llama", "mistral", "gemma2")}
    made["llama_bf16"] = tiny_models.llama(folder / "llama_bf16", torch.bfloat16)
    return made
