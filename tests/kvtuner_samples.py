"""Small valid tables, and a tiny random model, for the tests of kvtuner."""

from __future__ import annotations

from typing import Any

import torch

from jettison.plugins.kvtuner.table import content_sha256, encode_channels

LAYERS, HEADS, SIZE = 4, 2, 32


def content(layers: int = LAYERS, *, channels: bool = True, **payload: Any) -> dict[str, Any]:
    """A valid table's content; `payload` replaces entries of the payload before it is sealed."""
    generator = torch.Generator().manual_seed(0)
    center = torch.randn(layers, HEADS, SIZE, generator=generator)
    pairs = [(8, 4), (4, 4), (16, 8), (2, 2)]
    return sealed(
        {
            "schema": 1,
            "kind": "kvtuner.table",
            "created": "2026-11-23T12:00:00Z",
            "jettison": "0.1.0",
            "model": {
                "name": "tiny",
                "config_sha256": "0" * 64,
                "num_layers": layers,
                "num_kv_heads": HEADS,
                "head_size": SIZE,
            },
            "source": {
                "method": "test",
                "data": "none",
                "data_sha256": "1" * 64,
                "tokens": 0,
                "seed": 0,
                "capacity_ratio": 3.0,
                "block_size": 128,
                "predicted_kl": 0.01,
            },
            "payload": {
                "layers": [
                    {"layer": n, "key_bits": pairs[n % 4][0], "value_bits": pairs[n % 4][1]} for n in range(layers)
                ],
                "rotate": True,
                "sink_tokens": 1,
                "key_center": encode_channels(center) if channels else None,
                "key_scale": encode_channels(center.abs() + 0.5) if channels else None,
                **payload,
            },
        }
    )


def sealed(table: dict[str, Any]) -> dict[str, Any]:
    """The same content with the hash that belongs to it."""
    return {**table, "payload_sha256": content_sha256(table)}


def searched() -> dict[str, Any]:
    """`content` with everything that a search adds."""
    measured = {
        "data": "random",
        "data_sha256": "2" * 64,
        "positions": 100,
        "kl": 0.02,
        "standard_error": 0.001,
        "top1_agreement": 0.9,
    }
    point = {"pairs": "2xk8v4 k4v4 k2v2", "sink_tokens": 1, "bytes_per_token": 400, "kl": 0.03}
    table = {key: value for key, value in content().items() if key != "payload_sha256"}
    return sealed(
        {
            **table,
            "search": {
                "sampler": "nsga2",
                "seed": 0,
                "trials": 64,
                "evaluations": 60,
                "budget_bytes": 500,
                "groups": [[0, 2], [1], [3]],
                "objective": measured,
                "validation": measured,
                "accuracy": [{"task": "lambada", "correct": 3, "items": 10, "low": 0.1, "high": 0.6}],
                "neighbours": [point],
                "uniform": point,
            },
            "canary": {"tokens": "AQAAAAIAAABwEQEA", "kl": 0.02, "standard_error": 0.001},
            "versions": {"torch": "2.13.0"},
        }
    )


def tiny_model(**changes: Any) -> Any:
    """A random Llama of 2 layers, 4 heads over 2 KV heads of size 32, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": 128,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": SIZE,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()
