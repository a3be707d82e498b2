"""`jettison bench`: look at what was measured."""

from __future__ import annotations

import click

from jettison.hooks.console import json_option, print_json, print_table
from jettison.hooks.results import Results, load


@click.group()
def bench() -> None:
    """Look at benchmark results."""


@bench.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@json_option
def report(files: tuple[str, ...], as_json: bool) -> None:
    """Show result files as tables."""
    results = {file: load(file) for file in files}
    if as_json:
        print_json({file: result.model_dump(mode="json") for file, result in results.items()})
        return
    for file, result in results.items():
        _print(file, result)


def _print(file: str, result: Results) -> None:
    rows = [(row.case, row.system, row.metric, row.value, row.unit) for row in result.rows]
    print_table(("case", "system", "metric", "value", "unit"), rows, title=file)
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    commit = f", commit {result.commit[:12]}" if result.commit else ""
    click.echo(f"{result.command}\n{result.date} on {result.device}{commit}\n{versions}\n")
