"""The whole method: prune, group, programme, search, then rank the finalists again and wrap the best as a table.

Three texts keep the steps honest: layers are measured on one, candidates searched on another, and the finalists ranked
on a third, because the best of many on one text is partly luck. The best uniform pair is always among the finalists,
so a table is never worse than it on the validation text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from torch import Tensor

from jettison.hooks import __version__
from jettison.hooks.quality import Quality, summarise
from jettison.plugins.kvtuner import tasks
from jettison.plugins.kvtuner.artefact import Accuracy, Canary, Choice, Measured, Point, Search, write_pairs
from jettison.plugins.kvtuner.canary import record as record_canary
from jettison.plugins.kvtuner.ledger import Ledger
from jettison.plugins.kvtuner.objective import Objective, texts_sha256
from jettison.plugins.kvtuner.prepare import Prepared, TuneSettings, joined, parts_sha256
from jettison.plugins.kvtuner.prune import survivors
from jettison.plugins.kvtuner.quality import paired, rescore
from jettison.plugins.kvtuner.search import Found, Measurements, pareto, search
from jettison.plugins.kvtuner.sensitivity import Progress
from jettison.plugins.kvtuner.space import Candidate
from jettison.plugins.kvtuner.table import LayerBits, Pair, Payload, Source, Table, encode_channels, seal

UNIFORM: tuple[Pair, ...] = ((16, 16), (8, 8), (8, 4), (4, 8), (4, 4), (8, 2), (4, 2), (2, 2))
CANARY_TOKENS = 2048
PACKAGES = ("jettison", "torch", "transformers", "optuna")


@dataclass(frozen=True)
class Finalist:
    """A candidate on the validation text, and its task answers where a task was run."""

    found: Found
    parts: list[tuple[Tensor, Tensor]]
    answers: list[bool] | None = None

    @property
    def quality(self) -> Quality:
        """Over all positions of the validation text."""
        return summarise(self.parts)


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        table: the artefact.
        chosen: its candidate, measured on the search text.
        searched: every candidate of the search, in order; the programme's own have the origin `dp`.
        uniform: uniform pairs at their best sink setting, as far as they were measured.
        finalists: in the order in which they were preferred.
        evaluations: runs of the search text through the model that this call made.
    """

    table: Table
    chosen: Found
    searched: list[Found]
    uniform: list[Found]
    finalists: list[Finalist]
    evaluations: int


def tune(
    prepared: Prepared,
    budget: int,
    settings: TuneSettings,
    ledger: Ledger,
    task: tasks.Task | None = None,
    *,
    progress: Progress = lambda _what, _done, _total: None,
) -> Outcome:
    """Find the best table of at most `budget` bytes per token.

    Raises:
        ConfigError: nothing fits the budget.
    """
    prepared.space.check_budget(budget)
    objective = Objective(prepared.model, prepared.texts["search"], prepared.formats)
    measure = Measurements(ledger, objective.facts, objective, prepared.space.cost)
    uniform = uniform_pairs(prepared, measure, progress)
    baseline = best_within(uniform, budget)
    start = [] if baseline is None else [baseline.candidate]
    searched = search(prepared.space, measure, ledger, budget, settings.search, start, progress=progress)
    finalists = rank(prepared, pick_finalists(searched, uniform, budget, settings.finalists), task, progress)
    evaluations = measure.made
    del objective, measure  # the references are large
    table = wrap(prepared, settings, budget, finalists, searched, uniform, evaluations, task, progress)
    return Outcome(table, finalists[0].found, searched, uniform, finalists, evaluations)


def uniform_pairs(prepared: Prepared, measure: Measurements, progress: Progress) -> list[Found]:
    """Every option of `uniform_options` at each sink setting: the baseline that a search has to beat."""
    layers, sinks = prepared.space.num_layers, prepared.space.sinks
    candidates = [Candidate((option,) * layers, sink) for option in uniform_options(prepared) for sink in sinks]
    candidates = [one for one in candidates if one.nominal_bits < 16 or one.sink_tokens == sinks[0]]
    found = []
    for number, candidate in enumerate(candidates):
        progress("uniform pairs", number, len(candidates))
        found.append(measure(candidate, "uniform"))
    return found


