"""One vLLM engine with one KV cache, measured in a process of its own: `python kv_gpu_engine.py '{"system": ...}'`.

Every figure is printed as one line `RESULT {"case": ..., "metric": ..., "value": ..., "unit": ...}` as soon as it is
known, so that a run that ends early has given what it measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORKER = "jettison.hooks.vllm.worker.JettisonWorker"
VOCABULARY = 128_000
"""Token ids that prompts are drawn from."""

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_584,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}
"""The shape of Llama-3.1-8B; weights are dummies. Room for a context of 128k and what is decoded after it."""

STOCK = {"bf16": "auto", "fp8": "fp8", "int4_per_token_head": "int4_per_token_head"}
"""System -> `--kv-cache-dtype` of the peers."""

PACKED = {
    "jettison-4.25": ((4, 4),),
    "jettison-3.25": ((4, 4), (2, 2)),
    "jettison-k8v4": ((8, 4),),
}
"""System -> (key bits, value bits), taken in turn by the layers; the number in a name is of real bits per element."""

SYSTEMS = (*STOCK, *PACKED)


def write_model(folder: Path) -> Path:
    """Write the configuration of `LLAMA_8B`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


def table(config: dict[str, Any], pairs: Sequence[tuple[int, int]], config_sha256: str) -> dict[str, Any]:
    """Content of a table with everything that a searched one has: rotation, key centre and key scale."""
    import torch

    from jettison.plugins.kvtuner.table import encode_channels, seal

    layers, heads, size = config["num_hidden_layers"], config["num_key_value_heads"], config["head_dim"]
    ones = torch.ones(layers, heads, size)
    bits = [pairs[layer % len(pairs)] for layer in range(layers)]
    content = {
        "schema": 1,
        "kind": "kvtuner.table",
        "created": "2026-11-23T00:00:00Z",
        "jettison": "0.1.0",
        "model": {
            "name": "bench",
            "config_sha256": config_sha256,
            "num_layers": layers,
            "num_kv_heads": heads,
            "head_size": size,
        },
        "source": {
            "method": "fixed",
            "data": "none",
            "data_sha256": "0" * 64,
            "tokens": 0,
            "seed": 0,
            "capacity_ratio": 1.0,
            "block_size": 128,
            "predicted_kl": 0.0,
        },
        "payload": {
            "layers": [{"layer": n, "key_bits": k, "value_bits": v} for n, (k, v) in enumerate(bits)],
            "rotate": True,
            "sink_tokens": 0,
            "key_center": encode_channels(ones * 0),
            "key_scale": encode_channels(ones),
        },
    }
    return dict(seal(content).content())


def start(system: str, model: Path, options: dict[str, Any]) -> Any:
    """The engine of `system`; `options` are vLLM's own."""
    from vllm import LLM
    from vllm.platforms import current_platform

    settings: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "disable_log_stats": False}
    if system in STOCK:
        settings["kv_cache_dtype"] = STOCK[system]
    else:
        text = (model / "config.json").read_text()
        content = table(json.loads(text), PACKED[system], hashlib.sha256(text.encode()).hexdigest())
        settings["additional_config"] = {"jettison": {"kvtuner": {"table": content}}}
        settings["worker_extension_cls"] = WORKER
        if current_platform.is_cuda():
            settings["attention_backend"] = "CUSTOM"
    return LLM(model=str(model), **{**settings, **options})


