"""TrimR on a trained reasoner in real vLLM: tokens and accuracy against no control, a budget and the first answer.

    python integration/lab/train_reasoner.py && python integration/bench_trimr_reasoner.py [--problems 600]

All systems have the same held-out problems, seeds, sampling and output limit. `budget` is vLLM's own
`thinking_token_budget` at the mean thinking tokens of `jettison`; it, `first_answer` and forceful stops end thinking
with the same words. A stop is false if its answer is wrong and going on from there untrimmed gives the right one.
Writes case `reasoner` of trimr.json, other cases kept, and a picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm_engines  # before vLLM: it sets the environment
from jettison.hooks.console import print_table, progress
from jettison.hooks.results import Results, load
from jettison.plugins.trimr.config import TrimROptions
from lab import measure, systems
from lab.levels import LEVELS
from lab.measure import Outcome
from lab.systems import Response, Task

HERE = Path(__file__).resolve().parent
CASE = "reasoner"
SYSTEMS = ("none", "budget", "first_answer", "jettison")
TRIMR: dict[str, dict[str, Any]] = {
    "full": {},
    "mini": {"min_think_tokens": 48, "min_thought_tokens": 16, "poll_tokens": 8},
}
"""Options of `--with trimr` per level: the defaults, and a scale for thoughts of thirty tokens."""


@dataclass(frozen=True)
class Run:
    """What the systems answered: responses and outcomes by system, false stops and stops, the matched budget."""

    responses: Mapping[str, Sequence[Response]]
    outcomes: Mapping[str, Sequence[Outcome]]
    stops: Mapping[str, tuple[int, int]]
    budget: int


def main() -> None:
    options = _options()
    results = Results.start()
    run = measured(options.model, options.level, options.problems, options.temperature, options.seed)
    record(results, run)
    results.rows = [*_other_cases(options.output), *results.rows]
    results.write(options.output)
    _print(results)
    _picture(results, options.output.with_name(f"{options.output.stem}_reasoner.png"))


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=sorted(LEVELS), default="full")
    parser.add_argument("--model", type=Path, help="default: build/reasoner-LEVEL")
    parser.add_argument("--problems", type=int, default=600)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "trimr.json")
    options = parser.parse_args()
    options.model = options.model or HERE.parent / "build" / f"reasoner-{options.level}"
    if not (options.model / "model.safetensors").exists():
        parser.error(
            f"no reasoner in {options.model}; python integration/lab/train_reasoner.py --level {options.level}"
        )
    return options


def measured(model: Path, level_name: str, problems: int, temperature: float, seed: int) -> Run:
    """Run all systems."""
    from transformers import AutoTokenizer

    level = LEVELS[level_name]
    trimr = TRIMR[level_name]
    limit = level.length - 128
    task = Task(
        measure.held_out(level, problems), AutoTokenizer.from_pretrained(model), limit, temperature, seed * problems
    )
    with progress() as bar:
        step = bar.add_task("jettison", total=5)
        engine = systems.settings(level.length, dtype="auto" if _on_gpu() else "float32")
        with vllm_engines.running(model, {"trimr": trimr}, logits_processors=[vllm_engines.POLICIES], **engine) as llm:
            ours = systems.jettison(task, llm, TrimROptions(**trimr))
            faults = vllm_engines.status_of(llm)["faults"]
            assert faults == {}, f"policies failed: {faults}"
        bar.update(step, completed=1, description="none")
        mean = sum(task.thinking(one.ids) for one in ours) / problems
        with vllm_engines.running(model, None, **engine) as llm:
            whole = task.whole(llm)
            bar.update(step, completed=2, description="budget")
            budgeted, tokens = systems.budget(task, llm, whole, mean)
            bar.update(step, completed=3, description="first_answer")
            first = systems.first_answer(task, llm, whole)
            bar.update(step, completed=4, description="false stops")
            none = [Response(ids) for ids in whole]
            responses = dict(zip(SYSTEMS, (none, budgeted, first, ours), strict=True))
            stops = {name: systems.false_stops(task, llm, found) for name, found in responses.items()}
    outcomes = {name: [task.judge(row, one.ids) for row, one in enumerate(found)] for name, found in responses.items()}
    return Run(responses, outcomes, stops, tokens)


def _on_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def record(results: Results, run: Run) -> None:
    """Add every figure of case `reasoner`."""
    for name, outcomes in run.outcomes.items():
        false, stops = run.stops[name]
        share = measure.wilson(false, stops)
        for metric, value in measure.phenomena(outcomes).items():
            results.add(CASE, name, metric, value, "tokens" if metric == "thinking_tokens" else "ratio")
        for metric, value in zip(("", "_low", "_high"), share, strict=True):
            results.add(CASE, name, f"false_stop_rate{metric}", value, "ratio")
        results.add(CASE, name, "stops", stops, "responses")
        results.add(CASE, name, "problems", len(outcomes), "problems")
    results.add(CASE, "budget", "thinking_token_budget", run.budget, "tokens")
    correct = {name: [float(one.correct) for one in found] for name, found in run.outcomes.items()}
    tokens = {name: [float(one.thinking_tokens) for one in found] for name, found in run.outcomes.items()}
    for peer in SYSTEMS[:-1]:
        found = measure.paired_bootstrap(correct["jettison"], correct[peer])
        for metric, value in zip(("", "_low", "_high"), found, strict=True):
            results.add(CASE, "jettison", f"accuracy_above_{peer}{metric}", value, "ratio")
    saved = measure.saved_share(tokens["jettison"], tokens["none"])
    for metric, value in zip(("", "_low", "_high"), saved, strict=True):
        results.add(CASE, "jettison", f"tokens_saved{metric}", value, "ratio")


def _other_cases(file: Path) -> list[Any]:
    return [row for row in load(file).rows if row.case != CASE] if file.exists() else []


def _print(results: Results) -> None:
    metrics = ("accuracy", "thinking_tokens", "truncated_share", "false_stop_rate", "stops", "overthinking", "loops")
    rows = [(name, *(results.value(CASE, metric, name) for metric in metrics)) for name in SYSTEMS]
    print_table(("system", *metrics), rows)
    names = [f"accuracy_above_{peer}" for peer in SYSTEMS[:-1]] + ["tokens_saved"]
    compared = [(name, *(results.value(CASE, f"{name}{end}") for end in ("", "_low", "_high"))) for name in names]
    print_table(("jettison", "value", "95 % from", "to"), compared)


def _picture(results: Results, file: Path) -> None:
    """Accuracy against thinking tokens, one point per system, with the interval of its accuracy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for name in SYSTEMS:
        accuracy, tokens, count = (
            results.value(CASE, metric, name) for metric in ("accuracy", "thinking_tokens", "problems")
        )
        _, low, high = measure.wilson(round(accuracy * count), round(count))
        axes.errorbar(tokens, accuracy, [[accuracy - low], [high - accuracy]], fmt="o", capsize=4, label=name)
    axes.set(xlabel="mean thinking tokens", ylabel="accuracy", title=f"{results.value(CASE, 'problems'):.0f} problems")
    axes.legend()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
