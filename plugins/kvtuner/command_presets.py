"""`jettison kvtuner import`, `export`, `verify`: published tables in, vLLM's own flags out, a table's canary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from jettison.hooks.console import json_option, print_json, print_table
from jettison.hooks.errors import ConfigError
from jettison.hooks.files import write_atomically
from jettison.plugins.kvtuner.table import load_table
from jettison.plugins.kvtuner.vllm_export import FORMATS, recipe

if TYPE_CHECKING:
    from jettison.plugins.kvtuner.presets import Mode, Preset
    from jettison.plugins.kvtuner.table import Table

MODES = ("per-token", "per-channel")
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("import")
@click.argument("preset", type=_FILE)
@click.option("--model", required=True, help="Checkpoint folder that the preset was made for.")
@click.option("-o", "--output", type=_FILE, help="Table to write; without it the preset is only checked.")
@click.option("--mode", type=click.Choice(MODES), help="How it quantises keys; the file's name tells if not given.")
@click.option("--rotate", is_flag=True, help="Rotate keys and values; the published tables were searched without.")
@json_option
def import_preset(
    preset: Path, model: str, output: Path | None, mode: Mode | None, rotate: bool, as_json: bool
) -> None:
    """Check PRESET, a table published by the paper's authors (YAML), and turn it into a table of MODEL.

    A preset of per-channel keys ("kivi") becomes a table for the Hugging Face cache; engines refuse it.
    """
    from jettison.plugins.kvtuner.presets import model_shape, read_preset, to_table

    read = read_preset(preset, mode)
    table = to_table(read, model_shape(model), rotate=rotate)
    if output is not None:
        table.save(output)
    if as_json:
        sizes = table.measure_sizes().model_dump()
        print_json({"preset": read.name, "mode": read.mode, "layers": len(read.pairs), **sizes})
        return
    _print_import(read, table)
    if output is not None:
        use = f" Use it: jettison serve {model} --with kvtuner={output}" if read.mode == "per-token" else ""
        click.echo(f"{output} written.{use}")


def _print_import(read: Preset, table: Table) -> None:
    sizes = table.measure_sizes()
    click.echo(
        f"{read.name}: {len(read.pairs)} layers, {read.mode}, {read.nominal_bits:.2f} bits as published, "
        f"{sizes.real_bits:.2f} real bits ({sizes.bytes_per_token} bytes per token of {table.model.name})"
    )
    if read.mode == "per-channel":
        click.echo("Per-channel keys: for the Hugging Face cache only (PackedCache.from_table); engines refuse it.")


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--to", "engine", type=click.Choice(["vllm"]), required=True, help="Engine to write flags for.")
@click.option("--format", "cache_dtype", type=click.Choice(list(FORMATS)), help="vLLM's format; the first that fits.")
@click.option("-o", "--output", type=_FILE, help="Write the recipe as JSON.")
@json_option
def export(table: Path, engine: str, cache_dtype: str | None, output: Path | None, as_json: bool) -> None:
    """Say TABLE in an engine's own flags, for use without this plugin.

    Stock vLLM has one format beside 16 bits; a table that needs more is refused, and the layer named.
    """
    found = recipe(load_table(table), cache_dtype)
    if output is not None:
        write_atomically(output, found.text())
    if as_json:
        print_json(found.content)
        return
    click.echo(found.command)
    real = 16 * found.bytes_per_token / found.bf16_bytes_per_token
    click.echo(
        f"# {real:.2f} real bits ({found.nominal_bits:.2f} nominal), {found.bytes_per_token} bytes per token instead "
        f"of {found.bf16_bytes_per_token}; {engine} quantises in its own way ({found.cache_dtype}), so the table's KL "
        "does not hold for it.",
        err=True,
    )


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.argument("model", required=False)
@click.option("--url", help="A running vLLM server to compare instead, e.g. http://127.0.0.1:8000.")
@json_option
def verify(table: Path, model: str | None, url: str | None, as_json: bool) -> None:
    """Run the sample stored in TABLE through MODEL, or a running server, and compare with what was stored.

    With MODEL, a checkpoint folder, fails unless the KL agrees within 5 % (and 1e-5 nats), and the model's own
    likelihood of the sample within 0.01 nats per token. Two passes over about 2,000 tokens.

    With --url one request: fails if the server's log-probabilities differ from the unquantised model's by more than
    the table's did (and a quarter, and 0.05 nats for 16-bit arithmetic).
    """
    from jettison.plugins.kvtuner.canary import check_sample

    content = load_table(table)
    check_sample(content)
    if (model is None) == (url is None):
        raise ConfigError("neither or both of MODEL and --url are given", allowed="exactly one of them is needed")
    if url is not None:
        _verify_server(content, url, as_json=as_json)
    else:
        _verify_model(content, str(model), as_json=as_json)


def _verify_server(content: Table, url: str, *, as_json: bool) -> None:
    from jettison.plugins.kvtuner.engine_canary import verify_server

    found = verify_server(content, url)
    if as_json:
        print_json(found.content)
    else:
        quantises = {True: "quantises", False: "does not quantise as the table", None: "may or may not quantise"}
        rows = [("the table, when it was made", found.effect, ""), ("the server", found.found, found.limit)]
        title = f"{found.places} positions of {found.tokens} tokens; the server {quantises[found.quantises]}"
        print_table(("from the unquantised model, nats per token", "mean", "allowed"), rows, title=title)
    found.check(content)


def _verify_model(content: Table, model: str, *, as_json: bool) -> None:
    from jettison.plugins.kvtuner.calibration import load_model
    from jettison.plugins.kvtuner.canary import LIKELIHOOD, verify

    found = verify(content, load_model(model)[0])
    if as_json:
        print_json(found.content)
    else:
        rows = [
            ("KL of the table, nats", found.stored_kl, found.found_kl, found.tolerance),
            ("model's own nats per token", found.stored_nll, found.found_nll, LIKELIHOOD),
        ]
        print_table(("", "stored", "here", "allowed difference"), rows, title=f"{found.tokens} tokens")
    found.check(content)


COMMANDS: tuple[click.Command, ...] = (import_preset, export, verify)
"""Added to the group `jettison kvtuner`."""
