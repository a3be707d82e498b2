"""Every hook of Jettison, on one screen.

Arguments are read-only. A plugin is the object that an entry point of group `jettison.plugins` names (usually a
module); it implements the first three. The object that its `activate` returns implements any of the others. Plugins are
asked in alphabetical order; "first result" stops at the first answer that is not None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping

    import click

    from jettison.hooks.config import PluginOptions
    from jettison.hooks.types import AttentionLayer, KVFormat, Request, RequestPolicy, Serving

PROJECT = "jettison"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class PluginHooks:
    """Implemented by the plugin itself."""

    @hookspec(firstresult=True)
    def options(self) -> type[PluginOptions]:
        """Host, at discovery: the class of the plugin's section of the configuration. Must import no torch."""

    @hookspec(firstresult=True)
    def activate(self, options: PluginOptions) -> object:
        """Host, once per engine and process: the object that carries the hooks below, for this engine only."""

    @hookspec
    def check_request(self, params: Mapping[str, Any]) -> None:
        """Engine's front end, per request whose extra arguments name the plugin: JettisonError refuses it, HTTP 400."""

    @hookspec
    def commands(self, cli: click.Group) -> None:
        """Command `jettison`, at start: add subcommands to `cli`."""


class EngineHooks:
    """Implemented by what `activate` returned."""

    @hookspec(firstresult=True)
    def kv_cache_format(self, layer: AttentionLayer) -> KVFormat | None:
        """Engine, once per attention layer: its KV format, or None for the engine's own. First result."""

    @hookspec
    def observe_routing(self, layer: Any, logits: Any) -> None:
        """Engine, per expert layer and step: router logits [tokens, experts]; padding is excluded. All are called."""

    @hookspec(firstresult=True)
    def select_experts(self, layer: Any) -> Any:
        """Engine, once per expert layer: the ids of the experts to keep, or None for all. First result."""

    @hookspec
    def serving(self, serving: Serving) -> None:
        """Engine, once, before the first request: its tokenizer and thinking strings. A JettisonError ends start-up."""

    @hookspec(firstresult=True)
    def request_policy(self, request: Request) -> RequestPolicy | None:
        """Engine, once per request: its policy, or None for plain sampling. First result."""

    @hookspec(firstresult=True)
    def linear_kernel(self, layer: Any) -> Any:
        """Engine, once per linear layer: a quantised implementation, or None. First result."""

    @hookspec
    def trainer_callbacks(self, trainer: Any) -> list[Any]:
        """Trainer, at start: callbacks to add. A list per plugin."""

    @hookspec
    def report(self) -> dict[str, Any]:
        """Command line and status RPC: what the plugin measured so far, JSON-ready, without content or secrets."""