def uniform_options(prepared: Prepared) -> list[Choice]:
    """Those of `UNIFORM` that the space has; of named codecs, the pairs that no other beats in predicted error."""
    space = prepared.space
    known: list[Choice] = [pair for pair in UNIFORM if pair in space.options]
    if known:
        return known
    totals = [sum(row[option] for row in space.errors[0]) for option in range(len(space.options))]
    return [space.options[option] for option in survivors(totals, space.costs[0])]


def best_within(found: Sequence[Found], budget: int) -> Found | None:
    """The lowest KL within `budget`; of equals the smaller."""
    return min((f for f in found if f.cost <= budget), key=lambda f: (f.quality.mean_kl, f.cost), default=None)


def pick_finalists(searched: Sequence[Found], uniform: Sequence[Found], budget: int, count: int) -> list[Found]:
    """The `count` best different candidates of the search, and the best uniform pair within the budget."""
    ranked = sorted({f.candidate: f for f in searched}.values(), key=lambda f: (f.quality.mean_kl, f.cost))[:count]
    baseline = best_within(uniform, budget)
    known = {f.candidate for f in ranked}
    return ranked if baseline is None or baseline.candidate in known else [*ranked, baseline]


def rank(prepared: Prepared, finalists: Sequence[Found], task: tasks.Task | None, progress: Progress) -> list[Finalist]:
    """Rank on the validation text: those worse than the best beyond chance go last, then fewer bytes, then lower KL.

    Chance is one standard error of the paired difference for the KL, and the 95 % interval for the task's accuracy,
    which separates neighbours only with many items.
    """
    formats = [prepared.formats(found.candidate) for found in finalists]
    parts = rescore(prepared.model, prepared.texts["validation"], formats, progress)
    scored = sorted(
        (Finalist(found, own) for found, own in zip(finalists, parts, strict=True)), key=lambda f: f.quality.mean_kl
    )
    close = [f for f in scored if f is scored[0] or _alike(f, scored[0])]
    rest = [f for f in scored if not any(f is other for other in close)]
    if task is not None:
        close = [_answered(prepared, f, task, progress) for f in close]
        best = max(close, key=lambda f: sum(f.answers or ()))
        worse = [f for f in close if tasks.difference(f.answers or [], best.answers or [])[1] < 0]
        close, rest = [f for f in close if f not in worse], [*worse, *rest]
    return [*sorted(close, key=lambda f: (f.found.cost, f.quality.mean_kl)), *rest]


def _alike(one: Finalist, best: Finalist) -> bool:
    difference, spread = paired(one.parts, best.parts)
    return difference <= spread


def _answered(prepared: Prepared, finalist: Finalist, task: tasks.Task, progress: Progress) -> Finalist:
    right = tasks.answers(prepared.model, task, prepared.formats(finalist.found.candidate), progress)
    return Finalist(finalist.found, finalist.parts, right)


def wrap(
    prepared: Prepared,
    settings: TuneSettings,
    budget: int,
    finalists: Sequence[Finalist],
    searched: Sequence[Found],
    uniform: Sequence[Found],
    evaluations: int,
    task: tasks.Task | None,
    progress: Progress,
) -> Table:
    """Make the artefact of the first finalist."""
    chosen, candidate = finalists[0], finalists[0].found.candidate
    baseline = best_within(uniform, chosen.found.cost)
    record = Search(
        sampler=settings.search.sampler,
        seed=settings.search.seed,
        trials=len(searched),
        evaluations=evaluations,
        budget_bytes=budget,
        groups=[list(group.layers) for group in prepared.space.groups],
        objective=_measured(prepared, "search", chosen.found.quality),
        validation=_measured(prepared, "validation", chosen.quality),
        accuracy=_accuracy(prepared, chosen, task, progress),
        neighbours=[_point(one) for one in neighbours(chosen.found, [*searched, *uniform])],
        uniform=None if baseline is None else _point(baseline),
    )
    return seal(
        {
            "schema": 1,
            "kind": "kvtuner.table",
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "jettison": __version__,
            "model": prepared.shape,
            "source": _source(prepared, settings, budget, candidate),
            "payload": payload(prepared, candidate),
            "search": record,
            "canary": canary(prepared, candidate, progress),
            "versions": versions(),
        }
    )


