"""The entry point of group `vllm.general_plugins`: vLLM calls `register` in every process it starts.

It only tells vLLM where our attention backends are. Nothing of ours is active before an engine's configuration has a
`jettison` section, and no plugin is loaded before that.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from importlib.metadata import entry_points

from jettison.hooks.errors import EnvironmentRefused
from jettison.hooks.vllm import compat

GROUP, NAME = "vllm.general_plugins", "jettison"
CPU_BACKEND = "jettison.hooks.vllm.cpu_backend.JettisonCPUBackend"
CPU_MLA_GUARD = "jettison.hooks.vllm.mla_guard.GuardedCPUMLABackend"
AMX_MLA_GUARD = "jettison.hooks.vllm.mla_guard.GuardedAMXMLABackend"
CUDA_BACKEND = "jettison.hooks.vllm.cuda_backend.JettisonCUDABackend"
CPU_SLOTS = {"CPU_ATTN": CPU_BACKEND, "CPU_MLA": CPU_MLA_GUARD, "AMX_MLA": AMX_MLA_GUARD}
CUDA_SLOTS = {"CUSTOM": CUDA_BACKEND}
logger = logging.getLogger("jettison")


@dataclass
class _Registration:
    ran: bool = False
    refusal: EnvironmentRefused | None = None


_registration = _Registration()


def register() -> None:
    """Register the backends of this platform; idempotent, starts no device, loads no plugin.

    On a vLLM or a platform that we do not support nothing is registered: vLLM stays stock, and an engine that asks for
    Jettison is refused by `require_registered`.
    """
    _registration.ran = True
    try:
        compat.check_version()
        for slot, path in slots().items():
            _claim(slot, path)
        _registration.refusal = None
    except EnvironmentRefused as refusal:
        if _registration.refusal is None:
            logger.warning("Jettison cannot be used in this process: %s", refusal)
        _registration.refusal = refusal


def slots() -> dict[str, str]:
    """vLLM's backend slots that are ours on this platform, each with the path of our class.

    Raises:
        EnvironmentRefused: on a platform other than CPU and CUDA.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return CPU_SLOTS
    if current_platform.is_cuda():
        return CUDA_SLOTS
    raise EnvironmentRefused(
        f"vLLM runs on the platform {current_platform.device_name!r}",
        allowed="Jettison supports CPU and CUDA",
        do="remove the Jettison options on this machine",
    )


def require_registered() -> None:
    """Refuse to go on unless `register` ran in this process and its backends are still in place.

    Raises:
        EnvironmentRefused: naming the cause.
    """
    if not _registration.ran:
        raise _not_run()
    if _registration.refusal is not None:
        raise _registration.refusal
    for slot, path in slots().items():
        _refuse_foreign(slot, path)


def _claim(slot: str, path: str) -> None:
    member = compat.AttentionBackendEnum[slot]
    if not member.is_overridden():
        compat.register_backend(member, path)
    _refuse_foreign(slot, path)


def _refuse_foreign(slot: str, path: str) -> None:
    found = compat.AttentionBackendEnum[slot].get_path()
    if found != path:
        raise EnvironmentRefused(
            f"vLLM's attention backend {slot} is taken by {found}",
            allowed=f"Jettison needs {path} there",
            do="uninstall the other plugin or leave it out through VLLM_PLUGINS",
        )


def _not_run() -> EnvironmentRefused:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in (name.strip() for name in allowed.split(",")):
        return EnvironmentRefused(
            f"VLLM_PLUGINS={allowed} keeps vLLM from loading the plugin {NAME!r}",
            do=f"add {NAME} to VLLM_PLUGINS or unset it",
        )
    if not any(point.name == NAME for point in entry_points(group=GROUP)):
        return EnvironmentRefused(
            f"no installed distribution has the entry point {NAME!r} of group {GROUP}", do="reinstall jettison"
        )
    return EnvironmentRefused(
        f"vLLM did not run the entry point {NAME!r} of group {GROUP} in this process (it logs an import error as"
        " 'Failed to load plugin' and goes on)",
        do="run `jettison doctor` to see the error, then reinstall jettison",
    )
