"""The oracle: every op of this package in plain torch, written for clarity, bit-exact where the kernels must be.

Same names and arguments as :mod:`jettison.csrc.ops`. Runs on any device; nothing here is fast.
"""

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .layout import TILE_TOKENS, PageLayout


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal block Hadamard transform of the last dimension (its own inverse), in float32 or float64.

    Blocks are the largest power of two that divides the size (64 -> one block, 80 -> five of 16). Butterflies run
    from stride 1 upwards, the scaling comes last: the order of rounding that every kernel keeps.
    """
    size = x.shape[-1]
    block = size & -size
    y = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, size // block, block)
    step = 1
    while step < block:
        pairs = y.reshape(*y.shape[:2], -1, 2, step)
        y = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2).flatten(2)
        step *= 2
    scale = torch.tensor(1.0 / math.sqrt(block), dtype=y.dtype)
    return (y * scale.to(y.device)).reshape(x.shape)


def _round_half(x: Tensor, *, up: bool) -> Tensor:
    """float32 -> float16 towards +inf (``up``) or -inf."""
    half = x.to(torch.float16)
    wrong = half.float() < x if up else half.float() > x
    bits = half.view(torch.int16)
    away = half > 0 if up else half < 0
    smallest = torch.full_like(bits, 1 if up else -32767)
    moved = torch.where(half == 0, smallest, torch.where(away, bits + 1, bits - 1))
    return torch.where(wrong, moved, bits).view(torch.float16)


ROTATED_2_BIT_SHARE = 0.75


def range_share(bits: int, *, rotate: bool) -> float:
    """Part of a row's range that its codes span, around the middle: all of it, but 3/4 of a rotated row at 2 bits.

    Rotated rows are near Gaussian: four levels serve them better if the few outermost elements are clipped.
    """
    return ROTATED_2_BIT_SHARE if rotate and bits == 2 else 1.0


def quantise(x: Tensor, bits: int, share: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric quantisation of the last dimension, one fp16 scale and zero per row.

    The zero is the minimum rounded down and the scale the range rounded up, so no code is clipped and
    ``|x - (code * scale + zero)| <= scale / 2``; with a share below 1 that holds inside the share only. A row with a
    NaN, an infinity or a range beyond fp16 gets NaN for both: it reads back as NaN, as it would from a 16-bit cache.

    Args:
        x: ``[..., D]``, any float type.
        bits: 8, 4 or 2.
        share: see :func:`range_share`.

    Returns:
        codes ``uint8 [..., D]``, scale ``float16 [...]``, zero ``float16 [...]``.
    """
    x = x.float()
    low, high = x.amin(-1), x.amax(-1)
    if share < 1.0:
        cut = (high - low) * ((1.0 - share) / 2)
        low, high = low + cut, high - cut
    levels = 2**bits - 1
    zero = _round_half(low, up=False)
    scale = _round_half((high - zero.float()) / levels, up=True)
    finite = torch.isfinite(low) & torch.isfinite(high) & torch.isfinite(zero.float()) & torch.isfinite(scale.float())
    nan = torch.full_like(zero, float("nan"))
    scale, zero = torch.where(finite, scale, nan), torch.where(finite, zero, nan)
    inverse = torch.where(scale > 0, 1.0 / scale.float(), torch.zeros_like(low))
    codes = ((x - zero.float()[..., None]) * inverse[..., None]).round().clamp(0, levels)
    return codes.nan_to_num(0.0).to(torch.uint8), scale, zero


def encode_keys(key: Tensor, *, rotate: bool, center: Tensor | None, scale: Tensor | None) -> Tensor:
    """Keys as they are quantised: centred, equalised, rotated. ``key [T, H, D]``, ``center``/``scale`` ``[H, D]``."""
    key = key.float()
    if center is not None:
        key = key - center
    if scale is not None:
        key = key * (1.0 / scale)
    return hadamard(key) if rotate else key


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


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """``uint8 [..., D]`` codes -> ``uint8 [..., D*bits/8]`` bytes, the first code in the low bits."""
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, device=codes.device, dtype=torch.int32) * bits
    grouped = codes.reshape(*codes.shape[:-1], -1, per_byte).to(torch.int32)
    return (grouped << shifts).sum(-1).to(torch.uint8)


def _unpack_codes(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.int32) * bits
    return ((packed[..., None].to(torch.int32) >> shifts) & (2**bits - 1)).flatten(-2)


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
    return _pack_codes(codes, bits), _as_bytes(torch.stack((scale, zero), -1))


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
        return _unpack_codes(packed, bits) * meta[..., column, None] + meta[..., column + 1, None]

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
