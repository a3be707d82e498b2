"""Is the sensitivity of the layers the model's, or the calibration text's (paper section 5.1: "independent of inputs")?

Each of two domains is cut into two halves and the layers are measured on all four. Rankings of two halves of one domain
differ by chance alone; only what rankings across domains differ beyond that is drift. Then a table is made from each
half and run on held-out text of both: what counts is the loss of serving one domain with the other's tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from torch import Tensor

from jettison.csrc.layout import PageLayout
from jettison.hooks.errors import ConfigError, InputRefused
from jettison.hooks.quality import Quality
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner.detector import measured_formats
from jettison.plugins.kvtuner.metrics import rank_correlation
from jettison.plugins.kvtuner.quality import Stored, evaluate, log_probabilities
from jettison.plugins.kvtuner.select import choose
from jettison.plugins.kvtuner.sensitivity import PAIRS, Progress, Sensitivity, measure
from jettison.plugins.kvtuner.table import Pair

SHOWN: tuple[Pair, ...] = ((8, 16), (4, 16), (2, 16), (16, 4), (16, 2), (4, 4))
"""Pairs whose rankings are compared: each side alone at each width, and both at 4 bits."""

METRICS = {"KL": "kl", "e_o": "output_error", "e_o'": "output_norm_ratio"}
"""Names of the metrics compared, and their attribute of `Sensitivity`."""

DRIFTS = 0.2
"""Loss of correlation beyond that of two halves of one domain from which the ranking is said to drift."""

COSTLY = 1.25
"""KL of the other domain's table, as a multiple of the own one's, from which the table is said to drift."""


@dataclass(frozen=True)
class Ranking:
    """Spearman's correlation over layers of a metric at one pair: halves of one domain, and across domains."""

    metric: str
    pair: str
    within: float
    across: float

    @property
    def drifts(self) -> bool:
        """Whether domains rank the layers differently beyond chance."""
        return self.within - self.across >= DRIFTS


@dataclass(frozen=True)
class Transfer:
    """A table, made from one half of a domain or given, run on a domain: mean KL, standard error, top-1 agreement."""

    table: str
    half: int | None
    domain: str
    kl: float
    standard_error: float
    top1_agreement: float


