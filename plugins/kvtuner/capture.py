"""Stand between a Hugging Face model and its attention, through transformers' own registry of attention functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import Tensor

from jettison.hooks.errors import InputRefused

Attend = Callable[[int, Tensor, Tensor, Tensor, float, int], Tensor]
"""(layer, query [B, Hq, T, D], key, value [B, Hkv, T, D] after RoPE, scale, window or -1) -> output [B, Hq, T, D]."""

NAME = "jettison_kvtuner"
_attend: ContextVar[Attend] = ContextVar(NAME)


@contextmanager
def intercept(model: Any, attend: Attend) -> Iterator[None]:
    """Route every attention layer of `model` through `attend` while the context lasts.

    The model must be fed whole unpadded sequences without a cache (`use_cache=False`): attention is causal.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _dispatch)
    before = model.config._attn_implementation
    token = _attend.set(attend)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _attend.reset(token)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int = -1) -> Tensor:
    """Exact causal attention with grouped heads.

    Args:
        query: [B, Hq, T, D].
        key, value: [B, Hkv, T, D].
        scale: factor of the scores.
        window: visible tokens including the current one, -1 for all.

    Returns:
        [B, Hq, T, D].
    """
    length = query.shape[2]
    if 0 < window < length:
        at = torch.arange(length, device=query.device)
        visible = (at[None] <= at[:, None]) & (at[None] > at[:, None] - window)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale, enable_gqa=True)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def _dispatch(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float | None = None, **options: Any
) -> tuple[Tensor, None]:
    unsupported = sorted(k for k in ("softcap", "s_aux", "alibi") if options.get(k) is not None)
    if unsupported or not getattr(module, "is_causal", True):
        raise InputRefused(
            f"{type(module).__name__} uses {', '.join(unsupported) or 'attention that is not causal'}",
            allowed="sensitivity is measured for plain causal attention",
            do="use a uniform pair for this model, e.g. --with kvtuner=k8v4",
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = options.get("sliding_window") or -1
    output = _attend.get()(module.layer_idx, query, key, value, scale, window)
    return output.transpose(1, 2), None
