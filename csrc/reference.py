"""The oracle: every op of this package in plain torch, written for clarity, bit-exact where the kernels must be.

Same names and arguments as :mod:`jettison.csrc.ops`. Runs on any device; nothing here is fast.
"""

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .codec import encode_keys, hadamard, pack_codes, quantise, range_share, unpack_codes
from .layout import TILE_TOKENS, PageLayout


def _bits16(x: Tensor) -> Tensor:
    """Raw 16-bit storage: fp16 stays fp16, everything else becomes bf16. Returns int16."""
    return x.to(torch.float16 if x.dtype == torch.float16 else torch.bfloat16).view(torch.int16)


@lru_cache
def _offsets(layout: PageLayout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Byte offsets in a tile: key rows ``[16, row bytes]``, value granules ``[16, words, 2]``, meta ``[16, bytes]``."""
    tokens = range(TILE_TOKENS)
    keys = [[layout.key_offset(r, b) for b in range(layout.key_row_bytes)] for r in tokens]
    words = layout.head_size * layout.value_bits // 16
    values = [[[layout.value_offset(r, w) + i for i in range(2)] for w in range(words)] for r in tokens]
    meta = [[layout.meta_offset(r) + i for i in range(layout.meta_bytes_per_token)] for r in tokens]
    return tuple(torch.tensor(x, dtype=torch.int64, device=device) for x in (keys, values, meta))


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _pages(cache: Tensor) -> Tensor:
    """``[B, H, N, C]`` cache -> ``[B, H, N*C]`` view of whole pages."""
    blocks, heads, tokens, content = cache.shape
    return cache.as_strided((blocks, heads, tokens * content), (cache.stride(0), cache.stride(1), 1))


def _encode_side(x: Tensor, bits: int, rotate: bool) -> tuple[Tensor, Tensor]:
    """One side of a token: packed bytes ``[T, H, D*bits/8]`` and its scale and zero as bytes ``[T, H, 0 or 4]``."""
    if bits == 16:
        return _as_bytes(_bits16(x)), x.new_empty((*x.shape[:-1], 0), dtype=torch.uint8)
    codes, scale, zero = quantise(x, bits, range_share(bits, rotate=rotate))
    return pack_codes(codes, bits), _as_bytes(torch.stack((scale, zero), -1))


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
    """See :func:`jettison.csrc.ops.kv_store`."""
    slots = slot_mapping.long()
    kept = slots >= 0
    slots = slots[kept]
    key, value = key[: kept.numel()][kept], value[: kept.numel()][kept]
    if not slots.numel():
        return
    block_size = cache.shape[2]
    pages = _pages(cache)
    block, offset = slots // block_size, slots % block_size
    tile, row = offset // TILE_TOKENS, offset % TILE_TOKENS

    coded_key = encode_keys(key, rotate=rotate, center=key_center, scale=key_scale)
    coded_value = hadamard(value) if rotate else value
    key_bytes, key_meta = _encode_side(key if layout.key_bits == 16 else coded_key, layout.key_bits, rotate)
    value_bytes, value_meta = _encode_side(value if layout.value_bits == 16 else coded_value, layout.value_bits, rotate)

    key_at, value_at, meta_at = _offsets(layout, cache.device)
    at = torch.cat((key_at[row], value_at[row].flatten(1), meta_at[row]), -1) + (tile * layout.tile_bytes)[:, None]
    heads = torch.arange(cache.shape[1], device=cache.device)
    content = torch.cat((key_bytes, value_bytes, key_meta, value_meta), -1)
    pages[block[:, None, None], heads[None, :, None], at[:, None, :]] = content

    sink = offset < layout.sink_tokens
    if layout.sink_tokens and bool(sink.any()):
        _store_sinks(pages, block[sink], offset[sink], coded_key[sink], coded_value[sink], layout, block_size)


def _store_sinks(
    pages: Tensor, block: Tensor, offset: Tensor, key: Tensor, value: Tensor, layout: PageLayout, block_size: int
) -> None:
    row = layout.head_size * 2
    start = layout.tile_bytes * block_size // TILE_TOKENS
    within = torch.arange(row, device=pages.device)
    heads = torch.arange(pages.shape[1], device=pages.device)[None, :, None]
    for rows, base in ((key, 0), (value, layout.sink_tokens * row)):
        at = start + base + offset[:, None] * row + within
        pages[block[:, None, None], heads, at[:, None, :]] = _as_bytes(rows.to(torch.float16))


def unpack(
    cache: Tensor, blocks: Tensor, layout: PageLayout, sixteen: torch.dtype, *, use_sinks: bool = True
) -> tuple[Tensor, Tensor]:
    """Keys and values of the pages ``blocks`` of one sequence, still centred, equalised and rotated.

    Args:
        cache: ``uint8 [B, H, N, C]``.
        blocks: ``int64 [n]``, the sequence's pages in order.
        sixteen: type of 16-bit elements, float16 or bfloat16.
        use_sinks: replace the first tokens by their 16-bit copies.

    Returns:
        keys and values, ``float32 [n*N, H, D]``.
    """
    block_size = cache.shape[2]
    pages = _pages(cache)[blocks]
    heads, size = cache.shape[1], layout.head_size
    tiles = pages[..., : block_size // TILE_TOKENS * layout.tile_bytes].unflatten(-1, (-1, layout.tile_bytes))
    key_at, value_at, meta_at = _offsets(layout, cache.device)
    key_bytes, value_bytes = tiles[..., key_at], tiles[..., value_at.flatten(1)]
    meta = _as_bytes(tiles[..., meta_at]).view(torch.float16).float() if layout.meta_bytes_per_token else None

    def decode(packed: Tensor, bits: int, column: int) -> Tensor:
        if bits == 16:
            return packed.contiguous().view(sixteen).float()
        if meta is None:
            raise AssertionError("a quantised side always has scales")
        return unpack_codes(packed, bits) * meta[..., column, None] + meta[..., column + 1, None]

    keys = decode(key_bytes, layout.key_bits, 0)
    values = decode(value_bytes, layout.value_bits, 2 if layout.key_bits < 16 else 0)
    keys, values = (x.permute(0, 2, 3, 1, 4).reshape(-1, heads, size).clone() for x in (keys, values))
    if layout.sink_tokens and use_sinks:
        start = layout.tile_bytes * block_size // TILE_TOKENS
        raw = pages[0, :, start : start + layout.sink_bytes].contiguous().view(torch.float16)
        sinks = raw.float().reshape(heads, 2, layout.sink_tokens, size)
        if layout.key_bits < 16:
            keys[: layout.sink_tokens] = sinks[:, 0].transpose(0, 1)
        if layout.value_bits < 16:
            values[: layout.sink_tokens] = sinks[:, 1].transpose(0, 1)
    return keys, values


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
    """See :func:`jettison.csrc.ops.kv_unpack`."""
    sixteen = torch.float16 if key_out.dtype == torch.float16 else torch.bfloat16
    bounds = cu_seqlens.tolist()
    firsts = [0] * len(bounds) if starts is None else starts.tolist()
    for i, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        first, last = firsts[i], firsts[i] + end - begin
        pages = block_table[i, : -(-last // cache.shape[2])].long()
        keys, values = (x[first:last] for x in unpack(cache, pages, layout, sixteen))
        if layout.key_bits < 16:
            keys = hadamard(keys) if rotate else keys
            keys = keys if key_scale is None else keys * key_scale
            keys = keys if key_center is None else keys + key_center
        if layout.value_bits < 16 and rotate:
            values = hadamard(values)
        key_out[begin:end], value_out[begin:end] = keys.to(key_out.dtype), values.to(value_out.dtype)


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
    compute: torch.dtype = torch.float32,
) -> None:
    """See :func:`jettison.csrc.ops.packed_attention`; ``compute`` is the type of the arithmetic."""
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    sixteen = torch.float16 if query.dtype == torch.float16 else torch.bfloat16
    group = query.shape[1] // cache.shape[1]
    for i, length in enumerate(lengths):
        rows = query[starts[i] : starts[i + 1]].to(compute)
        if not rows.shape[0]:
            continue
        pages = block_table[i, : -(-length // cache.shape[2])].long()
        keys, values = unpack(cache, pages, layout, sixteen)
        keys = keys[:length].to(compute).repeat_interleave(group, 1)
        values = values[:length].to(compute).repeat_interleave(group, 1)
        if window > 0:  # pages before the window may hold anything
            hidden = max(0, length - rows.shape[0] - window + 1)
            keys[:hidden], values[:hidden] = 0, 0
        if layout.key_bits < 16:
            if key_scale is not None:
                rows = rows * key_scale.to(compute).repeat_interleave(group, 0)
            rows = hadamard(rows) if rotate else rows
        out = _attend(rows, keys, values, scale, window, softcap, sinks)
        if rotate and layout.value_bits < 16:
            out = hadamard(out)
        output[starts[i] : starts[i + 1]] = out.to(output.dtype)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Causal attention of the last ``len(query)`` positions of one sequence; all ``[tokens, heads, D]``."""
    length, rows = keys.shape[0], query.shape[0]
    scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    position = torch.arange(length - rows, length, device=query.device)[:, None]
    other = torch.arange(length, device=query.device)[None, :]
    visible = other <= position
    if window > 0:
        visible &= other > position - window
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, rows, 1)
        probabilities = torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]
    else:
        probabilities = torch.softmax(scores, -1)
    return torch.einsum("hqk,khd->qhd", probabilities, values)
