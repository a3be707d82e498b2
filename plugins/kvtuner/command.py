"""`jettison kvtuner`: make a table for a model, look at one."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jettison.hooks.console import json_option, print_json, print_table, progress
from jettison.plugins.kvtuner.command_measure import check, drift
from jettison.plugins.kvtuner.command_presets import COMMANDS
from jettison.plugins.kvtuner.command_search import codecs, compare, report, search
from jettison.plugins.kvtuner.summary import print_summary, summary
from jettison.plugins.kvtuner.table import Table, load_table

if TYPE_CHECKING:
    from jettison.plugins.kvtuner.sensitivity import Sensitivity

SHOWN = ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2))
"""Pairs that `sensitivity` prints of the 16 that it measures."""


@click.group()
def kvtuner() -> None:
    """Mixed-precision KV cache: measure a model's layers and choose their bits."""


for command in (search, report, compare, codecs, check, drift, *COMMANDS):
    kvtuner.add_command(command)


@kvtuner.command()
@click.argument("model")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Table to write.")
@click.option("--ratio", default=3.0, show_default=True, help="Cache capacity, as a multiple of a 16-bit cache.")
@click.option("--sink-tokens", default=1, show_default=True, help="First tokens of a sequence kept at 16 bits.")
@click.option("--block-size", default=128, show_default=True, help="Tokens per block of the engine.")
@click.option("--texts", default=2, show_default=True, help="Calibration texts taken from the packaged data.")
@click.option("--length", default=1024, show_default=True, help="Tokens per calibration text.")
@click.option("--text", "files", multiple=True, type=click.Path(path_type=Path), help="Text file to use instead.")
@click.option("--seed", default=0, show_default=True)
@json_option
def sensitivity(model: str, output: Path, files: tuple[Path, ...], as_json: bool, **settings: Any) -> None:
    """Measure MODEL (a checkpoint folder) and write its table.

    Takes one forward and one backward pass over about 2,000 tokens: half a minute for a 135M model on two cores.
    """
    from jettison.plugins.kvtuner.calibration import Settings, calibrate

    wanted = Settings(**{field.name: settings[field.name] for field in fields(Settings)})
    started = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("load")

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        table, measured = calibrate(model, wanted, files, progress=show)
    table.save(output)
    seconds = time.perf_counter() - started
    if measured.warning:
        click.echo(f"jettison: {measured.warning}", err=True)
    if as_json:
        print_json({**summary(table), "seconds": round(seconds, 1), "layers": _layers(table, measured)})
        return
    rows = [tuple(row.values()) for row in _layers(table, measured)]
    print_table(tuple(_layers(table, measured)[0]), rows, title="predicted KL in 1e-6 nats, per layer alone")
    print_summary(table)
    click.echo(f"{output} written in {seconds:.0f} s. Use it: jettison serve {model} --with kvtuner={output}")


@kvtuner.command()
@click.argument("table", type=click.Path(path_type=Path))
@json_option
def show(table: Path, as_json: bool) -> None:
    """Check TABLE and show what it holds."""
    content = load_table(table)
    if as_json:
        print_json(summary(content))
        return
    rows = [(layer, *pair) for layer, pair in enumerate(content.payload.choices)]
    print_table(("layer", "keys, bits", "values, bits"), rows, title=content.model.name)
    print_summary(content)


def _layers(table: Table, measured: Sensitivity) -> list[dict[str, Any]]:
    from jettison.plugins.kvtuner.sensitivity import PAIRS

    rows = []
    for layer, (key, value) in enumerate(table.payload.pairs):
        row: dict[str, Any] = {"layer": layer, "chosen": f"k{key}v{value}"}
        for pair in SHOWN:
            row[f"k{pair[0]}v{pair[1]}"] = round(float(measured.kl[layer, PAIRS.index(pair)]) * 1e6, 1)
        row["e_o k4v4"] = round(float(measured.output_error[layer, PAIRS.index((4, 4))]), 4)
        rows.append(row)
    return rows
