"""Prefill on CUDA: a variable-length attention kernel on new keys, or on pages read back into bounded memory.

The last few tokens of a long prompt are served by the decode kernel, straight from the pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from jettison.csrc.ops import kv_unpack, packed_attention
from jettison.hooks.errors import EnvironmentRefused
from jettison.hooks.vllm import compat
from jettison.hooks.vllm.cuda_metadata import PrefillRun
from jettison.hooks.vllm.kv_format import LayerFormat

Flash = Callable[..., Any]
"""vLLM's `flash_attn_varlen_func` with everything bound that stays the same for a layer."""

Pages = Callable[..., None]
"""`packed_attention` with everything bound that stays the same for a layer."""

Scratch = Callable[[], tuple[Tensor, Tensor]]
"""Gives room for keys and values: [capacity, KV heads, head size] of the model's type."""


def flash_attention(
    head_size: int, *, scale: float, window: int, softcap: float, sinks: Tensor | None, where: str
) -> Flash:
    """vLLM's own FlashAttention for one layer.

    Args:
        head_size, scale, window, softcap: as in `csrc.ops.packed_attention`.
        sinks: logits per head in the model's type.
        where: the layer, for the message.

    Raises:
        EnvironmentRefused: this vLLM build has no FlashAttention for the layer.
    """
    version = None
    if compat.is_flash_attn_varlen_func_available():
        version = compat.get_flash_attn_version(
            head_size=head_size, has_sinks=sinks is not None, requires_softcap=softcap > 0
        )
    if version is None or (version == 2 and sinks is not None):
        raise EnvironmentRefused(
            f"vLLM's FlashAttention cannot serve attention layer {where} on this device",
            allowed="packed KV caches on CUDA need it for prefill",
            do="use a vLLM build with FlashAttention 3 and a Hopper GPU, or remove the KV-cache plugin",
        )
    return partial(
        compat.resolve(compat.FLASH_ATTENTION),
        softmax_scale=scale,
        causal=True,
        window_size=[window - 1, 0] if window > 0 else [-1, -1],
        softcap=softcap,
        s_aux=sinks,
        fa_version=version,
    )


def pages_attention(
    page: LayerFormat, *, scale: float, window: int, softcap: float, sinks: Tensor | None,
    workspace: Callable[[], Tensor | None],
) -> Pages:  # fmt: skip
    """The decode kernel for one layer and short runs of queries.

    Args:
        page, scale, window, softcap, sinks: as in `csrc.ops.packed_attention`.
        workspace: gives its scratch memory, not that of the decode rows of the same step.
    """

    def attend(
        query: Tensor, cache: Tensor, output: Tensor, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, *,
        max_query_len: int,
    ) -> None:  # fmt: skip
        packed_attention(
            query,
            cache,
            output,
            query_start_loc,
            seq_lens,
            block_table,
            page.layout,
            scale=scale,
            rotate=page.rotate,
            key_scale=page.key_scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            max_query_len=max_query_len,
            workspace=workspace(),
        )

    return attend


@dataclass(frozen=True, eq=False)
class Prefill:
    """The prefill of one attention layer.

    Attributes:
        page: how its keys and values are stored.
        flash: the attention kernel; the causal mask is aligned to the last key.
        pages: the kernel for short runs.
        scratch: memory for what is read back, shared by all layers, because they run one after another.
    """

    page: LayerFormat
    flash: Flash
    pages: Pages
    scratch: Scratch

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, output: Tensor, runs: tuple[PrefillRun, ...]
    ) -> None:
        """Serve the prefill rows of one step; their keys and values have been stored.

        Args:
            query, output: [T or more, heads, head size]; key, value: [T or more, KV heads, head size].
            kv_cache: uint8 [blocks, KV heads, block size, bytes per token].
        """
        for served in runs:
            run = served.run
            if run.begin == run.end:
                continue
            new = slice(run.begin, run.end)
            if run.source == "pages":
                self.pages(
                    query[new], kv_cache, output[new], served.cu_queries, served.seq_lens, served.block_table,
                    max_query_len=run.max_queries,
                )  # fmt: skip
                continue
            keys, values = (key[new], value[new]) if run.source == "new" else self._read_back(kv_cache, served)
            self.flash(
                q=query[new],
                k=keys,
                v=values,
                out=output[new],
                cu_seqlens_q=served.cu_queries,
                max_seqlen_q=run.max_queries,
                cu_seqlens_k=served.cu_keys,
                max_seqlen_k=run.max_keys,
            )

    def _read_back(self, kv_cache: Tensor, served: PrefillRun) -> tuple[Tensor, Tensor]:
        tokens, page = served.run.keys[-1], self.page
        keys, values = (room[:tokens] for room in self.scratch())
        kv_unpack(
            kv_cache,
            served.block_table,
            served.cu_keys,
            keys,
            values,
            page.layout,
            rotate=page.rotate,
            key_center=page.key_center,
            key_scale=page.key_scale,
            starts=served.starts,
        )
        return keys, values
