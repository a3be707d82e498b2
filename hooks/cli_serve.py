"""`jettison serve` and `jettison flags`: compose the engine's command, and run or print it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from jettison.hooks.compose import PLATFORMS, Command, compose, runnable
from jettison.hooks.console import json_option, print_json
from jettison.hooks.errors import EnvironmentRefused
from jettison.hooks.host import Host

_PASS_ON = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
Function = TypeVar("Function", bound=Callable[..., Any])


def _composing(function: Function) -> Function:
    options = (
        click.option(
            "--with", "selections", multiple=True, metavar="NAME[=VALUE]", help="Switch a plugin on; repeatable."
        ),
        click.option("--strict", is_flag=True, help="Refuse if any installed plugin is broken."),
        click.option("--platform", type=click.Choice(PLATFORMS), default="auto", help="Which vLLM build will run it."),
        click.argument("engine_args", nargs=-1, type=click.UNPROCESSED, metavar="MODEL [VLLM FLAGS]...", required=True),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.command(context_settings=_PASS_ON)
@_composing
@json_option
def flags(
    selections: tuple[str, ...], strict: bool, platform: str, engine_args: tuple[str, ...], as_json: bool
) -> None:
    """Print the engine's command that `serve` would run.

    Every flag that is not listed here is vLLM's own and is passed on.
    """
    command = compose(Host.discover(strict=strict), selections, engine_args, platform=platform)
    argv = runnable(command.argv, platform)
    if as_json:
        print_json(_as_dict(command, argv))
    else:
        click.echo(shlex.join(argv))


@click.command(context_settings=_PASS_ON)
@_composing
def serve(selections: tuple[str, ...], strict: bool, platform: str, engine_args: tuple[str, ...]) -> None:
    """Run `vllm serve` with plugins switched on.

    Every flag that is not listed here is vLLM's own and is passed on.
    """
    from jettison.hooks.doctor import require_engine

    command = compose(Host.discover(strict=strict), selections, engine_args, platform=platform)
    require_engine()
    program, *arguments = runnable(command.argv, platform)
    path = shutil.which(program, path=_search_path())
    if path is None:
        do = "pip install 'jettison[cpu]' or 'jettison[cuda]'"
        raise EnvironmentRefused(f"the command {program} is not installed", do=do)
    click.echo(f"jettison: {', '.join(command.active) or 'no plugin'} on", err=True)
    sys.stdout.flush()
    # NOTES: the engine replaces this process, so that signals and exit codes are its own.
    os.execv(path, [path, *arguments])  # noqa: S606  no shell, our own argument list


def _search_path() -> str:
    """Programs of this environment first, whether or not it is activated."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))


def _as_dict(command: Command, argv: Sequence[str]) -> dict[str, Any]:
    file = command.config_file
    return {"argv": list(argv), "active": list(command.active), "config_file": str(file) if file else None}
