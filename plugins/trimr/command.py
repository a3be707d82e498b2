"""`jettison trimr`: the proxy, and the replay of what was logged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jettison.hooks.config import parse_section
from jettison.hooks.errors import ConfigError
from jettison.plugins.trimr.command_replay import replay
from jettison.plugins.trimr.config import TrimROptions

if TYPE_CHECKING:
    from jettison.plugins.trimr.proxy import Proxy

_PATH = click.Path(dir_okay=False, path_type=Path)


@click.group()
def trimr() -> None:
    """Thinking that stops when the answer has settled: a proxy before any server, and what its log says."""


trimr.add_command(replay)


@trimr.command()
@click.option("--upstream", required=True, metavar="URL", help="The OpenAI-compatible server behind.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8100, show_default=True)
@click.option("--options", "file", metavar="FILE", help="YAML or JSON file with the section trimr.")
@click.option("--verifier", metavar="URL|self", help="Who judges unclear answers; overrides the file.")
@click.option("--verifier-model", metavar="NAME", help="The verifier's model; its first where none is given.")
@click.option("--shadow", is_flag=True, help="Decide and log, but change nothing.")
@click.option("--off", is_flag=True, help="Pass everything on as it is.")
@click.option("--log", "log", type=_PATH, help="Append every decision to this file, as JSON lines.")
@click.option("--log-text", is_flag=True, help="Keep the users' text in the log: replay needs it.")
@click.option("--think-start", default="<think>", show_default=True, help="The string that begins thinking.")
@click.option("--think-end", default="</think>", show_default=True, help="The string that ends it.")
@click.option(
    "--chat-continuation",
    is_flag=True,
    help="Trim chats of servers without token ids; the template must keep thinking.",
)
def proxy(upstream: str, host: str, port: int, log: Path | None, off: bool, **given: Any) -> None:
    """Serve before UPSTREAM and end thinking that has settled.

    Clients use this address in place of the upstream's. Counters are at /jettison/metrics.
    """
    from jettison.plugins.trimr.proxy import Proxy
    from jettison.plugins.trimr.shadow import TraceLog
    from jettison.plugins.trimr.types import ThinkingStrings

    if not upstream.startswith(("http://", "https://")):
        raise ConfigError(f"--upstream {upstream!r} is not a URL", do="write for example http://127.0.0.1:8000")
    if not given["think_start"] or not given["think_end"]:
        raise ConfigError("the strings around thinking must not be empty", do="leave the flag out for the default")
    options = _options(given)
    trace = TraceLog(log) if log is not None else None
    server = Proxy(
        options,
        upstream,
        enabled=not off,
        thinking=ThinkingStrings(given["think_start"], given["think_end"]),
        chat_continuation=given["chat_continuation"],
        log=trace.write if trace is not None else None,
    )
    click.echo(f"jettison: proxy on http://{host}:{port} before {upstream}", err=True)
    try:
        _run(server, host, port)
    finally:
        if trace is not None:
            trace.close()


def _options(given: dict[str, Any]) -> TrimROptions:
    """The section of the file with the flags in their place."""
    section: dict[str, Any] = TrimROptions.from_flag(given["file"]) if given["file"] else {}
    judge: dict[str, Any] = dict(section.get("verifier") or {})
    if given["verifier"] == "self":
        judge |= {"mode": "self", "url": None}
    elif given["verifier"]:
        judge |= {"mode": "endpoint", "url": given["verifier"]}
    if given["verifier_model"]:
        judge["model"] = given["verifier_model"]
    section = {**section, "verifier": judge} if judge else dict(section)
    for name in ("shadow", "log_text"):
        if given[name]:
            section[name] = True
    return parse_section(TrimROptions, "trimr", section)


def _run(server: Proxy, host: str, port: int) -> None:
    from jettison.hooks.errors import EnvironmentRefused
    from jettison.plugins.trimr.endpoint import require_aiohttp

    require_aiohttp()
    from aiohttp import web

    try:
        import uvloop
    except ImportError:
        loop = None
    else:
        loop = uvloop.new_event_loop()
    serving: dict[str, Any] = {"handler_cancellation": True, "access_log": None, "print": None, "loop": loop}
    try:
        web.run_app(server.app(), host=host, port=port, **serving)
    except OSError as error:
        raise EnvironmentRefused(
            f"cannot listen on {host}:{port} ({error.strerror})", do="choose another --port"
        ) from error
