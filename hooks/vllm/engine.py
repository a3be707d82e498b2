"""What is active in one vLLM engine of this process: parsed and checked once, then asked by every part of the room."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import cache

from jettison.hooks.config import section_from
from jettison.hooks.host import Active, Host
from jettison.hooks.status import status
from jettison.hooks.vllm import compat, refusals
from jettison.hooks.vllm.entry import require_registered
from jettison.hooks.vllm.kv_format import KVPlan


@dataclass(eq=False)
class Engine:
    """The active plugins of one engine in this process.

    Attributes:
        active: the plugins and their hooks.
        plan: the KV format of every attention layer, filled when the weights have been loaded; None before, and for
            an engine without a KV-cache plugin.
    """

    active: Active
    plan: KVPlan | None = field(default=None)

    @property
    def packs_kv(self) -> bool:
        """Whether an active plugin may choose KV formats."""
        return bool(self.active.implementers("kv_cache_format"))

    @property
    def has_policies(self) -> bool:
        """Whether an active plugin may decide per request."""
        return bool(self.active.implementers("request_policy"))


_engines: dict[int, Engine] = {}


def engine_for(config: compat.VllmConfig) -> Engine | None:
    """The engine that `config` describes, or None if its options have no `jettison` section.

    The options are parsed and the engine is checked at the first call; a replica of the configuration (vLLM makes
    them for sub-models) is the same engine, because it shares the compilation config.

    Raises:
        JettisonError: the options, the installation or the engine are refused.
    """
    section = section_from(config.additional_config)
    if section is None:
        return None
    key = config.compilation_config
    engine = _engines.get(id(key))
    if engine is None:
        require_registered()
        compat.check()
        engine = Engine(host().activate(section))
        refusals.check_engine(config, engine.active)
        _engines[id(key)] = engine
        weakref.finalize(key, _engines.pop, id(key), None)
        record(config, engine)
    return engine


def record(config: compat.VllmConfig, engine: Engine | None) -> None:
    """Start the status of this process anew for the engine under construction; None for a stock one."""
    status.reset()
    status.engine("vllm", compat.version(), device=config.device_config.device_type)
    if engine is not None:
        status.activated(host(), engine.active)


@cache
def host() -> Host:
    """The plugins installed in this process."""
    return Host.discover()
