"""Searched tables, uniform pairs and shuffled tables at real-bits budgets, on SmolLM2 and text that no search has seen.

    python integration/bench_kv_quality.py [--quick] [--trials 16] [--positions 512]

Each budget is one run of what `jettison kvtuner search --bits B` runs; `uniform` is the pair of lowest held-out KL that
is no larger than the budget, at any of the sink settings that the search had, `shuffled` the searched table with its
layers permuted. Writes JSON and, beside it, the curves as PNG. Interrupted, it takes up what its searches measured.
"""

from __future__ import annotations

import argparse
import random
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from jettison.hooks import assets
from jettison.hooks.console import print_table, progress
from jettison.hooks.quality import summarise
from jettison.hooks.results import Results
from jettison.plugins.kvtuner import calibration, tasks, tune
from jettison.plugins.kvtuner.group import parse_how
from jettison.plugins.kvtuner.ledger import Ledger
from jettison.plugins.kvtuner.prepare import Prepared, TuneSettings, prepare, real_bits, resolve_budget
from jettison.plugins.kvtuner.quality import paired, rescore
from jettison.plugins.kvtuner.search import SearchSettings
from jettison.plugins.kvtuner.space import Candidate

HERE = Path(__file__).resolve().parent
BUDGETS = tuple(2.5 + 0.25 * n for n in range(24))
QUICK = (4.25,)
Parts = list[tuple[Tensor, Tensor]]


def main() -> None:
    options = _options()
    results = Results.start()
    settings = TuneSettings(
        search=SearchSettings(options.sampler, options.trials, options.population, 0),
        groups=parse_how(options.groups),
        search_length=options.search_length,
        validation_length=options.validation_length,
        finalists=options.finalists,
        items=0,
    )
    if options.quick:
        settings = replace(settings, length=64, search_length=64, validation_length=64, finalists=2, sinks=(0,))
    work = options.build / ("kv_quality-quick" if options.quick else "kv_quality")
    work.mkdir(parents=True, exist_ok=True)
    with progress() as bar, Ledger(work / "journal.log") as ledger:
        task = bar.add_task("load")

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        prepared = prepare(str(assets.checkpoint(options.build)), settings, (), work, progress=show)
        chosen = {
            budget: tune.tune(prepared, resolve_budget(prepared.shape, bits=budget), settings, ledger, progress=show)
            for budget in options.budgets
        }
        candidates = {budget: _three(outcome.chosen.candidate) for budget, outcome in chosen.items()}
        uniform = [Candidate((pair,) * prepared.space.num_layers, s) for pair in tune.UNIFORM for s in settings.sinks]
        unique = list(dict.fromkeys([*uniform, *(one for three in candidates.values() for one in three)]))
        texts = calibration.token_texts(prepared.tokenizer, "held-out", 2 if options.quick else 4, options.positions)
        parts = dict(
            zip(unique, rescore(prepared.model, texts, [prepared.formats(one) for one in unique], show), strict=True)
        )
        for budget, (searched, shuffled) in candidates.items():
            size = resolve_budget(prepared.shape, bits=budget)
            within = [one for one in uniform if prepared.space.cost(one) <= size]
            best = min(within, key=lambda one: summarise(parts[one]).mean_kl)
            systems = {"search": searched, "uniform": best, "shuffled": shuffled}
            _record(results, prepared, budget, systems, parts)
        if options.items:
            _accuracy(results, prepared, candidates, options.items, show)
    results.write(options.output)
    _print(results, options.budgets)
    _picture(results, options.budgets, options.output.with_suffix(".png"))


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=HERE.parent / "build")
    parser.add_argument("--trials", type=int, default=16, help="candidates per budget")
    parser.add_argument("--population", type=int, default=8, help="also the number of the programme's own among them")
    parser.add_argument("--search-length", type=int, default=256, help="tokens of each text a candidate is run on")
    parser.add_argument("--validation-length", type=int, default=512, help="tokens of each text finalists are run on")
    parser.add_argument("--finalists", type=int, default=4)
    parser.add_argument("--sampler", choices=("dp", "nsga2", "moead"), default="nsga2")
    parser.add_argument("--groups", default="singleton", help="auto, singleton, or a number")
    parser.add_argument("--positions", type=int, default=512, help="tokens of each of the four held-out texts")
    parser.add_argument("--items", type=int, default=0, help="LAMBADA items for each searched table")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="real bits per element")
    parser.add_argument("--quick", action="store_true", help="one budget, six trials, short texts")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "kv_quality.json")
    options = parser.parse_args()
    if options.quick:
        options.budgets, options.trials, options.population = QUICK, 6, 4
        options.positions = min(options.positions, 64)
    return options


