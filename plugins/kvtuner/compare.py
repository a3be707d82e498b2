"""Tables side by side: KL on text that no search has seen, paired differences, task accuracy, and both sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from jettison.hooks.errors import ConfigError
from jettison.hooks.quality import summarise
from jettison.plugins.kvtuner import calibration, tasks
from jettison.plugins.kvtuner.codec_kinds import Native, PerToken
from jettison.plugins.kvtuner.codecs import Codec, get, names, option_bytes, storing
from jettison.plugins.kvtuner.quality import Stored, paired, rescore, stored
from jettison.plugins.kvtuner.sensitivity import Progress
from jettison.plugins.kvtuner.stream import dimensions
from jettison.plugins.kvtuner.table import Dimensions, Table, load_table

_PAIR = re.compile(r"k(16|8|4|2)v(16|8|4|2)")


@dataclass(frozen=True)
class Entry:
    """One way to store: the name shown, how to run it, nominal bits per element, bytes per token of all layers."""

    name: str
    how: Stored
    nominal_bits: float
    bytes_per_token: int


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
    """Return one row per word of `words`: a table's path, a pair, or two codecs; `folder` is the checkpoint.

    Raises:
        JettisonError: a table or codec is refused, a table is of another model, or the text is refused.
    """
    if not 0 <= sink_tokens <= 16:
        raise ConfigError(f"sink tokens {sink_tokens} are refused", allowed="allowed are 0 to 16")
    read = [parse_word(word) for word in words]
    progress("load model", 0, 1)
    model, tokenizer = calibration.load_model(folder)
    shape = dimensions(model)
    entries = [
        _of_table(Path(word), found, shape, block_size)
        if isinstance(found, Table)
        else _of_codecs(word, found, shape, sink_tokens, block_size)
        for word, found in zip(words, read, strict=True)
    ]
    chosen: list[Tensor] = (
        calibration.file_texts(tokenizer, files, length)
        if files
        else calibration.token_texts(tokenizer, "held-out", texts, length)
    )
    parts = rescore(model, chosen, [entry.how for entry in entries], progress)
    task = tasks.lambada(tokenizer, "held-out", items) if items else None
    rows = []
    for entry, own in zip(entries, parts, strict=True):
        found = summarise(own)
        difference, spread = paired(own, parts[0])
        row = {
            "table": entry.name,
            "nominal_bits": entry.nominal_bits,
            "real_bits": entry.bytes_per_token * 4 / (shape[0] * shape[1] * shape[2]),
            "bytes_per_token": entry.bytes_per_token,
            "kl": found.mean_kl,
            "standard_error": found.standard_error,
            "to_first": difference,
            "to_first_error": spread,
            "top1_agreement": found.top1_agreement,
        }
        rows.append(row if task is None else {**row, **_accuracy(tasks.answers(model, task, entry.how, progress))})
    return rows


def parse_word(word: str) -> Table | tuple[Codec, Codec]:
    """A table, or the codecs of keys and values that a pair or two names stand for; errors as `run_compare`."""
    if match := _PAIR.fullmatch(word):
        key, value = (Native() if bits == "16" else PerToken(int(bits), rotate=True) for bits in match.groups())
        return key, value
    sides = word.split("/")
    if len(sides) == 2 and Path(word).suffix not in (".json", ".yaml", ".yml") and set(sides) & set(names()):
        return get(sides[0]), get(sides[1])
    return load_table(word)


def _of_table(path: Path, table: Table, shape: Dimensions, block_size: int) -> Entry:
    table.check_model(shape, table=str(path))
    sizes = table.measure_sizes(block_size)
    return Entry(path.name, stored(table), sizes.nominal_bits, sizes.bytes_per_token)


def _of_codecs(word: str, pair: tuple[Codec, Codec], shape: Dimensions, sinks: int, block_size: int) -> Entry:
    layers, heads, size = shape
    how = storing([pair[0]] * layers, [pair[1]] * layers, sink_tokens=sinks)
    each = option_bytes(*pair, heads, size, sinks, block_size)
    return Entry(word, how, (pair[0].bits + pair[1].bits) / 2, layers * each)


def _accuracy(right: Sequence[bool]) -> dict[str, Any]:
    found = tasks.wilson(right)
    return {"right": found.share, "right_low": found.low, "right_high": found.high}
