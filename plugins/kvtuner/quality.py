"""Teacher-forced quality of a KV format: KL divergence and top-1 agreement against the same model without it.

Every token attends to stored keys and values, its own included, in all layers: errors of the prefill propagate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from jettison.hooks.quality import Quality, compare, summarise
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner.capture import Attend, Rule, intercept
from jettison.plugins.kvtuner.codec import store_keys, store_values
from jettison.plugins.kvtuner.codecs import get, storing
from jettison.plugins.kvtuner.table import Table

Stored = Sequence[KVFormat] | Attend
"""How a cache stores: formats of all layers, or `codecs.storing` of any codecs."""

RUN = 32
"""Positions that `paired` takes as one observation."""


def stored(table: Table) -> Stored:
    """How `table` stores, for the functions here; ConfigError for per-channel keys, which a cache class stores."""
    if table.payload.codec != "named":
        return table.formats()
    keys, values = zip(*((get(key), get(value)) for key, value in table.payload.named), strict=True)
    center, scale = zip(*map(table.statistics, range(table.model.num_layers)), strict=True)
    return storing(
        keys,
        values,
        sink_tokens=table.payload.sink_tokens,
        center=None if table.payload.key_center is None else torch.tensor(center),
        scale=None if table.payload.key_scale is None else torch.tensor(scale),
    )


def attention_of(model: Any, formats: Stored | None) -> AbstractContextManager[None]:
    """While the context lasts, `model` attends to a cache stored in `formats`, one per layer (None: exact)."""
    return intercept(model, _attend(formats, model.device))


@torch.no_grad()
def log_probabilities(model: Any, ids: Tensor, formats: Stored | None = None) -> Tensor:
    """Log-probabilities [T, vocabulary], float32, of a text [T], with the cache stored in `formats` (one per layer)."""
    with attention_of(model, formats):
        logits = model(ids[None].to(model.device), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), -1)


def evaluate(model: Any, texts: Sequence[Tensor], references: Sequence[Tensor], formats: Stored) -> Quality:
    """Quality of `formats` on `texts`, given the model's own log-probabilities of each."""
    return summarise(
        compare(exact, log_probabilities(model, ids, formats)) for ids, exact in zip(texts, references, strict=True)
    )


def rescore(
    model: Any,
    texts: Sequence[Tensor],
    candidates: Sequence[Stored],
    progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> list[list[tuple[Tensor, Tensor]]]:
    """Compare many candidates on the same positions, holding the reference of one text at a time.

    Returns:
        per candidate and text what `jettison.hooks.quality.compare` gives: KL [T] and whether top-1 agrees [T], on
        the CPU. `summarise` makes a `Quality` of one candidate's, `paired` compares two.
    """
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in candidates]
    for number, ids in enumerate(texts):
        exact = log_probabilities(model, ids)
        for index, formats in enumerate(candidates):
            progress("rescore", number * len(candidates) + index, len(texts) * len(candidates))
            kl, same = compare(exact, log_probabilities(model, ids, formats))
            found[index].append((kl.cpu(), same.cpu()))
    return found


def paired(one: Sequence[tuple[Tensor, Tensor]], other: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean KL of `one` minus that of `other` on the same positions, nats, and the standard error of the difference.

    Neighbouring positions share their errors, so the spread is taken between runs of `RUN` positions.
    """
    differences = [a.double() - b.double() for (a, _), (b, _) in zip(one, other, strict=True)]
    runs = [run.mean() for text in differences for run in text.split(RUN) if len(run) == RUN]
    spread = torch.stack(runs).std().item() / len(runs) ** 0.5 if len(runs) > 1 else float("inf")
    return torch.cat(differences).mean().item(), spread


def _attend(formats: Stored | None, device: Any) -> Callable[..., Tensor]:
    if formats is None:
        return lambda _layer, query, key, value, rule: rule.attend(query, key, value)
    if callable(formats):
        return formats
    channels = [
        [None if side is None else torch.tensor(side, device=device) for side in (form.key_center, form.key_scale)]
        for form in formats
    ]

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        form = formats[layer]
        center, equalise = channels[layer]
        common = {"rotate": form.rotate, "sink_tokens": form.sink_tokens}
        keys = store_keys(key, form.key_bits, center=center, scale=equalise, **common)  # type: ignore[arg-type]
        values = store_values(value, form.value_bits, **common)  # type: ignore[arg-type]
        return rule.attend(query, keys.to(query.dtype), values.to(query.dtype))

    return attend