def _three(searched: Candidate) -> tuple[Candidate, Candidate]:
    """The searched table, and the same pairs on other layers."""
    pairs = list(searched.pairs)
    random.Random(0).shuffle(pairs)
    return searched, Candidate(tuple(pairs), searched.sink_tokens)


def _record(
    results: Results, prepared: Prepared, budget: float, systems: dict[str, Candidate], parts: dict[Candidate, Parts]
) -> None:
    case = f"{budget:g}"
    for system, candidate in systems.items():
        found = summarise(parts[candidate])
        size = prepared.space.cost(candidate)
        difference, spread = paired(parts[candidate], parts[systems["search"]])
        for metric, value, unit in (
            ("kl", found.mean_kl, "nats"),
            ("standard_error", found.standard_error, "nats"),
            ("top1_agreement", found.top1_agreement, "ratio"),
            ("real_bits", real_bits(prepared.shape, size), "bits"),
            ("nominal_bits", candidate.nominal_bits, "bits"),
            ("bytes_per_token", size, "bytes"),
            ("sink_tokens", candidate.sink_tokens, "tokens"),
            ("kl_above_search", difference, "nats"),
            ("kl_above_search_error", spread, "nats"),
        ):
            results.add(case, system, metric, value, unit)


def _accuracy(
    results: Results,
    prepared: Prepared,
    candidates: dict[float, tuple[Candidate, Candidate]],
    items: int,
    show: Callable[[str, int, int], None],
) -> None:
    task = tasks.lambada(prepared.tokenizer, "held-out", items)
    formats = {f"{budget:g}": prepared.formats(searched) for budget, (searched, _) in candidates.items()}
    for case, system, forms in (
        ("16", "unquantised", None),
        *((case, "search", forms) for case, forms in formats.items()),
    ):
        found = tasks.wilson(tasks.answers(prepared.model, task, forms, show))
        for metric, value in (("lambada", found.share), ("lambada_low", found.low), ("lambada_high", found.high)):
            results.add(case, system, metric, value, "ratio")


def _print(results: Results, budgets: Sequence[float]) -> None:
    systems = ("search", "uniform", "shuffled")
    rows = []
    for case in (f"{budget:g}" for budget in budgets):
        sizes = [results.value(case, "real_bits", system) for system in systems[:2]]
        rows.append((case, *sizes, *(results.value(case, "kl", system) for system in systems)))
    print_table(("budget", "search, bits", "uniform, bits", *(f"KL {s}" for s in systems)), rows, title="held-out text")


def _picture(results: Results, budgets: Sequence[float], file: Path) -> None:
    """KL with standard errors (log scale) against the budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for system, style in (("search", "o-"), ("uniform", "s-"), ("shuffled", "x--")):
        columns = [
            [results.value(f"{budget:g}", metric, system) for budget in budgets] for metric in ("kl", "standard_error")
        ]
        axes.errorbar(budgets, *columns, fmt=style, label=system, capsize=2, markersize=4)
    axes.set(yscale="log", xlabel="budget, real bits per element", ylabel="mean KL, nats")
    axes.set_title(textwrap.fill(results.command, 100), fontsize=8)
    axes.legend()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
