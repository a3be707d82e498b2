"""The attention backend of packed pages on CUDA, in vLLM's slot CUSTOM (`--attention-backend CUSTOM`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from jettison.csrc.layout import MAX_HEAD_SIZE, MIN_HEAD_SIZE, TILE_TOKENS
from jettison.hooks.errors import EnvironmentRefused
from jettison.hooks.vllm.compat import (
    AttentionBackend,
    AttentionImpl,
    AttentionType,
    MultipleOf,
    get_current_vllm_config,
)
from jettison.hooks.vllm.engine import engine_for
from jettison.hooks.vllm.packed import (
    PackedBackendMixin,
    PackedImplMixin,
    PackedMetadata,
    PackedMetadataBuilder,
    specialised,
)

if TYPE_CHECKING:
    from jettison.hooks.vllm.compat import Attention
    from jettison.hooks.vllm.kv_format import LayerFormat


class JettisonCUDABackend(PackedBackendMixin, AttentionBackend):
    """Takes the slot CUSTOM; chosen only by `--attention-backend CUSTOM`, so it has no stock implementation."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        """The name of the slot."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl[PackedMetadata]]:
        """The implementation for the engine under construction.

        Raises:
            JettisonError: its `jettison` options are refused, or choose no KV format.
        """
        engine = engine_for(get_current_vllm_config())
        if engine is None or not engine.packs_kv:
            raise _nothing_to_do()
        return PackedCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[PackedMetadataBuilder]:
        """One builder class for every layout."""
        return PackedMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Pages are rows of tiles of 16 tokens."""
        return [MultipleOf(TILE_TOKENS)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Multiples of 16 from 32 to 256."""
        return head_size % 16 == 0 and MIN_HEAD_SIZE <= head_size <= MAX_HEAD_SIZE

    @classmethod
    def supports_sink(cls) -> bool:
        """Attention sinks (one logit per head) take part in the softmax."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows are masks."""
        return True


class PackedCUDAImpl(PackedImplMixin, AttentionImpl[PackedMetadata]):
    """Attention over packed pages on CUDA."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype, self.alibi_slopes, self.sinks = kv_cache_dtype, alibi_slopes, sinks
        self.window = -1 if sliding_window is None else sliding_window
        self.softcap = float(logits_soft_cap or 0.0)
        self.enlist()

    def specialise(self, layer: Attention, page: LayerFormat | None) -> None:
        """See `PackedImplMixin.specialise`.

        Raises:
            EnvironmentRefused: no plugin gave a format; the slot CUSTOM has no stock implementation to go back to.
        """
        if page is None:
            raise _nothing_to_do()
        self.page = page
        self.head_sinks = None if self.sinks is None else self.sinks.float().contiguous()
        layer.attn_backend = specialised(JettisonCUDABackend, page.layout)


def _nothing_to_do() -> EnvironmentRefused:
    return EnvironmentRefused(
        "--attention-backend CUSTOM selects Jettison's packed KV cache, but no active plugin gives a KV format",
        do="remove --attention-backend CUSTOM or add a KV-cache plugin to the jettison options",
    )
