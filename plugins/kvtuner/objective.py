"""What a search minimises: the teacher-forced KL of a candidate, against the model itself, prefill error included."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jettison.hooks.quality import Quality
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner.artefact import Pair
from jettison.plugins.kvtuner.codecs import get, storing
from jettison.plugins.kvtuner.quality import Stored, evaluate, log_probabilities
from jettison.plugins.kvtuner.space import Candidate

Channels = list[list[list[float]]]


class Formats:
    """Turns candidates into the formats of all layers, or, where they name codecs, into the attention to such a cache.

    Args:
        center, scale: [L, Hkv, D] static key codec, or None for none.
        rotate: Hadamard rotation of keys and values in packed pages; named codecs rotate or do not by themselves.
    """

    def __init__(self, center: Tensor | None, scale: Tensor | None, *, rotate: bool = True) -> None:
        self._tensors = center, scale
        self._center: Channels | None = None if center is None else center.tolist()
        self._scale: Channels | None = None if scale is None else scale.tolist()
        self.rotate = rotate
        self.sha256 = hashlib.sha256(repr((self._center, self._scale, rotate)).encode()).hexdigest()

    def __call__(self, candidate: Candidate) -> Stored:
        """How the candidate stores."""
        if isinstance(candidate.pairs[0][0], str):
            keys, values = zip(*(map(get, map(str, pair)) for pair in candidate.pairs), strict=True)
            center, scale = self._tensors
            return storing(keys, values, sink_tokens=candidate.sink_tokens, center=center, scale=scale)
        return self.pages(candidate.pairs, candidate.sink_tokens)  # type: ignore[arg-type]

    def pages(self, pairs: Sequence[Pair], sink_tokens: int) -> list[KVFormat]:
        """Formats of packed pages, one per layer."""
        return [
            KVFormat(
                key,
                value,
                rotate=self.rotate,
                sink_tokens=sink_tokens,
                key_center=None if self._center is None else self._center[layer],
                key_scale=None if self._scale is None else self._scale[layer],
            )
            for layer, (key, value) in enumerate(pairs)
        ]


class Objective:
    """Quality of a candidate on `texts`, each a 1-D tensor of token ids.

    Holds the model's own log-probabilities of all texts: tokens x vocabulary x 4 bytes.
    """

    def __init__(self, model: Any, texts: Sequence[Tensor], formats: Formats) -> None:
        self._model, self._texts, self._formats = model, list(texts), formats
        self._references = [log_probabilities(model, ids) for ids in self._texts]

    @property
    def facts(self) -> dict[str, Any]:
        """All that the figures depend on beside the candidate; the model by a sample of every weight."""
        return {
            "texts": texts_sha256(self._texts),
            "codec": self._formats.sha256,
            "model": weights_sha256(self._model),
            "objective": "teacher-forced KL, prefill included",
        }

    def __call__(self, candidate: Candidate) -> Quality:
        """Run the texts through the model once."""
        return evaluate(self._model, self._texts, self._references, self._formats(candidate))


def texts_sha256(texts: Sequence[Tensor]) -> str:
    """SHA-256 of the token ids, little-endian int64, all texts joined."""
    return hashlib.sha256(b"".join(ids.cpu().numpy().astype("<i8").tobytes() for ids in texts)).hexdigest()


def weights_sha256(model: Any) -> str:
    """SHA-256 of names, shapes and up to 64 values of every parameter: tells models apart, cheap at any size."""
    seen = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float32)
        seen.update(name.encode() + str(tuple(weight.shape)).encode() + sample.numpy().tobytes())
    return seen.hexdigest()