class Bench:
    """The measurements of one engine."""

    def __init__(self, llm: Any, vocabulary: int = VOCABULARY) -> None:
        self.llm, self.vocabulary = llm, vocabulary

    def capacity(self) -> None:
        """Tokens of cache, as vLLM allocated it."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        report("64x8192", "capacity_tokens", cache.num_gpu_blocks * cache.block_size, "tokens")

    def case(self, requests: int, context: int, *, decoded: int, repeats: int, profile: bool = False) -> None:
        """Prefill of all prompts at once, and decode over the same prompts, cached by then.

        `profile`: also write a trace of a few steps, not timed (the engine knows the folder).
        """
        name = f"{requests}x{context}"
        prompts = self.prompts([context] * requests, seed=context)
        self.seconds(prompts[:1], 8)
        self.llm.reset_prefix_cache()
        report(name, "prefill_s", self.seconds(prompts, 1), "s")
        report(name, "cached_prefill_s", statistics.median(self.seconds(prompts, 1) for _ in range(1 + repeats)), "s")
        step = statistics.median([self.step_seconds(prompts, decoded) for _ in range(1 + repeats)][1:])
        report(name, "decode_ms_per_step", 1e3 * step, "ms")
        report(name, "decode_tok_s", requests / step, "tokens/s")
        if profile:
            self.llm.start_profile()
            self.seconds(prompts, 9)
            self.llm.stop_profile()
        self.llm.reset_prefix_cache()

    def preempting(self, requests: int, prompt: tuple[int, int], output: tuple[int, int]) -> None:
        """Output tokens/s of a mixed workload, given all at once; lengths are uniform in the ranges."""
        rng = random.Random(7)
        prompts = self.prompts([rng.randint(*prompt) for _ in range(requests)], seed=7)
        outputs = [rng.randint(*output) for _ in range(requests)]
        self.seconds(prompts[:2], 4)
        self.llm.reset_prefix_cache()
        before = self.preemptions()
        seconds = self.seconds(prompts, outputs)
        report("preempting", "output_tok_s", sum(outputs) / seconds, "tokens/s")
        report("preempting", "preemptions", self.preemptions() - before, "count")
        report("preempting", "tokens_wanted", sum(map(len, prompts)) + sum(outputs), "tokens")

    def prompts(self, lengths: Sequence[int], seed: int) -> list[list[int]]:
        """Random prompts that share no prefix."""
        rng = random.Random(seed)
        return [[rng.randrange(self.vocabulary) for _ in range(length)] for length in lengths]

    def seconds(self, prompts: Sequence[Sequence[int]], tokens: int | Sequence[int]) -> float:
        """Seconds of generating `tokens` tokens, one number for all prompts or one each."""
        started = time.perf_counter()
        self.generate(prompts, tokens)
        return time.perf_counter() - started

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int | Sequence[int]) -> list[Any]:
        """The engine's outputs, greedy and of just these lengths."""
        from vllm import SamplingParams

        counts = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
        params = [
            SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False) for count in counts
        ]
        inputs = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs: list[Any] = self.llm.generate(inputs, params, use_tqdm=False)
        return outputs

    def step_seconds(self, prompts: Sequence[Sequence[int]], decoded: int) -> float:
        """Seconds of a decode step of all prompts.

        By the engine's own clock, between the first and the last token of the request that began last: all others
        decode in these steps, and no prefill takes part.
        """
        stats = [output.metrics for output in self.generate(prompts, 1 + decoded)]
        last = max(stats, key=lambda each: each.first_token_ts)
        return (last.last_token_ts - last.first_token_ts) / decoded

    def preemptions(self) -> int:
        """Preemptions so far."""
        metrics = self.llm.get_metrics()
        return sum(int(metric.value) for metric in metrics if metric.name == "vllm:num_preemptions")


def report(case: str, metric: str, value: float, unit: str) -> None:
    """Print one figure."""
    print("RESULT " + json.dumps({"case": case, "metric": metric, "value": value, "unit": unit}), flush=True)


def main(order: dict[str, Any]) -> None:
    """Measure what `order` says: system, model, engine (options of vLLM), cases, decoded, repeats, preempting."""
    started = time.perf_counter()
    bench = Bench(start(order["system"], Path(order["model"]), order["engine"]), order.get("vocabulary", VOCABULARY))
    report("start", "start_s", time.perf_counter() - started, "s")
    bench.capacity()
    for number, (requests, context) in enumerate(order["cases"]):
        profile = order.get("profile", False) and number == 0
        bench.case(requests, context, decoded=order["decoded"], repeats=order["repeats"], profile=profile)
    if order["preempting"]:
        bench.preempting(**order["preempting"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # NOTES: with its engine in this process, vLLM's CUDA build does not come down at exit.
