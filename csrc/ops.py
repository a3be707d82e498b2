"""Ops on packed KV-cache pages: Python signatures, argument checks, fake implementations, CUDA registration.

The compiled library registers the schemas and the CPU kernels under ``torch.ops.jettison``; CUDA kernels are compiled
when they are first needed (:mod:`jettison.csrc.cuda`).
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
    max_query_len: int = 0,
    workspace: Tensor | None = None,
    planned: bool = False,
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
        max_query_len: on CUDA, the most queries of any sequence. From 1 to 64 one kernel serves the batch without
            synchronisation, so that it can be captured in a CUDA graph; 0 (unknown) and larger take a path that
            synchronises. The CPU kernel does not need it.
        workspace: on CUDA, of :func:`attention_workspace`; made for the call if None. Launches that may overlap must
            not share one.
        planned: `workspace` holds what :func:`attention_plan` made for these lengths.

    Raises:
        RuntimeError: naming the argument that does not fit.
    """
    torch.ops.jettison.packed_attention(
        query, cache, output, query_start_loc, seq_lens, block_table, scale, layout.key_bits, layout.value_bits,
        layout.sink_tokens, rotate, key_scale, window, softcap, sinks, max_query_len, workspace, planned,
    )  # fmt: skip


def kv_unpack(
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    key_out: Tensor,
    value_out: Tensor,
    layout: PageLayout,
    *,
    rotate: bool = False,
    key_center: Tensor | None = None,
    key_scale: Tensor | None = None,
    starts: Tensor | None = None,
) -> None:
    """Read stored keys and values back in the model's own coordinates: un-rotated, un-scaled, the centre added.

    Args:
        cache: as in :func:`kv_store`.
        block_table: ``int32 [S, max pages]``.
        cu_seqlens: ``int32 [S+1]``: sequence ``i`` goes to rows ``cu_seqlens[i]`` to ``cu_seqlens[i+1]``.
        key_out, value_out: ``[T, H, D]`` of one type, contiguous; ``T = cu_seqlens[S]``.
        key_center, key_scale: as in :func:`kv_store`.
        starts: ``int32 [S]``, first token of each sequence to read; 0 if None.

    Raises:
        RuntimeError: naming the argument that does not fit.
    """
    torch.ops.jettison.kv_unpack(
        cache, block_table, cu_seqlens, key_out, value_out, layout.key_bits, layout.value_bits, layout.sink_tokens,
        rotate, key_center, key_scale, starts,
    )  # fmt: skip


def attention_workspace(
    num_heads: int, num_kv_heads: int, head_size: int, max_query_len: int, device: torch.device
) -> Tensor:
    """Scratch memory of :func:`packed_attention` on CUDA, zeroed; a CUDA graph needs one that outlives it."""
    from .cuda import launch

    index = torch.cuda.current_device() if device.index is None else device.index
    return launch.attention_workspace(num_heads, num_kv_heads, head_size, max_query_len, index)


def attention_plan(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    layout: PageLayout,
    *,
    num_heads: int,
    num_kv_heads: int,
    max_query_len: int,
    window: int = -1,
    workspace: Tensor,
) -> None:
    """Cut a step's work into equal shares on CUDA, once for all layers of one layout, head count and window.

    The shares are computed on the device from the lengths, into ``workspace``: a CUDA graph of
    :func:`packed_attention` with ``planned=True`` stays valid while they change, if this runs before each replay.
    """
    from .cuda import launch

    launch.plan(
        query_start_loc, seq_lens, layout, num_heads=num_heads, num_kv_heads=num_kv_heads,
        max_query_len=max_query_len, window=window, workspace=workspace,
    )  # fmt: skip


@torch.library.register_fake("jettison::kv_store")
def _kv_store_fake(
    key, value, cache, slot_mapping, key_bits, value_bits, sink_tokens, rotate, key_center, key_scale
) -> None:
    return None


@torch.library.register_fake("jettison::packed_attention")
def _packed_attention_fake(
    query, cache, output, query_start_loc, seq_lens, block_table, scale, key_bits, value_bits, sink_tokens, rotate,
    key_scale, window, softcap, sinks, max_query_len=0, workspace=None, planned=False,
) -> None:  # fmt: skip
    return None


@torch.library.register_fake("jettison::kv_unpack")
def _kv_unpack_fake(
    cache, block_table, cu_seqlens, key_out, value_out, key_bits, value_bits, sink_tokens, rotate, key_center,
    key_scale, starts,
) -> None:  # fmt: skip
    return None


@torch.library.register_kernel("jettison::kv_unpack", "cpu")
def _kv_unpack_cpu(
    cache, block_table, cu_seqlens, key_out, value_out, key_bits, value_bits, sink_tokens, rotate, key_center,
    key_scale, starts,
) -> None:  # fmt: skip
    layout = PageLayout(key_out.shape[-1], key_bits, value_bits, sink_tokens)
    reference.kv_unpack(
        cache, block_table, cu_seqlens, key_out, value_out, layout, rotate=rotate, key_center=key_center,
        key_scale=key_scale, starts=starts,
    )  # fmt: skip


@torch.library.register_kernel("jettison::kv_unpack", "cuda")
def _kv_unpack_cuda(
    cache, block_table, cu_seqlens, key_out, value_out, key_bits, value_bits, sink_tokens, rotate, key_center,
    key_scale, starts,
) -> None:  # fmt: skip
    from .cuda import launch

    layout = PageLayout(key_out.shape[-1], key_bits, value_bits, sink_tokens)
    launch.kv_unpack(
        cache, block_table, cu_seqlens, key_out, value_out, layout, rotate=rotate, key_center=key_center,
        key_scale=key_scale, starts=starts,
    )  # fmt: skip


@torch.library.register_kernel("jettison::kv_store", "cuda")
def _kv_store_cuda(
    key, value, cache, slot_mapping, key_bits, value_bits, sink_tokens, rotate, key_center, key_scale
) -> None:
    from .cuda import launch

    layout = PageLayout(key.shape[-1], key_bits, value_bits, sink_tokens)
    launch.kv_store(key, value, cache, slot_mapping, layout, rotate=rotate, key_center=key_center, key_scale=key_scale)


@torch.library.register_kernel("jettison::packed_attention", "cuda")
def _packed_attention_cuda(
    query, cache, output, query_start_loc, seq_lens, block_table, scale, key_bits, value_bits, sink_tokens, rotate,
    key_scale, window, softcap, sinks, max_query_len=0, workspace=None, planned=False,
) -> None:  # fmt: skip
    from .cuda import launch, variants

    layout = PageLayout(query.shape[-1], key_bits, value_bits, sink_tokens)
    options = {"scale": scale, "rotate": rotate, "key_scale": key_scale, "window": window, "softcap": softcap}
    if 0 < max_query_len <= variants.MAX_DECODE_QUERIES and query.dtype != torch.float32:
        launch.decode(
            query, cache, output, query_start_loc, seq_lens, block_table, layout, sinks=sinks,
            max_query_len=max_query_len, workspace=workspace, planned=planned, **options,
        )  # fmt: skip
    else:
        reference.packed_attention(
            query, cache, output, query_start_loc, seq_lens, block_table, layout, sinks=sinks, **options
        )
