"""What quantisation does to one layer (paper section 3.2), and whether two metrics rank alike.

With stored K', V', weights a' = softmax(q K'^T), outputs o' = a' V':

    e_k = mean |K - K'| / |K|      e_v = mean |V - V'| / |V|
    e_a = mean |a - a'|            over the pairs that attention may see
    e_o = mean |o - o'| / |o|      the paper's; one element near zero can decide it
    e_o' = ||o - o'|| / ||o||      per head over all tokens and channels, then the mean over heads

Denominators are at least `GUARD`. e_a and e_o are over query heads, the codec works per KV head (kvtuner pitfall 8).
All pairs of codecs are met exactly: a' is made once per key codec and applied to every stored V'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jettison.plugins.kvtuner.capture import Chunk, apply, chunks
from jettison.plugins.kvtuner.codec_kinds import Native
from jettison.plugins.kvtuner.codecs import Codec, store
from jettison.plugins.kvtuner.stream import Seen

GUARD = 1e-8
ALIKE = 0.8
"""Spearman correlation below which two rankings are said to disagree."""


def relative_error(exact: Tensor, stored: Tensor) -> Tensor:
    """|x - x'| / max(|x|, `GUARD`) of two tensors of one shape, element by element; its mean is e_k, e_v or e_o."""
    return (exact - stored).abs() / exact.abs().clamp_min(GUARD)


@dataclass(frozen=True)
class LayerErrors:
    """Errors of one layer; I key codecs, J value codecs, all float64.

    Attributes:
        key: e_k, [I]. value: e_v, [J]. attention: e_a, [I].
        output: e_o, [I, J]. norm_ratio: e_o', [I, J].
        kl: predicted KL in nats per token, [I, J]; zeros if no gradient was given.
    """

    key: Tensor
    value: Tensor
    attention: Tensor
    output: Tensor
    norm_ratio: Tensor
    kl: Tensor


@dataclass
class LayerMeter:
    """Sums errors of one layer over texts; see `LayerErrors`.

    Attributes:
        keys, values: codecs to try.
        center, scale: [Hkv, D] or None, static statistics of the keys; see `codecs.store`.
        sink_tokens: first tokens of a text kept at 16 bits.
    """

    keys: Sequence[Codec]
    values: Sequence[Codec]
    center: Tensor | None = None
    scale: Tensor | None = None
    sink_tokens: int = 0
    _sums: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def add(self, seen: Seen) -> None:
        """Measure one text through the layer."""
        key, value = seen.key.float(), seen.value.float()
        statics = {"center": self.center, "scale": self.scale}
        stored_keys = [store(codec, key, sink_tokens=self.sink_tokens, **statics) for codec in self.keys]
        stored_values = [store(codec, value, sink_tokens=self.sink_tokens) for codec in self.values]
        self._add("key", torch.stack([relative_error(key, stored).sum() for stored in stored_keys]))
        self._add("value", torch.stack([relative_error(value, stored).sum() for stored in stored_values]))
        self._add("elements", torch.tensor(key.numel()))
        self._add("tokens", torch.tensor(key.shape[2]))
        wide = torch.cat(stored_values, -1)
        for chunk in chunks(key.shape[2], seen.rule.window):
            self._add_chunk(seen, chunk, stored_keys, wide)

    def _add_chunk(self, seen: Seen, chunk: Chunk, stored_keys: Sequence[Tensor], wide: Tensor) -> None:
        weights = chunk.weights(seen.query, seen.key, seen.rule)
        exact = apply(weights, seen.value, chunk)[..., None, :]
        gradient = None if seen.gradient is None else seen.gradient[:, :, chunk.start : chunk.stop, None].float()
        attention, output, squares, kl = [], [], [], []
        for codec, stored in zip(self.keys, stored_keys, strict=True):
            changed = weights if isinstance(codec, Native) else chunk.weights(seen.query, stored, seen.rule)
            attention.append((changed - weights).abs_().sum())
            found = apply(changed, wide, chunk).unflatten(-1, (len(self.values), -1))
            output.append(relative_error(exact, found).sum((0, 1, 2, 4)))
            change = found - exact
            squares.append(change.square().sum((0, 2, 4)))
            if gradient is not None:
                kl.append(0.5 * (gradient * change).sum((0, 1, 4)).square().sum(0))
        self._add("attention", torch.stack(attention))
        self._add("pairs", chunk.visible("cpu").sum() * seen.query.shape[1])
        self._add("output", torch.stack(output))
        self._add("outputs", torch.tensor(exact.numel()))
        self._add("squares", torch.stack(squares))
        self._add("norm", exact.square().sum((0, 2, 3, 4)))
        self._add("kl", torch.stack(kl) if kl else torch.zeros(len(self.keys), len(self.values)))

    def _add(self, name: str, amount: Tensor) -> None:
        amount = amount.double()
        self._sums[name] = self._sums[name] + amount if name in self._sums else amount

    def result(self) -> LayerErrors:
        """Means over everything added; at least one text."""
        sums = {name: amount.cpu() for name, amount in self._sums.items()}
        ratio = sums["squares"] / sums["norm"][:, None].clamp_min(GUARD**2)
        return LayerErrors(
            key=sums["key"] / sums["elements"],
            value=sums["value"] / sums["elements"],
            attention=sums["attention"] / sums["pairs"],
            output=sums["output"] / sums["outputs"],
            norm_ratio=ratio.sqrt().mean(1),
            kl=sums["kl"] / sums["tokens"],
        )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's correlation, -1 to 1; 1 if both are constant, 0 if only one is."""
    from scipy.stats import spearmanr

    flat = [len(set(numbers)) < 2 for numbers in (first, second)]
    return float(all(flat)) if any(flat) else float(spearmanr(first, second).statistic)


@dataclass(frozen=True)
class Disagreement:
    """Two metrics rank the layers differently for one option, with that Spearman correlation."""

    option: str
    correlation: float


def disagreements(output: Tensor, norm_ratio: Tensor, options: Sequence[str]) -> list[Disagreement]:
    """Where e_o and e_o' rank the layers differently: Spearman's correlation below `ALIKE`.

    Args:
        output, norm_ratio: [L, O]. options: names of the O columns.

    Returns:
        in the order of `options`; empty below four layers, where a rank says nothing.
    """
    if len(output) < 4:
        return []
    columns = zip(options, output.T.tolist(), norm_ratio.T.tolist(), strict=True)
    found = [(option, rank_correlation(first, second)) for option, first, second in columns]
    return [Disagreement(option, value) for option, value in found if value < ALIKE]


def warning(found: Sequence[Disagreement]) -> str | None:
    """One sentence about all disagreements; None if there are none."""
    if not found:
        return None
    least = min(found, key=lambda own: own.correlation)
    names = ", ".join(own.option for own in found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return (
        f"e_o and its norm ratio rank the layers differently at {names} (Spearman {least.correlation:.2f} at "
        f"{least.option}): elements near zero decide e_o there; trust the norm ratio or the predicted KL."
    )
