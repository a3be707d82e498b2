"""The host of Jettison's plugins, and one room per engine.

Importing this package costs nothing: every public name below is loaded on first use, so no engine, no torch,
no pydantic and no scan for plugins happens at import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jettison.hooks.config import PluginOptions
    from jettison.hooks.errors import ConfigError, EnvironmentRefused, InputRefused, JettisonError
    from jettison.hooks.host import Active, Host, PluginInfo
    from jettison.hooks.specs import hookimpl, hookspec
    from jettison.hooks.types import AttentionLayer, KVFormat, Request, RequestPolicy, Serving

    __version__: str

_HOME = {
    "Active": "host",
    "AttentionLayer": "types",
    "ConfigError": "errors",
    "EnvironmentRefused": "errors",
    "Host": "host",
    "InputRefused": "errors",
    "JettisonError": "errors",
    "KVFormat": "types",
    "PluginInfo": "host",
    "PluginOptions": "config",
    "Request": "types",
    "RequestPolicy": "types",
    "Serving": "types",
    "hookimpl": "specs",
    "hookspec": "specs",
}

__all__ = [
    "Active",
    "AttentionLayer",
    "ConfigError",
    "EnvironmentRefused",
    "Host",
    "InputRefused",
    "JettisonError",
    "KVFormat",
    "PluginInfo",
    "PluginOptions",
    "Request",
    "RequestPolicy",
    "Serving",
    "__version__",
    "hookimpl",
    "hookspec",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("jettison")
        except PackageNotFoundError:
            return "0+unknown"
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
