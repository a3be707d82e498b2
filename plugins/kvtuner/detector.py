"""Does a model bear a uniform 4-bit cache, and if not, which layers break it?

Qwen2.5-7B answers none of GSM8K with 4-bit keys, Llama-3.1-8B nearly all (paper, table 5): a property of a few layers
that a deployment must know before it chooses a format. Uniform pairs are run teacher-forced, with the plain codec that
engines ship and with the measured one (rotation, centre, equalisation, one 16-bit token). Levels go by e^KL: the factor
by which the perplexity of the model's own text grows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from jettison.csrc.layout import PageLayout
from jettison.hooks.quality import Quality
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner.objective import Formats
from jettison.plugins.kvtuner.quality import evaluate, log_probabilities
from jettison.plugins.kvtuner.sensitivity import PAIRS, Progress, Sensitivity
from jettison.plugins.kvtuner.table import Pair

Level = Literal["bears", "suffers from", "collapses with"]
Codec = Literal["plain", "measured"]

UNIFORM: tuple[Pair, ...] = ((8, 8), (8, 4), (4, 8), (4, 4))
SUFFERS, COLLAPSES = 1.05, 1.5
"""Factors of perplexity from which a format is called so."""

CULPRITS = 0.5
"""Share of the predicted KL of 4-bit keys that the layers to blame hold together."""


@dataclass(frozen=True)
class Run:
    """One uniform pair: mean KL in nats, its standard error, and the share of positions whose top token stays."""

    pair: str
    codec: Codec
    kl: float
    standard_error: float
    top1_agreement: float

    @property
    def growth(self) -> float:
        """Factor of perplexity, e^KL."""
        return math.exp(min(self.kl, 50))

    @property
    def level(self) -> Level:
        """How the model takes it."""
        return level(self.kl)


@dataclass(frozen=True)
class Verdict:
    """What `check` found.

    Attributes:
        model: its name. tokens: that were run.
        runs: uniform pairs with either codec; the last one, if any layer is to blame, is `k4v4+` with those at 8 bits.
        culprits: layers that hold `CULPRITS` of what 4-bit keys are predicted to cost.
        share: of those, 0 to 1.
        real_bits: per element of 4-bit keys and values, scales and zeros included.
    """

    model: str
    tokens: int
    runs: tuple[Run, ...]
    culprits: tuple[int, ...]
    share: float
    real_bits: float

    def run(self, pair: str, codec: Codec) -> Run:
        """The run of `pair`, e.g. k4v4, with `codec`."""
        return next(run for run in self.runs if (run.pair, run.codec) == (pair, codec))

    @property
    def sentence(self) -> str:
        """What happens to the model."""
        plain, ours = self.run("k4v4", "plain"), self.run("k4v4", "measured")
        same = plain.level == ours.level
        text = f"{self.model} {plain.level} uniform 4-bit keys and values: perplexity times {plain.growth:.2f}"
        tail = f", times {ours.growth:.2f} with rotation and key statistics"
        return text + (tail if same else f"{tail}, which it {ours.level}") + "."

    @property
    def recommendation(self) -> str:
        """What to serve."""
        plain, ours = self.run("k4v4", "plain"), self.run("k4v4", "measured")
        if plain.level == "bears":
            return (
                "Any 4-bit cache will do; a table saves more: "
                f"jettison kvtuner search MODEL --bits {self.real_bits - 1:g} -o t.json."
            )
        if ours.level == "bears":
            return (
                "Use 4 bits with rotation and key statistics only: "
                f"jettison kvtuner search MODEL --bits {self.real_bits:g} -o t.json."
            )
        layers = ", ".join(map(str, self.culprits))
        names = f"layer {layers} holds" if len(self.culprits) == 1 else f"layers {layers} hold"
        blame = f"Keys are to blame: {names} {self.share:.0%} of their predicted loss. "
        if self.run("k4v8", "measured").kl < self.run("k8v4", "measured").kl:
            blame = "Values are to blame more than keys. "
        rescued = self.runs[-1]
        if rescued.pair == "k4v4+" and rescued.level == "bears":
            return (
                f"{blame}With 8-bit keys there perplexity grows by {rescued.growth - 1:.1%} only: use a searched table."
            )
        if self.run("k8v4", "measured").level == "bears":
            return f"{blame}Serve --with kvtuner=k8v4, or search above 5 real bits; never a uniform 4-bit key cache."
        return f"{blame}Serve --with kvtuner=k8v8 or the 16-bit cache; below 8 bits check a task's accuracy first."

    def as_json(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        runs = [{**asdict(run), "perplexity_factor": run.growth, "level": run.level} for run in self.runs]
        rest = {"sentence": self.sentence, "recommendation": self.recommendation}
        return {**asdict(self), "runs": runs, "culprits": list(self.culprits), **rest}


def level(kl: float) -> Level:
    """Name the KL in nats: below 5 % more perplexity the model bears it, from 50 % it collapses."""
    if not kl < math.log(COLLAPSES):
        return "collapses with"
    return "suffers from" if kl >= math.log(SUFFERS) else "bears"


def check(
    model: Any,
    texts: Sequence[Tensor],
    measured: Sensitivity,
    *,
    name: str | None = None,
    sink_tokens: int = 1,
    progress: Progress = lambda _what, _done, _total: None,
) -> Verdict:
    """Run uniform pairs of `model` on `texts`.

    Args:
        model: Hugging Face causal LM in float32.
        texts: token ids [T] each, best not those of `measured`.
        measured: its sensitivities at the default codecs.
        name: for the sentences; default: the folder's or hub name.
        sink_tokens: of the measured codec.
        progress: called with (what, done, total).
    """
    culprits, share = to_blame(measured)
    pairs = [(pair, codec) for pair in UNIFORM for codec in ("plain", "measured")]
    references = [log_probabilities(model, ids) for ids in texts]
    runs: list[Run] = []
    for pair, codec in pairs:
        progress(f"k{pair[0]}v{pair[1]} {codec}", len(runs), len(pairs) + 1)
        layers = [pair] * len(measured.windows)
        formats = plain_formats(layers) if codec == "plain" else measured_formats(layers, measured, sink_tokens)
        found = evaluate(model, texts, references, formats)
        runs.append(_run(f"k{pair[0]}v{pair[1]}", codec, found))  # type: ignore[arg-type]
    if runs[-1].level != "bears":
        progress("k4v4 with the layers to blame at 8 bits", len(runs), len(pairs) + 1)
        layers = [(8 if layer in culprits else 4, 4) for layer in range(len(measured.windows))]
        found = evaluate(model, texts, references, measured_formats(layers, measured, sink_tokens))
        runs.append(_run("k4v4+", "measured", found))
    name = name or Path(model.config._name_or_path).name or type(model).__name__
    size = measured.key_center.shape[-1]
    real_bits = PageLayout(size, 4, 4).bytes_per_token(16) * 4 / size
    return Verdict(name, sum(len(ids) for ids in texts), tuple(runs), culprits, share, real_bits)


def _run(pair: str, codec: Codec, found: Quality) -> Run:
    # NOTES: a NaN would otherwise pass every threshold as harmless.
    kl = found.mean_kl if math.isfinite(found.mean_kl) else math.inf
    found = replace(found, mean_kl=kl)
    return Run(pair, codec, found.mean_kl, found.standard_error, found.top1_agreement)


def to_blame(measured: Sensitivity) -> tuple[tuple[int, ...], float]:
    """The fewest layers that hold `CULPRITS` of the predicted KL of 4-bit keys, ascending, and their share."""
    losses = measured.kl[:, PAIRS.index((4, 16))].tolist()
    total = sum(losses)
    if total <= 0:
        return (), 0.0
    ranked = sorted(range(len(losses)), key=lambda layer: -losses[layer])
    held, taken = 0.0, []
    for layer in ranked:
        taken.append(layer)
        held += losses[layer]
        if held >= CULPRITS * total:
            break
    return tuple(sorted(taken)), held / total


def plain_formats(pairs: Sequence[Pair]) -> list[KVFormat]:
    """Formats of all layers with nothing but scales and zeros."""
    return [KVFormat(key, value, rotate=False) for key, value in pairs]


def measured_formats(pairs: Sequence[Pair], measured: Sensitivity, sink_tokens: int = 1) -> list[KVFormat]:
    """Formats of all layers with rotation and the statistics of `measured`."""
    return Formats(measured.key_center, measured.key_scale).pages(pairs, sink_tokens)
