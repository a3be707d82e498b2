"""`jettison trimr replay`: what other thresholds would have done to logged requests."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jettison.hooks.console import json_option, print_json, print_table, progress
from jettison.hooks.errors import ConfigError

if TYPE_CHECKING:
    from jettison.plugins.trimr.replay_choose import Figures, Setting

_PATH = click.Path(dir_okay=False, path_type=Path)
COLUMNS = (
    "setting", "cuts", "tokens saved %", "accuracy %", "loss, points", "95 %", "false stops %", "95 %",
)  # fmt: skip
GATE_FAILED = 1


@click.command()
@click.argument("traces", type=_PATH)
@click.option("--m", "m_values", default="1,2,3,4", show_default=True, help="Agreeing answers, M.")
@click.option("--count-mode", default="consecutive,windowed", show_default=True)
@click.option("--r-thres", help="Shares of the budget; the log's where not given.")
@click.option("--n-thres", help="Numbers of thoughts; the log's where not given.")
@click.option("--tau-equiv", help="Thresholds of the verifier's score; the log's where not given.")
@click.option("--max-loss", default=1.0, show_default=True, help="Accuracy points that may be lost, surely.")
@click.option("--limit", type=click.IntRange(min=1), help="Use the first so many requests.")
@click.option("-o", "--output", type=_PATH, help="Result file; a picture is written beside it.")
@json_option
def replay(traces: Path, max_loss: float, limit: int | None, output: Path | None, as_json: bool, **given: Any) -> int:
    """Replay TRACES, a log of `jettison trimr proxy --shadow --log-text --log TRACES`, under a grid of settings.

    A setting qualifies if the upper end of the 95 % interval of its accuracy loss is within --max-loss; of these the
    one that saves most is chosen on every other request and reported on the rest. Exit code 1: none qualifies.
    """
    from jettison.hooks.files import write_atomically
    from jettison.plugins.trimr.replay import wholes
    from jettison.plugins.trimr.replay_choose import choose, figures, grid, measure
    from jettison.plugins.trimr.replay_plot import draw
    from jettison.plugins.trimr.shadow import read_traces

    settings = grid(**_values(given))
    requests, cut = wholes(read_traces(traces)[:limit])
    with progress() as bar:
        task = bar.add_task("replay")
        outcomes = measure(requests, settings, lambda done, total: bar.update(task, completed=done, total=total))
    found = {setting: figures(of) for setting, of in outcomes.items()}
    chosen, held_out = choose(outcomes, max_loss / 100)
    known = all(request.expected is not None for request in requests)
    measured = "accuracy" if known else "agreement with the whole request"
    if output is not None:
        _results(found, chosen, held_out).write(output)
        write_atomically(output.with_suffix(".png"), draw(found, chosen, measured))
    if as_json:
        rows = [{"setting": dict(setting.values), **asdict(got)} for setting, got in found.items()]
        best = dict(chosen.values) if chosen is not None else None
        rest = asdict(held_out) if held_out is not None else None
        print_json({"measure": measured, "requests": len(requests), "left_out": cut, "settings": rows,
                    "chosen": best, "held_out": rest})  # fmt: skip
    else:
        _print(found, chosen, held_out, measured, cut)
    return 0 if chosen is not None else GATE_FAILED


def _values(given: dict[str, Any]) -> dict[str, list[Any]]:
    """The grid: lists from the flags, validated as options are."""
    kinds = {"m_values": ("M", int), "count_mode": ("count_mode", str), "r_thres": ("r_thres", float),
             "n_thres": ("n_thres", int), "tau_equiv": ("tau_equiv", float)}  # fmt: skip
    found: dict[str, list[Any]] = {}
    for flag, (name, kind) in kinds.items():
        if given[flag] is None:
            continue
        words = [word.strip() for word in given[flag].split(",") if word.strip()]
        try:
            found[name] = [kind(word) for word in words]
        except ValueError as error:
            shown = flag.replace("_values", "").replace("_", "-")
            raise ConfigError(f"--{shown} {given[flag]!r} is not a list of numbers", do="write 1,2,3") from error
        if not words:
            raise ConfigError(f"the list of {name} is empty", do="write at least one value")
    _check(found)
    return found


def _check(values: dict[str, list[Any]]) -> None:
    from jettison.hooks.config import parse_section
    from jettison.plugins.trimr.config import TrimROptions

    for name, several in values.items():
        for value in several:
            parse_section(TrimROptions, "trimr", {name: value})


def _results(found: dict[Setting, Figures], chosen: Setting | None, held_out: Figures | None) -> Any:
    from jettison.hooks.results import Results

    results = Results.start(device="replay")
    rows = [(setting.name, got) for setting, got in found.items()]
    if chosen is not None and held_out is not None:
        rows.append((f"chosen, held out: {chosen.name}", held_out))
    for case, got in rows:
        for name, unit in (("tokens", "tokens"), ("saved", "ratio"), ("accuracy", "ratio"), ("loss", "ratio")):
            results.add(case, "jettison", name, getattr(got, name), unit)
        for name, interval in (("saved", got.saved_interval), ("loss", got.loss_interval)):
            results.add(case, "jettison", f"{name}_low", interval[0], "ratio")
            results.add(case, "jettison", f"{name}_high", interval[1], "ratio")
        if got.false_stop_rate is not None:
            results.add(case, "jettison", "false_stop_rate", got.false_stop_rate, "ratio")
            results.add(case, "jettison", "false_stop_rate_low", got.false_stop_interval[0], "ratio")
            results.add(case, "jettison", "false_stop_rate_high", got.false_stop_interval[1], "ratio")
        results.add(case, "none", "tokens", got.whole_tokens, "tokens")
        results.add(case, "none", "accuracy", got.whole_accuracy, "ratio")
    return results


def _print(
    found: dict[Setting, Figures], chosen: Setting | None, held_out: Figures | None, measured: str, cut: int
) -> None:
    title = f"{next(iter(found.values())).requests} requests; accuracy is {measured}"
    print_table(COLUMNS, [_row(setting.name, got) for setting, got in found.items()], title=title)
    if cut:
        click.echo(f"{cut} traces were cut while they ran and are left out.")
    if chosen is None or held_out is None:
        click.echo("No setting stays within --max-loss for sure: log more requests, or allow more loss.")
        return
    print_table(COLUMNS, [_row(chosen.name, held_out)], title="chosen, on the requests that had no part in the choice")


def _row(name: str, got: Figures) -> tuple[object, ...]:
    rate = None if got.false_stop_rate is None else 100 * got.false_stop_rate
    return (
        name, got.cuts, 100 * got.saved, 100 * got.accuracy, 100 * got.loss, _span(got.loss_interval),
        rate, _span(got.false_stop_interval),
    )  # fmt: skip


def _span(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
