"""Attention over packed pages, independent of the device: metadata, its builder, the two calls, the backend mixin."""

from __future__ import annotations

import gc
from abc import ABCMeta
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from jettison.csrc.layout import TILE_TOKENS, PageLayout
from jettison.csrc.ops import kv_store, packed_attention
from jettison.hooks.errors import EnvironmentRefused
from jettison.hooks.status import status
from jettison.hooks.vllm import kv_format
from jettison.hooks.vllm.compat import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    AttentionSpec,
    CommonAttentionMetadata,
    KVCacheLayout,
    MultipleOf,
    VllmConfig,
    get_current_vllm_config,
)
from jettison.hooks.vllm.engine import Engine, engine_for

if TYPE_CHECKING:
    from jettison.hooks.vllm.compat import Attention


NOMINAL_BLOCK = 128


@dataclass(frozen=True, eq=False)
class PackedMetadata:
    """One step's batch, as the kernel takes it: S sequences, T tokens.

    Attributes:
        num_tokens: T, without the padding of query and output.
        query_start_loc: int32 [S+1]; seq_lens: int32 [S]; block_table: int32 [S, pages].
    """

    num_tokens: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor


class PackedMetadataBuilder(AttentionMetadataBuilder[PackedMetadata]):
    """Hands the step's tensors through: no scheduling, no copy, so one builder per layout costs nothing.

    Raises:
        EnvironmentRefused: vLLM's planner changed the block size, and the pages that it allocated no longer fit.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        for name in layer_names:
            layout: PageLayout = layers[name].impl.page.layout
            needed = layout.bytes_per_token(kv_cache_spec.block_size)
            if kv_cache_spec.state_content_bytes != needed:
                raise EnvironmentRefused(
                    f"vLLM planned {kv_cache_spec.state_content_bytes} bytes per token of layer {name} with blocks of"
                    f" {kv_cache_spec.block_size} tokens",
                    allowed=f"its format needs {needed}",
                    do="set VLLM_KV_CACHE_LAYOUT=BLHNC or use a table without sink tokens",
                )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PackedMetadata:
        """Return the metadata of one step; called once per attention group."""
        common = common_attn_metadata
        return PackedMetadata(
            common.num_actual_tokens, common.query_start_loc, common.seq_lens, common.block_table_tensor
        )


class PackedImplMixin:
    """The calls of one attention layer. Put before vLLM's implementation class in the bases."""

    page: kv_format.LayerFormat
    """Set once by `specialise`, before the first call."""

    scale: float
    window: int
    softcap: float
    head_sinks: Tensor | None

    def enlist(self) -> None:
        """Remember the engine under construction; until `specialise`, allocation is refused."""
        self.config = get_current_vllm_config()
        kv_format.pending.add(self)

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
        """Attend to the packed pages; `do_kv_cache_update` has stored this step's keys and values.

        Args:
            layer: vLLM's layer, unused.
            query, output: [T or more, heads, head size]; key, value: unused.
            kv_cache: uint8 [blocks, KV heads, block size, bytes per token].
            attn_metadata: None on vLLM's profile runs, which have no cache.
            output_scale, output_block_scale: None; vLLM passes them only to implementations that announce it.
        """
        if attn_metadata is None:
            return output.zero_()
        page, tokens = self.page, attn_metadata.num_tokens
        packed_attention(
            query[:tokens],
            kv_cache,
            output[:tokens],
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            page.layout,
            scale=self.scale,
            rotate=page.rotate,
            key_scale=page.key_scale,
            window=self.window,
            softcap=self.softcap,
            sinks=self.head_sinks,
        )
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Quantise this step's keys and values [T or more, KV heads, head size] into their pages."""
        if kv_cache.numel() == 0:
            return
        page = self.page
        kv_store(
            key,
            value,
            kv_cache,
            slot_mapping,
            page.layout,
            rotate=page.rotate,
            key_center=page.key_center,
            key_scale=page.key_scale,
        )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """vLLM's hook per layer once all weights are there: find the layer's format and specialise."""
        engine = engine_for(self.config)
        assert engine is not None
        if engine.plan is None:
            engine.plan = _plan(self.config, engine)
        for name, layer in kv_format.attention_layers(self.config).items():
            if layer.impl is self:
                if engine.plan and name not in engine.plan:
                    engine.plan = kv_format.add_draft_layer(self.config, engine.plan, name)
                    _report(self.config, engine.plan)
                self.specialise(layer, engine.plan.get(name))
                kv_format.pending.discard(self)

    def specialise(self, layer: Attention, page: kv_format.LayerFormat | None) -> None:
        """Adopt `page` and give the layer its backend, or hand the layer back to the stock implementation."""
        raise NotImplementedError


def _plan(config: VllmConfig, engine: Engine) -> kv_format.KVPlan:
    try:
        plan = kv_format.make_plan(config, engine.active)
    except BaseException:
        kv_format.pending.clear()
        raise
    _report(config, plan)
    return plan


def _report(config: VllmConfig, plan: kv_format.KVPlan) -> None:
    block_size = config.cache_config.block_size
    status.layers([page.describe(name, block_size) for name, page in plan.items()])


class PackedBackendMixin:
    """The backend of the layers of one page layout; without a layout, of layers that are not specialised."""

    layout: ClassVar[PageLayout | None] = None

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The layer's cache as bytes of packed pages.

        Raises:
            EnvironmentRefused: Jettison is active, but the model loader did not finish the attention layers.
        """
        if cls.layout is None:
            _refuse_pending()
            return spec
        # NOTES: vLLM asks once with blocks of one token, to learn the bytes per token before it chooses a block size.
        block_size = NOMINAL_BLOCK if spec.block_size == 1 else spec.block_size
        return replace(spec, dtype=torch.uint8, state_content_bytes=cls.layout.bytes_per_token(block_size))


def _refuse_pending() -> None:
    if kv_format.pending:
        gc.collect()  # NOTES: an engine that failed to start leaves its layers behind until they are collected.
    if kv_format.pending:
        raise EnvironmentRefused(
            f"{len(kv_format.pending)} attention layers do not know their KV format when vLLM allocates the cache",
            allowed="Jettison needs a model loader that calls process_weights_after_loading",
            do="use --load-format auto",
        )


@cache
def specialised(
    base: type[AttentionBackend], layout: PageLayout, builder: type[PackedMetadataBuilder] = PackedMetadataBuilder
) -> type[AttentionBackend]:
    """The subclass of `base` for one page layout; its name is unique, because vLLM groups layers by name."""
    name = f"{base.__name__}_K{layout.key_bits}V{layout.value_bits}_D{layout.head_size}_S{layout.sink_tokens}"
    members = {
        "layout": layout,
        "__module__": base.__module__,
        "__qualname__": name,
        "get_builder_cls": staticmethod(lambda: builder),
        "get_supported_kernel_block_sizes": staticmethod(lambda kv_cache_spec=None: [MultipleOf(TILE_TOKENS)]),
        "supported_kv_cache_layouts": classmethod(lambda cls: (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)),
    }
    return ABCMeta(name, (base,), members)
