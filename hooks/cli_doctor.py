"""`jettison doctor`: is everything there, does it load, and what would be in force?"""

from __future__ import annotations

from typing import Any

import click

from jettison.hooks.compose import section_of
from jettison.hooks.config import section_from
from jettison.hooks.console import json_option, print_json, print_table
from jettison.hooks.doctor import BROKEN, Check, examine
from jettison.hooks.engine_args import EngineArgs, merge
from jettison.hooks.errors import EnvironmentRefused, JettisonError
from jettison.hooks.host import Host


@click.command()
@click.option("--with", "selections", multiple=True, metavar="NAME[=VALUE]", help="Try this plugin; repeatable.")
@click.option("--additional-config", metavar="JSON", help="Try the `jettison` section of this vLLM option.")
@click.option("--quick", is_flag=True, help="Do not import vLLM.")
@json_option
def doctor(selections: tuple[str, ...], additional_config: str | None, quick: bool, as_json: bool) -> int:
    """Check the install, the engine, the compiled library and what would be active.

    Exit code 3 if anything is broken.
    """
    host = Host.discover()
    section, refusal = _section(host, selections, additional_config)
    checks = examine(host, section, engine=not quick)
    if refusal is not None:
        checks.append(refusal)
    broken = any(check.state == BROKEN for check in checks)
    if as_json:
        print_json({"ok": not broken, "checks": [check.as_dict() for check in checks]})
    else:
        print_table(("check", "state", "found", "do"), [(c.name, c.state, c.found, c.do) for c in checks])
    return EnvironmentRefused.exit_code if broken else 0


def _section(
    host: Host, selections: tuple[str, ...], additional_config: str | None
) -> tuple[dict[str, Any] | None, Check | None]:
    if not selections and additional_config is None:
        return None, None
    try:
        carried = EngineArgs.parse(["--additional-config", additional_config] if additional_config else [])
        given = section_from(carried.additional_config) or {}
        return merge(section_of(host, selections), given, "jettison"), None
    except JettisonError as error:
        found = "; ".join(part for part in (error.found, error.allowed) if part)
        return None, Check("would be active", BROKEN, found, error.do)