def _source(prepared: Prepared, settings: TuneSettings, budget: int, candidate: Candidate) -> Source:
    return Source(
        method=f"{settings.metric} sensitivities, dynamic programme, {settings.search.sampler}",
        data=prepared.data,
        data_sha256=parts_sha256(prepared.texts),
        tokens=sum(len(ids) for texts in prepared.texts.values() for ids in texts),
        seed=settings.search.seed,
        capacity_ratio=4 * prepared.shape.elements / budget,
        block_size=settings.block_size,
        predicted_kl=predicted_kl(prepared, candidate),
    )


def predicted_kl(prepared: Prepared, candidate: Candidate) -> float:
    """Sum of the KL that each layer alone is predicted to cost, nats, whatever metric the search goes by."""
    rows = prepared.measured[candidate.sink_tokens].kl.tolist()
    options = prepared.space.options
    return max(0.0, sum(row[options.index(pair)] for row, pair in zip(rows, candidate.pairs, strict=True)))


def payload(prepared: Prepared, candidate: Candidate) -> Payload:
    """What is in force at run time."""
    measured = prepared.measured[prepared.space.sinks[0]]
    named = isinstance(candidate.pairs[0][0], str)
    return Payload(
        layers=[_layer(number, pair) for number, pair in enumerate(candidate.pairs)],
        rotate=prepared.formats.rotate and not named,
        sink_tokens=candidate.sink_tokens,
        key_center=encode_channels(measured.key_center),
        key_scale=encode_channels(measured.key_scale),
        codec="named" if named else "token-head",
    )


def _layer(number: int, pair: Choice) -> LayerBits:
    key, value = pair
    if isinstance(key, str):
        return LayerBits.named(number, key, str(value))
    return LayerBits(layer=number, key_bits=key, value_bits=value)  # type: ignore[arg-type]


def canary(prepared: Prepared, candidate: Candidate, progress: Progress) -> Canary:
    """A sample of up to 2,048 tokens with what the candidate does to it."""
    progress("canary", 0, 1)
    ids = joined(prepared.texts["canary"], CANARY_TOKENS)
    return record_canary(prepared.model, ids.tolist(), prepared.formats(candidate))


def neighbours(chosen: Found, found: Sequence[Found]) -> list[Found]:
    """The next smaller and the next larger undominated candidate, of those that there are."""
    front = pareto(found)
    smaller = [f for f in front if f.cost < chosen.cost][-1:]
    return [*smaller, *[f for f in front if f.cost > chosen.cost][:1]]


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _accuracy(prepared: Prepared, chosen: Finalist, task: tasks.Task | None, progress: Progress) -> list[Accuracy]:
    if task is None or chosen.answers is None:
        return []
    exact = tasks.answers(prepared.model, task, None, progress)
    named = ((task.name, chosen.answers), (f"{task.name}, not quantised", exact))
    return [Accuracy(task=name, **asdict(tasks.wilson(right))) for name, right in named]


def _measured(prepared: Prepared, part: str, found: Quality) -> Measured:
    return Measured(
        data=prepared.data,
        data_sha256=texts_sha256(prepared.texts[part]),
        positions=found.positions,
        kl=max(0.0, found.mean_kl),
        standard_error=found.standard_error,
        top1_agreement=found.top1_agreement,
    )


def _point(found: Found) -> Point:
    return Point(
        pairs=write_pairs(found.candidate.pairs),
        sink_tokens=found.candidate.sink_tokens,
        bytes_per_token=found.cost,
        kl=max(0.0, found.quality.mean_kl),
    )
