"""Ops on packed KV-cache pages: Python signatures, argument checks, fake implementations, CUDA registration.

The compiled library registers the schemas and the CPU kernels under ``torch.ops.jettison``.
"""

import torch
from torch import Tensor

from . import load, reference
from .layout import PageLayout

load()


def kv_store(
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    layout: PageLayout,
    *,
    rotate: bool = False,
    key_center: Tensor | None = None,
    key_scale: Tensor | None = None,
) -> None:
    """Quantise new keys and values and write them into their pages, in place.

    Keys are centred, divided by ``key_scale`` and rotated, values are rotated, before they are quantised per token
    and head; a 16-bit side is written as it is.

    Args:
        key, value: ``[T, H, D]`` float32, bfloat16 or float16, last dimension contiguous.
        cache: ``uint8 [B, H, N, C]``, ``C = layout.bytes_per_token(N)``; a page's ``N*C`` bytes are contiguous.
        slot_mapping: ``int64 [n]``, ``n <= T``: ``block * N + offset`` of each token; -1 is skipped.
        key_center, key_scale: ``float32 [H, D]``, contiguous.

    Raises:
        RuntimeError: naming the argument that does not fit.
    """
    torch.ops.jettison.kv_store(
        key, value, cache, slot_mapping, layout.key_bits, layout.value_bits, layout.sink_tokens, rotate,
        key_center, key_scale,
    )  # fmt: skip


def packed_attention(
    query: Tensor,
    cache: Tensor,
    output: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    layout: PageLayout,
    *,
    scale: float,
    rotate: bool = False,
    key_scale: Tensor | None = None,
    window: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """Causal attention over packed pages, decode and prefill alike, written into ``output``.

    The last ``query_start_loc[i+1] - query_start_loc[i]`` tokens of sequence ``i`` are its queries; their keys and
    values must have been stored. Only packed pages are read, so a token's result depends on its prefix alone, not on
    how the prompt was cut into chunks.

    Args:
        query, output: ``[T, Hq, D]`` float32, bfloat16 or float16, last dimension contiguous; ``Hq`` a multiple of H.
        cache: as in :func:`kv_store`.
        query_start_loc: ``int32 [S+1]``; seq_lens: ``int32 [S]``; block_table: ``int32 [S, max pages]``.
        scale: factor of the scores, usually ``D ** -0.5``.
        key_scale: as in :func:`kv_store`.
        window: visible tokens including the query's own; -1 for all.
        softcap: ``softcap * tanh(score / softcap)`` if positive.
        sinks: ``float32 [Hq]``, logits that take part in the softmax and attend to nothing.

    Raises:
        RuntimeError: naming the argument that does not fit.
    """
    torch.ops.jettison.packed_attention(
        query, cache, output, query_start_loc, seq_lens, block_table, scale, layout.key_bits, layout.value_bits,
        layout.sink_tokens, rotate, key_scale, window, softcap, sinks,
    )  # fmt: skip


@torch.library.register_fake("jettison::kv_store")
def _kv_store_fake(
    key, value, cache, slot_mapping, key_bits, value_bits, sink_tokens, rotate, key_center, key_scale
) -> None:
    return None


@torch.library.register_fake("jettison::packed_attention")
def _packed_attention_fake(
    query, cache, output, query_start_loc, seq_lens, block_table, scale, key_bits, value_bits, sink_tokens, rotate,
    key_scale, window, softcap, sinks,
) -> None:  # fmt: skip
    return None


@torch.library.register_kernel("jettison::kv_store", "cuda")
def _kv_store_cuda(
    key, value, cache, slot_mapping, key_bits, value_bits, sink_tokens, rotate, key_center, key_scale
) -> None:
    layout = PageLayout(key.shape[-1], key_bits, value_bits, sink_tokens)
    reference.kv_store(
        key, value, cache, slot_mapping, layout, rotate=rotate, key_center=key_center, key_scale=key_scale
    )


@torch.library.register_kernel("jettison::packed_attention", "cuda")
def _packed_attention_cuda(
    query, cache, output, query_start_loc, seq_lens, block_table, scale, key_bits, value_bits, sink_tokens, rotate,
    key_scale, window, softcap, sinks,
) -> None:  # fmt: skip
    layout = PageLayout(query.shape[-1], key_bits, value_bits, sink_tokens)
    reference.packed_attention(
        query, cache, output, query_start_loc, seq_lens, block_table, layout, scale=scale, rotate=rotate,
        key_scale=key_scale, window=window, softcap=softcap, sinks=sinks,
    )  # fmt: skip
