"""The attention backend of packed pages on CUDA, in vLLM's slot CUSTOM (`--attention-backend CUSTOM`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from jettison.csrc.cuda.variants import HEAD_SIZES, MAX_DECODE_QUERIES
from jettison.csrc.layout import TILE_TOKENS
from jettison.csrc.ops import attention_plan, attention_workspace, packed_attention
from jettison.hooks.errors import EnvironmentRefused
from jettison.hooks.vllm.compat import (
    AttentionBackend,
    AttentionImpl,
    AttentionType,
    MultipleOf,
    current_workspace_manager,
    get_current_vllm_config,
    max_decode_query_len,
)
from jettison.hooks.vllm.cuda_metadata import ServedMetadata, ServedMetadataBuilder, scratch_tokens
from jettison.hooks.vllm.cuda_prefill import Prefill, flash_attention, pages_attention
from jettison.hooks.vllm.engine import engine_for
from jettison.hooks.vllm.packed import PackedBackendMixin, PackedImplMixin, PackedMetadata, specialised

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
    def get_impl_cls() -> type[AttentionImpl[ServedMetadata]]:
        """The implementation for the engine under construction.

        Raises:
            JettisonError: its `jettison` options are refused, or choose no KV format.
        """
        engine = engine_for(get_current_vllm_config())
        if engine is None or not engine.packs_kv:
            raise _nothing_to_do()
        return PackedCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[ServedMetadataBuilder]:
        """One builder class for every layout."""
        return ServedMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Pages are rows of tiles of 16 tokens."""
        return [MultipleOf(TILE_TOKENS)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """What the kernels are written for."""
        return head_size in HEAD_SIZES

    @classmethod
    def supports_sink(cls) -> bool:
        """Attention sinks (one logit per head) take part in the softmax."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows are masks."""
        return True


class PackedCUDAImpl(PackedImplMixin, AttentionImpl[ServedMetadata]):
    """Attention over packed pages on CUDA: decode straight from the pages, prefill through FlashAttention."""

    supports_quant_query_input = False

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
        self.prefill: Prefill | None = None
        # About so many query columns can be served from the pages in the time of reading them back once.
        self.short_queries = min(MAX_DECODE_QUERIES, 256 // (self.num_heads // self.num_kv_heads))
        self.enlist()

    def specialise(self, layer: Attention, page: LayerFormat | None) -> None:
        """See `PackedImplMixin.specialise`. Compiles the kernels of this kind of layer.

        Raises:
            EnvironmentRefused: no plugin gave a format; the slot CUSTOM has no stock implementation to go back to.
        """
        if page is None:
            raise _nothing_to_do()
        self.page = page
        self.head_sinks = None if self.sinks is None else self.sinks.float().contiguous()
        layer.attn_backend = specialised(JettisonCUDABackend, page.layout, ServedMetadataBuilder)
        self.dtype: torch.dtype = self.config.model_config.dtype
        self.max_query_len = max_decode_query_len(self.config)
        if self.dtype == torch.float32:
            return
        self.prefill = Prefill(
            page,
            flash_attention(
                self.head_size,
                scale=self.scale,
                window=self.window,
                softcap=self.softcap,
                sinks=self.sinks,
                where=layer.layer_name,
            ),
            pages_attention(
                page,
                scale=self.scale,
                window=self.window,
                softcap=self.softcap,
                sinks=self.head_sinks,
                workspace=lambda: self.workspace(self.short_queries),
            ),
            self.scratch,
        )
        self._compile(page)

    def _compile(self, page: LayerFormat) -> None:
        from jettison.csrc.cuda import launch

        group = self.num_heads // self.num_kv_heads
        launch.prepare(
            page.layout,
            rotate=page.rotate,
            softcap=self.softcap > 0,
            dtype=self.dtype,
            columns=tuple(group * queries for queries in range(1, max(self.max_query_len, self.short_queries) + 1)),
            device=torch.cuda.current_device(),
        )

    def reserve(self) -> None:
        """Take this layer's part of vLLM's workspace, once; on vLLM's profile run, so that it is accounted for."""
        if self.prefill is not None:
            self.scratch()
            self.workspace(self.max_query_len)
            self.workspace(self.short_queries)

    def scratch(self) -> tuple[Tensor, Tensor]:
        """Room to read pages back, of all layers in turn: see `cuda_prefill.Scratch`."""
        shape = (scratch_tokens(self.config), self.num_kv_heads, self.head_size)
        keys, values = current_workspace_manager().get_simultaneous((shape, self.dtype), (shape, self.dtype))
        return keys, values

    def workspace(self, max_query_len: int) -> Tensor:
        """Scratch memory of the decode kernel, one for all layers of a kind; captured graphs keep its address."""
        shape = (self.num_heads, self.num_kv_heads, self.head_size, max_query_len)
        found: Tensor = current_workspace_manager().get_persistent_resource(
            ("jettison", self.page.layout, self.window, *shape),
            lambda: attention_workspace(*shape, torch.device("cuda", torch.cuda.current_device())),
        )
        return found

    def cut(self, batch: ServedMetadata) -> None:
        """Share out the decode work of a step among the GPU's processors, for all layers of this kind."""
        if self.prefill is None or not batch.decodes:
            return
        attention_plan(
            batch.query_start_loc[: batch.decodes + 1],
            batch.seq_lens[: batch.decodes],
            self.page.layout,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            max_query_len=batch.max_query_len,
            window=self.window,
            workspace=self.workspace(self.max_query_len),
        )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PackedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """See `PackedImplMixin.forward`; key and value: [T or more, KV heads, head size], this step's own."""
        if attn_metadata is None:
            self.reserve()
            return output.zero_()
        if self.prefill is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output)
        assert isinstance(attn_metadata, ServedMetadata)
        if attn_metadata.decodes:
            self._decode(query, kv_cache, output, attn_metadata)
        self.prefill(query, key, value, kv_cache, output, attn_metadata.prefill)
        return output

    def _decode(self, query: Tensor, kv_cache: Tensor, output: Tensor, batch: ServedMetadata) -> None:
        page, rows, tokens = self.page, batch.decodes, batch.decode_tokens
        packed_attention(
            query[:tokens],
            kv_cache,
            output[:tokens],
            batch.query_start_loc[: rows + 1],
            batch.seq_lens[:rows],
            batch.block_table[:rows],
            page.layout,
            scale=self.scale,
            rotate=page.rotate,
            key_scale=page.key_scale,
            window=self.window,
            softcap=self.softcap,
            sinks=self.head_sinks,
            max_query_len=batch.max_query_len,
            workspace=self.workspace(self.max_query_len),
            planned=True,
        )


def _nothing_to_do() -> EnvironmentRefused:
    return EnvironmentRefused(
        "--attention-backend CUSTOM selects Jettison's packed KV cache, but no active plugin gives a KV format",
        do="remove --attention-backend CUSTOM or add a KV-cache plugin to the jettison options",
    )
