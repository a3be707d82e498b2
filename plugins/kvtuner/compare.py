"""Tables side by side: KL on text that no search has seen, paired differences, task accuracy, and both sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jettison.csrc.layout import PageLayout
from jettison.hooks.errors import ConfigError, InputRefused
from jettison.hooks.quality import summarise
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner import calibration, tasks
from jettison.plugins.kvtuner.quality import paired, rescore
from jettison.plugins.kvtuner.sensitivity import Progress
from jettison.plugins.kvtuner.stream import layer_shapes
from jettison.plugins.kvtuner.table import Table, load_table

_PAIR = re.compile(r"k(16|8|4|2)v(16|8|4|2)")


def run_compare(
    words: Sequence[str],
    folder: str,
    *,
    texts: int,
    length: int,
    files: Sequence[Path],
    items: int,
    sink_tokens: int,
    block_size: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Return one row per word of `words`, a table's path or a pair; `folder` is the checkpoint.

    Raises:
        JettisonError: a table is refused, is of another model, or the text is.
    """
    tables = {word: load_table(word) for word in words if not _PAIR.fullmatch(word)}
    progress("load model", 0, 1)
    model, tokenizer = calibration.load_model(folder)
    shape = _shape(model)
    formats = [_formats(word, tables.get(word), shape, sink_tokens) for word in words]
    chosen: list[Tensor] = (
        calibration.file_texts(tokenizer, files, length)
        if files
        else calibration.token_texts(tokenizer, "held-out", texts, length)
    )
    parts = rescore(model, chosen, formats, progress)
    task = tasks.lambada(tokenizer, "held-out", items) if items else None
    rows = []
    for word, forms, own in zip(words, formats, parts, strict=True):
        found = summarise(own)
        difference, spread = paired(own, parts[0])
        row = {
            "table": Path(word).name,
            **_sizes(forms, shape, block_size),
            "kl": found.mean_kl,
            "standard_error": found.standard_error,
            "to_first": difference,
            "to_first_error": spread,
            "top1_agreement": found.top1_agreement,
        }
        rows.append(row if task is None else {**row, **_accuracy(tasks.answers(model, task, forms, progress))})
    return rows


def _shape(model: Any) -> tuple[int, int, int]:
    """(layers, KV heads, head size)."""
    with torch.no_grad():
        shapes = layer_shapes(model)
    return len(shapes), shapes[0].kv_heads, shapes[0].size


def _formats(word: str, table: Table | None, shape: tuple[int, int, int], sink_tokens: int) -> list[KVFormat]:
    match = _PAIR.fullmatch(word)
    if match is not None:
        if not 0 <= sink_tokens <= 16:
            raise ConfigError(f"sink tokens {sink_tokens} are refused", allowed="allowed are 0 to 16")
        form = KVFormat(int(match[1]), int(match[2]), rotate=True, sink_tokens=sink_tokens)
        return [form] * shape[0]
    if table is None:
        raise AssertionError("every word that is no pair was loaded")
    expected = (table.model.num_layers, table.model.num_kv_heads, table.model.head_size)
    if expected != shape:
        raise InputRefused(
            f"{word} is for {expected[0]} layers, {expected[1]} KV heads and head size {expected[2]}, the model has "
            f"{shape[0]}, {shape[1]} and {shape[2]}",
            do="compare tables of one model",
        )
    return [table.format(layer) for layer in range(shape[0])]


def _sizes(formats: Sequence[KVFormat], shape: tuple[int, int, int], block_size: int) -> dict[str, Any]:
    _, heads, size = shape
    layouts = [PageLayout(size, form.key_bits, form.value_bits, form.sink_tokens) for form in formats]
    packed = heads * sum(layout.bytes_per_token(block_size) for layout in layouts)
    return {
        "nominal_bits": sum(form.key_bits + form.value_bits for form in formats) / (2 * len(formats)),
        "real_bits": packed * 4 / (shape[0] * heads * size),
        "bytes_per_token": packed,
    }


def _accuracy(right: Sequence[bool]) -> dict[str, Any]:
    found = tasks.wilson(right)
    return {"right": found.share, "right_low": found.low, "right_high": found.high}
