"""The command `jettison`. Each subcommand lives in its own module and is imported when it is called."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import click

from jettison.hooks.errors import JettisonError

logger = logging.getLogger("jettison")

BUILT_IN = {
    "bench": "jettison.hooks.cli_bench:bench",
    "demo": "jettison.hooks.cli_demo:demo",
    "doctor": "jettison.hooks.cli_doctor:doctor",
    "flags": "jettison.hooks.cli_serve:flags",
    "plugins": "jettison.hooks.cli_plugins:plugins",
    "serve": "jettison.hooks.cli_serve:serve",
}
INTERRUPTED = 130


class _Commands(click.Group):
    """Built-in commands first; plugins are looked for only when theirs are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*BUILT_IN, *self._of_plugins()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in BUILT_IN:
            module, _, name = BUILT_IN[cmd_name].partition(":")
            command: click.Command = getattr(import_module(module), name)
            return command
        return self._of_plugins().get(cmd_name)

    @staticmethod
    @cache
    def _of_plugins() -> dict[str, click.Command]:
        return plugin_commands()


def plugin_commands() -> dict[str, click.Command]:
    """Return the subcommands of all plugins; one that fails or takes a name already taken is warned of and left out."""
    from jettison.hooks.host import Host

    commands: dict[str, click.Command] = {}
    for info in Host.discover().plugins.values():
        if info.hook is None:
            continue
        group = click.Group(info.name)
        try:
            info.hook.commands(cli=group)
        except Exception as error:  # a plugin's commands must not take the others' away
            logger.warning("Plugin %r adds no commands: %s: %s", info.name, type(error).__name__, error)
            continue
        for name, command in group.commands.items():
            if name in commands or name in BUILT_IN:
                logger.warning("Plugin %r cannot add the command %r: the name is taken.", info.name, name)
            else:
                commands[name] = command
    return commands


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="jettison", prog_name="jettison")
def cli() -> None:
    """Throw overboard what your model does not need.

    Exit codes: 0 done, 1 measured but a gate failed, 2 usage or configuration, 3 environment (engine, version, device,
    installation), 4 an input file was refused, 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every refusal is one sentence on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        outcome: Any = cli.main(words, prog_name="jettison", standalone_mode=False)
    except JettisonError as error:
        return _refused(error, words)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("jettison: interrupted.", err=True)
        return INTERRUPTED
    return outcome if isinstance(outcome, int) else 0


def _refused(error: JettisonError, words: Sequence[str]) -> int:
    click.echo(f"jettison: {error}", err=True)
    if "--json" in words:
        kind = type(error).__name__
        click.echo(json.dumps({"error": {"type": kind, "message": str(error), "exit_code": error.exit_code}}))
    return error.exit_code