@dataclass(frozen=True)
class Drift:
    """What `drift` found.

    Attributes:
        model: its name. domains: names of both. tokens: calibration tokens of each.
        real_bits, nominal_bits: of the largest of the tables made, per element; None if no table was made.
        rankings: one per metric of `METRICS` and pair of `SHOWN`.
        losses: predicted KL of every layer at 4 bits, on either domain.
        transfers: tables times domains.
    """

    model: str
    domains: tuple[str, str]
    tokens: tuple[int, int]
    real_bits: float | None
    rankings: tuple[Ranking, ...]
    losses: tuple[tuple[float, ...], ...]
    transfers: tuple[Transfer, ...]
    nominal_bits: float | None = None

    @property
    def penalty(self) -> float | None:
        """Largest mean KL of the other domain's tables as a multiple of the own ones'; None if none were made."""
        if self.real_bits is None:
            return None
        first, second = self.domains
        return max(
            self._kl(other, own) / max(self._kl(own, own), 1e-12) for own, other in ((first, second), (second, first))
        )

    def _kl(self, table: str, domain: str) -> float:
        runs = [run.kl for run in self.transfers if (run.table, run.domain) == (table, domain)]
        return sum(runs) / len(runs)

    @property
    def sentence(self) -> str:
        """Whether the model's layers rank alike on both domains, and whether a table carries over."""
        first, second = self.domains
        counts = []
        for metric in METRICS:
            own = [ranking for ranking in self.rankings if ranking.metric == metric]
            counts.append(f"{sum(not ranking.drifts for ranking in own)} of {len(own)} by {metric}")
        text = f"rankings of {self.model}'s layers that are the same on {first} and {second}: {', '.join(counts)}"
        drifting = [ranking for ranking in self.rankings if ranking.drifts]
        if drifting:
            worst = min(drifting, key=lambda ranking: ranking.across - ranking.within)
            text += f" (worst {worst.pair} by {worst.metric}: {worst.across:.2f} across, {worst.within:.2f} within)"
        if self.penalty is None:
            return f"{text}."
        return f"{text}; the other domain's table costs {self.penalty:.2f} times the KL."

    @property
    def recommendation(self) -> str:
        """What text to calibrate with."""
        if self.penalty is not None and self.penalty >= COSTLY:
            return "Calibrate with text of every domain that is served: --text once for each."
        if any(ranking.drifts for ranking in self.rankings):
            return "The rankings differ, but no table was seen to lose by it; calibrate with both where it is easy."
        return "One table serves both."

    def as_json(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        rankings = [{**asdict(ranking), "drifts": ranking.drifts} for ranking in self.rankings]
        rest = {"penalty": self.penalty, "sentence": self.sentence, "recommendation": self.recommendation}
        return {**asdict(self), "rankings": rankings, **rest}


def drift(
    model: Any,
    texts: Mapping[str, Sequence[Tensor]],
    *,
    held_out: Mapping[str, Sequence[Tensor]],
    tables: Mapping[str, Stored] | None = None,
    name: str = "the model",
    real_bits: float = 4.25,
    sink_tokens: int = 1,
    block_size: int = 128,
    measuring: Any = measure,
    progress: Progress = lambda _what, _done, _total: None,
) -> Drift:
    """Measure `model` on two domains.

    Args:
        model: Hugging Face causal LM in float32.
        texts: two domains by name, each of at least two texts [T]; even and odd ones are its halves.
        held_out: texts of the same domains that no table has seen.
        tables: formats of all layers by name, to run instead of tables made here.
        name: of the model, for the sentences.
        real_bits: budget per element of the tables made here, scales and sink area included.
        sink_tokens, block_size: of those tables.
        measuring: `sensitivity.measure`, or a function of its signature that remembers.
        progress: called with (what, done, total).

    Raises:
        InputRefused: not two domains with two texts each, or no held-out text of one.
        ConfigError: the budget is below the smallest table.
    """
    _check(texts, held_out)
    domains = tuple(texts)
    halves = {
        (domain, half): measuring(model, texts[domain][half::2], sink_tokens=sink_tokens, progress=progress)
        for domain, half in product(domains, (0, 1))
    }
    found_bits = nominal = None
    run: dict[tuple[str, int | None], Stored] = {(key, None): own for key, own in (tables or {}).items()}
    if tables is None:
        made = {key: _table(measured, real_bits, sink_tokens, block_size) for key, measured in halves.items()}
        run |= {key: formats for key, (formats, _) in made.items()}
        largest, found_bits = max(made.values(), key=lambda one: one[1])
        nominal = sum(form.key_bits + form.value_bits for form in largest) / (2 * len(largest))
    return Drift(
        model=name,
        domains=(domains[0], domains[1]),
        tokens=(sum(map(len, texts[domains[0]])), sum(map(len, texts[domains[1]]))),
        real_bits=found_bits,
        rankings=tuple(_ranking(metric, pair, halves, domains) for metric, pair in product(METRICS, SHOWN)),
        losses=tuple(_losses(halves[domain, 0], halves[domain, 1]) for domain in domains),
        transfers=tuple(_transfers(model, run, held_out, progress)),
        nominal_bits=nominal,
    )


def _check(texts: Mapping[str, Sequence[Tensor]], held_out: Mapping[str, Sequence[Tensor]]) -> None:
    if len(texts) != 2 or min(len(domain) for domain in texts.values()) < 2:
        raise InputRefused(
            f"{', '.join(f'{name} with {len(domain)} texts' for name, domain in texts.items()) or 'no domains'}",
            allowed="drift is measured between two domains of at least two texts each",
        )
    if any(not held_out.get(name) for name in texts):
        raise InputRefused("a domain has no held-out text", allowed="at least one is needed")


def _losses(first: Sensitivity, second: Sensitivity) -> tuple[float, ...]:
    column = PAIRS.index((4, 4))
    return tuple(((first.kl + second.kl)[:, column] / 2).tolist())


def _ranking(metric: str, pair: Pair, halves: Mapping[tuple[str, int], Sensitivity], domains: Sequence[str]) -> Ranking:
    column = PAIRS.index(pair)
    losses = {key: getattr(measured, METRICS[metric])[:, column].tolist() for key, measured in halves.items()}
    within = [rank_correlation(losses[domain, 0], losses[domain, 1]) for domain in domains]
    across = [rank_correlation(losses[domains[0], i], losses[domains[1], j]) for i, j in product((0, 1), repeat=2)]
    return Ranking(metric, f"k{pair[0]}v{pair[1]}", sum(within) / len(within), sum(across) / len(across))


def _table(measured: Sensitivity, real_bits: float, sink_tokens: int, block_size: int) -> tuple[list[KVFormat], float]:
    layers, _, size = measured.key_center.shape
    costs = [PageLayout(size, *pair, sink_tokens).bytes_per_token(block_size) for pair in PAIRS]
    budget = int(layers * size * real_bits / 4)
    if layers * min(costs) > budget:
        raise ConfigError(
            f"{real_bits:g} real bits are too few",
            allowed=f"the smallest table of this model takes {min(costs) * 4 / size:g}",
        )
    picked = choose(measured.kl.tolist(), [costs] * layers, budget)
    pairs = [PAIRS[option] for option in picked]
    return measured_formats(pairs, measured, sink_tokens), sum(costs[option] for option in picked) * 4 / (size * layers)


def _transfers(
    model: Any,
    tables: Mapping[tuple[str, int | None], Stored],
    held_out: Mapping[str, Sequence[Tensor]],
    progress: Progress,
) -> list[Transfer]:
    runs: list[Transfer] = []
    for domain, texts in held_out.items():
        references = [log_probabilities(model, ids) for ids in texts]
        for (table, half), formats in tables.items():
            progress(f"table {table} on {domain}", len(runs), len(tables) * len(held_out))
            found: Quality = evaluate(model, texts, references, formats)
            runs.append(Transfer(table, half, domain, found.mean_kl, found.standard_error, found.top1_agreement))
    return runs
