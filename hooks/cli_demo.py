"""`jettison demo`: the main job on a real model, stock beside Jettison."""

from __future__ import annotations

from pathlib import Path

import click

from jettison.hooks.console import json_option


@click.command()
@click.option("--build", type=click.Path(file_okay=False, path_type=Path), default=Path("build"), show_default=True)
@json_option
def demo(build: Path, as_json: bool) -> int:
    """Serve a real model once stock and once with Jettison, and show what was saved."""
    from jettison.hooks.demo import run

    return run(build, as_json=as_json)
