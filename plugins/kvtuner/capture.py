"""Stand between a Hugging Face model and its attention, through transformers' own registry of attention functions.

Covered is every decoder whose layers call that registry with one key and one value per KV head: full or sliding-window,
soft-capped scores (Gemma 2), learned sinks in the softmax (GPT-OSS), any grouping of heads. Scores are made for `ROWS`
queries at a time, so that long texts fit: no [T, T] table exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jettison.hooks.errors import InputRefused

ROWS = 128
"""Queries whose scores exist at a time."""

NAME = "jettison_kvtuner"


@dataclass(frozen=True)
class Rule:
    """How a layer attends.

    Attributes:
        scale: factor of the scores.
        window: visible tokens including the current one, -1 for all.
        softcap: c of c * tanh(score / c), or None.
        sinks: [Hq], one learned score per head that takes part in the softmax and has no value, or None.
    """

    scale: float
    window: int = -1
    softcap: float | None = None
    sinks: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`causal_attention` by this rule."""
        return causal_attention(query, key, value, self.scale, self.window, softcap=self.softcap, sinks=self.sinks)


Attend = Callable[[int, Tensor, Tensor, Tensor, Rule], Tensor]
"""(layer, query [B, Hq, T, D], key, value [B, Hkv, T, D] after RoPE, rule) -> output [B, Hq, T, D]."""

_attend: ContextVar[Attend] = ContextVar(NAME)


@contextmanager
def intercept(model: Any, attend: Attend) -> Iterator[None]:
    """Route every attention layer of `model` through `attend` while the context lasts.

    The model must be fed whole unpadded sequences without a cache (`use_cache=False`): attention is causal.

    Raises:
        InputRefused: the model's attention is of a kind that has no keys and values to measure.
    """
    from transformers import AttentionInterface

    check_model(model)
    AttentionInterface.register(NAME, _dispatch)
    before = model.config._attn_implementation
    token = _attend.set(attend)
    try:
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise _refused(f"{type(model).__name__} does not use transformers' registry of attention functions")
        yield
    finally:
        model.set_attn_implementation(before)
        _attend.reset(token)


def check_model(model: Any) -> None:
    """Refuse, with its reason, what `intercept` could not measure rightly.

    Raises:
        InputRefused: multi-head latent attention, chunked or linear attention, layers that share a cache.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "kv_lora_rank", None):
        raise _refused(
            f"{type(model).__name__} uses multi-head latent attention: its cache holds one latent per token, not keys "
            "and values of heads"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise _refused(f"{config.num_kv_shared_layers} layers of {type(model).__name__} read another layer's cache")
    if strange := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise _refused(f"{type(model).__name__} has layers of {', '.join(strange).replace('_', ' ')}")


def _refused(found: str) -> InputRefused:
    return InputRefused(
        found,
        allowed="measured is causal attention, full or sliding, with keys and values per head in every layer",
        do="serve this model without a table",
    )


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int = -1,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Exact causal attention with grouped heads.

    Args:
        query: [B, Hq, T, D].
        key, value: [B, Hkv, T, D].
        scale, window, softcap, sinks: see `Rule`.

    Returns:
        [B, Hq, T, D], of the type of `query`.
    """
    length = query.shape[2]
    if softcap is None and sinks is None and not 0 < window < length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    rule = Rule(scale, window, softcap, sinks)
    parts = [_attend_chunk(chunk, query, key, value, rule) for chunk in chunks(length, window)]
    return torch.cat(parts, 2).to(query.dtype)


def _attend_chunk(chunk: Chunk, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    if rule.softcap is None and rule.sinks is None:
        rows, columns = slice(chunk.start, chunk.stop), slice(chunk.low, chunk.stop)
        return F.scaled_dot_product_attention(
            query[:, :, rows],
            key[:, :, columns],
            value[:, :, columns],
            attn_mask=chunk.visible(query.device),
            scale=rule.scale,
            enable_gqa=True,
        )

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return apply(chunk.weights(query, key, rule), value, chunk)

    # NOTES: a graph would hold the scores of all chunks until the backward pass.
    return checkpoint(run, query, key, value, use_reentrant=False) if query.requires_grad else run(query, key, value)


@dataclass(frozen=True)
class Chunk:
    """Queries `start` to `stop`, and the keys `low` to `stop` that any of them may see."""

    start: int
    stop: int
    low: int
    window: int

    def weights(self, query: Tensor, key: Tensor, rule: Rule) -> Tensor:
        """Attention weights after the softmax, float32 [B, Hkv, Hq / Hkv, stop - start, stop - low].

        Args:
            query: [B, Hq, T, D]. key: [B, Hkv, T, D]. rule: its window is that of the chunk.
        """
        rows = query[:, :, self.start : self.stop].float().unflatten(1, (key.shape[1], -1)) * rule.scale
        scores = rows @ key[:, :, None, self.low : self.stop].float().transpose(-1, -2)
        if rule.softcap is not None:
            scores = torch.tanh(scores / rule.softcap) * rule.softcap
        scores = scores.masked_fill_(~self.visible(query.device), -torch.inf)
        if rule.sinks is None:
            return scores.softmax(-1)
        sinks = rule.sinks.float().view(1, key.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]

    def visible(self, device: Any) -> Tensor:
        """Which key each query sees, bool [stop - start, stop - low]."""
        rows = torch.arange(self.start, self.stop, device=device)[:, None]
        columns = torch.arange(self.low, self.stop, device=device)[None]
        seen = columns <= rows
        return seen & (columns > rows - self.window) if self.window > 0 else seen


def chunks(length: int, window: int = -1) -> Iterator[Chunk]:
    """Cut `length` queries into chunks of `ROWS`."""
    for start in range(0, length, ROWS):
        low = max(0, start - window + 1) if window > 0 else 0
        yield Chunk(start, min(start + ROWS, length), low, window)


def apply(weights: Tensor, value: Tensor, chunk: Chunk) -> Tensor:
    """Outputs of a chunk, float32 [B, Hq, stop - start, D], from its weights and `value` [B, Hkv, T, D]."""
    return (weights @ value[:, :, None, chunk.low : chunk.stop].float()).flatten(1, 2)


def _dispatch(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float | None = None, **options: Any
) -> tuple[Tensor, None]:
    if options.get("alibi") is not None or not getattr(module, "is_causal", True):
        raise _refused(f"{type(module).__name__} uses attention that is not plain causal")
    if key.shape[-1] != value.shape[-1]:
        raise _refused(f"{type(module).__name__} has keys of size {key.shape[-1]} and values of {value.shape[-1]}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    rule = Rule(scale, options.get("sliding_window") or -1, options.get("softcap"), options.get("s_aux"))
    output = _attend.get()(module.layer_idx, query, key, value, rule)
    return output.transpose(1, 2), None
