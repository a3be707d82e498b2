"""vLLM's CPU attention backend, with packed pages for the engines that ask for them and nothing else changed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from jettison.hooks.vllm.compat import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    get_current_vllm_config,
    set_current_vllm_config,
)
from jettison.hooks.vllm.engine import engine_for
from jettison.hooks.vllm.packed import PackedBackendMixin, PackedImplMixin, specialised

if TYPE_CHECKING:
    from jettison.hooks.vllm.compat import Attention
    from jettison.hooks.vllm.kv_format import LayerFormat


class JettisonCPUBackend(PackedBackendMixin, CPUAttentionBackend):
    """Takes the slot CPU_ATTN. Engines without a KV-cache plugin get the stock implementation."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The implementation for the engine under construction.

        Raises:
            JettisonError: its `jettison` options are refused.
        """
        engine = engine_for(get_current_vllm_config())
        return PackedCPUImpl if engine is not None and engine.packs_kv else CPUAttentionBackendImpl


class PackedCPUImpl(PackedImplMixin, CPUAttentionBackendImpl):
    """Attention over packed pages on CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.make_stock = partial(CPUAttentionBackendImpl, *args, **kwargs)
        self.enlist()

    def specialise(self, layer: Attention, page: LayerFormat | None) -> None:
        """See `PackedImplMixin.specialise`."""
        if page is None:
            with set_current_vllm_config(self.config):
                layer.impl = self.make_stock()
            layer.attn_backend = CPUAttentionBackend
            return
        self.page, self.window, self.softcap = page, self.sliding_window, float(self.logits_soft_cap)
        self.head_sinks = None if self.sinks is None else self.sinks.float().contiguous()
        layer.attn_backend = specialised(JettisonCPUBackend, page.layout)
