"""Teacher-forced quality of a KV format: KL divergence and top-1 agreement against the same model without it.

Every token attends to stored keys and values, its own included, in all layers: errors of the prefill propagate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jettison.hooks.quality import Quality, compare, summarise
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner.capture import causal_attention, intercept
from jettison.plugins.kvtuner.codec import store_keys, store_values


@torch.no_grad()
def log_probabilities(model: Any, ids: Tensor, formats: Sequence[KVFormat] | None = None) -> Tensor:
    """Log-probabilities [T, vocabulary], float32, of a text [T], with the cache stored in `formats` (one per layer)."""
    with intercept(model, _attend(formats, model.device)):
        logits = model(ids[None].to(model.device), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), -1)


def evaluate(model: Any, texts: Sequence[Tensor], references: Sequence[Tensor], formats: Sequence[KVFormat]) -> Quality:
    """Quality of `formats` on `texts`, given the model's own log-probabilities of each."""
    return summarise(
        compare(exact, log_probabilities(model, ids, formats)) for ids, exact in zip(texts, references, strict=True)
    )


def _attend(formats: Sequence[KVFormat] | None, device: Any) -> Callable[..., Tensor]:
    if formats is None:
        return lambda _layer, *rest: causal_attention(*rest)
    channels = [
        [None if side is None else torch.tensor(side, device=device) for side in (form.key_center, form.key_scale)]
        for form in formats
    ]

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
        form = formats[layer]
        center, equalise = channels[layer]
        common = {"rotate": form.rotate, "sink_tokens": form.sink_tokens}
        keys = store_keys(key, form.key_bits, center=center, scale=equalise, **common)  # type: ignore[arg-type]
        values = store_values(value, form.value_bits, **common)  # type: ignore[arg-type]
        return causal_attention(query, keys.to(query.dtype), values.to(query.dtype), scale, window)

    return attend
