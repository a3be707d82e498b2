"""`jettison plugins`: what is installed, and what is broken."""

from __future__ import annotations

import click

from jettison.hooks.console import json_option, print_json, print_table
from jettison.hooks.host import Host, PluginInfo


@click.command()
@json_option
@click.option("--schema", metavar="NAME", help="Print the JSON Schema of a plugin's options instead.")
def plugins(as_json: bool, schema: str | None) -> None:
    """List the installed plugins."""
    host = Host.discover()
    if schema is not None:
        print_json(host.options_of(schema).model_json_schema())
    elif as_json:
        print_json([_as_dict(info) for info in host.plugins.values()])
    else:
        columns = ("plugin", "distribution", "version", "options", "state")
        rows = [
            (info.name, info.distribution, info.version, ", ".join(_options(info)), info.error or "ok")
            for info in host.plugins.values()
        ]
        print_table(columns, rows)


def _as_dict(info: PluginInfo) -> dict[str, object]:
    return {
        "name": info.name,
        "distribution": info.distribution,
        "version": info.version,
        "options": _options(info),
        "error": info.error,
    }


def _options(info: PluginInfo) -> list[str]:
    return sorted(info.options.model_fields) if info.options is not None else []
