"""Measurements that a stopped run leaves behind and the next one takes up."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from jettison.plugins.kvtuner.ledger import digest
from jettison.plugins.kvtuner.objective import texts_sha256, weights_sha256
from jettison.plugins.kvtuner.sensitivity import Progress, Sensitivity, load_sensitivity, measure


def remembering(folder: Path | None) -> Callable[..., Sensitivity]:
    """`sensitivity.measure` that keeps each result in `folder`, by model, texts, sink tokens and seed; None: does not.

    Raises:
        InputRefused: a kept result is damaged, or the folder cannot be written.
    """

    def measured(
        model: Any,
        texts: Sequence[Tensor],
        *,
        sink_tokens: int = 1,
        seed: int = 0,
        progress: Progress = lambda _what, _done, _total: None,
    ) -> Sensitivity:
        if folder is None:
            return measure(model, texts, sink_tokens=sink_tokens, seed=seed, progress=progress)
        lengths = [len(ids) for ids in texts]
        facts = {"model": weights_sha256(model), "texts": texts_sha256(texts), "lengths": lengths}
        file = folder / f"sensitivity-{digest({**facts, 'sinks': sink_tokens, 'seed': seed})[:16]}.safetensors"
        if file.exists():
            return load_sensitivity(file)
        found = measure(model, texts, sink_tokens=sink_tokens, seed=seed, progress=progress)
        folder.mkdir(exist_ok=True)
        found.save(file)
        return found

    return measured


def forget(folder: Path | None) -> None:
    """Remove what `remembering` kept, once the result is written."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
