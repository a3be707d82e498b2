"""vLLM's CPU backends for multi-head latent attention, unchanged, except that they refuse an active KV-cache plugin."""

from __future__ import annotations

from typing import Any

from jettison.hooks.vllm.compat import AMXMLABackend, CPUMLABackend, get_current_vllm_config
from jettison.hooks.vllm.engine import engine_for


class GuardedCPUMLABackend(CPUMLABackend):
    """Stock, behind the refusals of `engine_for`."""

    @staticmethod
    def get_impl_cls() -> Any:
        """Stock's; raises JettisonError for an engine that is refused."""
        engine_for(get_current_vllm_config())
        return CPUMLABackend.get_impl_cls()


class GuardedAMXMLABackend(AMXMLABackend):
    """Stock, behind the refusals of `engine_for`."""

    @staticmethod
    def get_impl_cls() -> Any:
        """Stock's; raises JettisonError for an engine that is refused."""
        engine_for(get_current_vllm_config())
        return AMXMLABackend.get_impl_cls()
