"""Tiny random causal LMs of every family that `capture` covers, and of some that it refuses."""

from __future__ import annotations

from typing import Any

import torch
import transformers

WINDOW = 48
SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.2,
    "max_position_embeddings": 16384,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2

FAMILIES: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "llama": ("Llama", {}, [-1] * 4),
    "qwen2": ("Qwen2", {}, [-1] * 4),
    "qwen2-sliding": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
        [-1, -1, WINDOW, WINDOW],
    ),
    "qwen3": ("Qwen3", {}, [-1] * 4),
    "mistral": ("Mistral", {"sliding_window": WINDOW}, [WINDOW] * 4),
    "gemma2": (
        "Gemma2",
        {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
         "query_pre_attn_scalar": 16},
        [WINDOW, -1, WINDOW, -1],
    ),
    "gemma3": (
        "Gemma3",
        {"sliding_window": WINDOW, "layer_types": ALTERNATING, "query_pre_attn_scalar": 16},
        [WINDOW, -1, WINDOW, -1],
    ),
    "gpt-oss": (
        "GptOss",
        {"sliding_window": WINDOW, "layer_types": ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2},
        [WINDOW, -1, WINDOW, -1],
    ),
    "phi3": ("Phi3", {"sliding_window": None, "rope_parameters": None}, [-1] * 4),
    "olmo2": ("Olmo2", {}, [-1] * 4),
}  # fmt: skip
"""Name: (class prefix, configuration beyond `SHAPE`, window of each layer)."""


def tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model of `family`, whose attention differs from plain averaging."""
    prefix, extra, _ = FAMILIES[family]
    name = f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    config = getattr(transformers, name)(**{**SHAPE, **extra, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.normal_()
    return model
