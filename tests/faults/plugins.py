"""Small plugins for tests of the host: a rich one, a policy, and one for every way to be broken."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from jettison.hooks.config import PluginOptions, SecretEnv
from jettison.hooks.host import Host, inspect_plugin
from jettison.hooks.specs import hookimpl
from jettison.hooks.types import AttentionLayer, KVFormat, Request


class Rule(BaseModel):
    """A nested option."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5


class Mode(Enum):
    """A choice."""

    FAST = "fast"
    EXACT = "exact"


class RichOptions(PluginOptions):
    """One option of each kind that the nine plugins use."""

    layers: tuple[Annotated[int, Field(ge=0, le=127)], ...] = ()
    rules: tuple[Rule, ...] = ()
    table: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    mode: Mode = Mode.FAST
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    enabled: bool = True
    note: Annotated[str, Field(max_length=200_000)] = ""
    api_key_env: SecretEnv | None = None


class ForcedOptions(PluginOptions):
    """Options of a request policy."""

    token: Annotated[int, Field(ge=0)] = 7


class _Rich:
    @hookimpl
    def kv_cache_format(self, layer: AttentionLayer) -> KVFormat:
        return KVFormat(8, 8 if layer.index else 4)

    @hookimpl
    def report(self) -> dict[str, Any]:
        return {"layers": 1}


class _Forced:
    def __init__(self, token: int) -> None:
        self.token = token

    @hookimpl
    def request_policy(self, request: Request) -> Any:
        return SimpleNamespace(next_tokens=lambda output_token_ids: [self.token])


class RichPlugin:
    """Implements a KV format and a report."""

    @hookimpl
    def options(self) -> type[PluginOptions]:
        return RichOptions

    @hookimpl
    def activate(self, options: RichOptions) -> object:
        return _Rich()


class ForcedPlugin:
    """Implements a request policy."""

    @hookimpl
    def options(self) -> type[PluginOptions]:
        return ForcedOptions

    @hookimpl
    def activate(self, options: ForcedOptions) -> object:
        return _Forced(options.token)


def host(**plugins: Any) -> Host:
    """Return a host of these plugin objects, by name."""
    return Host.of(inspect_plugin(name, plugin, "test", "1") for name, plugin in plugins.items())


def sample_host() -> Host:
    """Return a host of the rich plugin and the policy."""
    return host(rich=RichPlugin(), forced=ForcedPlugin())


def install(folder: Path, distribution: str, *, points: str, version: str = "1.0", **modules: str) -> None:
    """Lay a distribution out as an installer does: metadata, entry points, and modules with the given source."""
    metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text(points)
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source)
