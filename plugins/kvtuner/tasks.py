"""Task accuracy of a candidate: does the model, reading through its quantised cache, still say the next words?

A task is a list of (context, continuation). An item is right if every token of the continuation is the most likely
one, teacher-forced (LAMBADA's own rule). Intervals are Wilson's; two candidates are compared on the same items.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jettison.hooks import assets
from jettison.hooks.errors import InputRefused
from jettison.plugins.kvtuner.quality import Stored, attention_of

BATCH = 8
RESAMPLES = 2000


@dataclass(frozen=True)
class Task:
    """Items as (token ids of the whole text, number of ids of the continuation)."""

    name: str
    items: tuple[tuple[tuple[int, ...], int], ...]


@dataclass(frozen=True)
class Interval:
    """A share and its 95 % Wilson interval."""

    correct: int
    items: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Correct over items."""
        return self.correct / self.items


def lambada(tokenizer: Any, split: assets.Split, count: int) -> Task:
    """The first `count` packaged LAMBADA passages of `split`, their last word being the continuation."""
    rows = assets.lambada(split)[:count]
    return Task("lambada last word", tuple(_item(tokenizer, context, f" {word}") for context, word in rows))


def task_file(tokenizer: Any, path: Path, count: int) -> Task:
    """The first `count` lines of a JSON-lines file of {"context": ..., "continuation": ...}.

    Raises:
        InputRefused: the file cannot be read, or a line is not of that form.
    """
    items = []
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:count]
    except (OSError, UnicodeDecodeError) as error:
        raise InputRefused(f"cannot read the task {path} ({error})", do="give UTF-8 JSON lines") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            context, continuation = row["context"], row["continuation"]
            if not (isinstance(context, str) and isinstance(continuation, str) and continuation):
                raise TypeError("no text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputRefused(
                f"line {number} of {path} is not an item",
                allowed='allowed is {"context": TEXT, "continuation": TEXT}',
                do="correct the line",
            ) from error
        items.append(_item(tokenizer, context, continuation))
    if not items:
        raise InputRefused(f"{path} has no items", do='write lines of {"context": TEXT, "continuation": TEXT}')
    return Task(path.stem, tuple(items))


@torch.no_grad()
def answers(
    model: Any,
    task: Task,
    formats: Stored | None,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> list[bool]:
    """Return for each item whether it is right, the cache stored in `formats` (None: not quantised)."""
    order = sorted(range(len(task.items)), key=lambda index: len(task.items[index][0]))
    right = [False] * len(order)
    with attention_of(model, formats):
        for start in range(0, len(order), BATCH):
            progress(task.name, start, len(order))
            chosen = order[start : start + BATCH]
            for index, answer in zip(chosen, _batch(model, [task.items[i] for i in chosen]), strict=True):
                right[index] = answer
    return right


def _batch(model: Any, items: Sequence[tuple[tuple[int, ...], int]]) -> list[bool]:
    """Items are padded on the right: attention is causal and codes are per token, so padding changes nothing."""
    longest = max(len(ids) for ids, _ in items)
    tail = max(longest - len(ids) + count for ids, count in items) + 1
    padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in items], device=model.device)
    likeliest = model(padded, use_cache=False, logits_to_keep=tail).logits.argmax(-1).cpu()
    right = []
    for row, (ids, count) in zip(likeliest, items, strict=True):
        first = len(ids) - count - 1 - (longest - len(row))
        right.append(row[first : first + count].tolist() == list(ids[-count:]))
    return right


def wilson(right: Sequence[bool]) -> Interval:
    """Share of right answers with its 95 % Wilson score interval."""
    from scipy.stats import binomtest

    correct = sum(right)
    bounds = binomtest(correct, len(right)).proportion_ci(0.95, method="wilson")
    return Interval(correct, len(right), float(bounds.low), float(bounds.high))


def difference(one: Sequence[bool], other: Sequence[bool], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the accuracy of `one` minus that of `other` on the same items."""
    gains = np.asarray(one, float) - np.asarray(other, float)
    rng = np.random.default_rng(seed)
    means = gains[rng.integers(len(gains), size=(RESAMPLES, len(gains)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _item(tokenizer: Any, context: str, continuation: str) -> tuple[tuple[int, ...], int]:
    """The continuation's tokens are those that the whole text has beyond the context's."""
    whole = tokenizer(context + continuation).input_ids
    count = len(whole) - len(tokenizer(context).input_ids)
    if count < 1 or count >= len(whole):
        raise InputRefused(
            f"the continuation {continuation[:32]!r} adds no token of its own", do="end the context before a space"
        )
    return tuple(whole), count
