"""The arithmetic of the packed formats in plain torch: rotation, quantising, packing. Part of the oracle.

Every kernel follows it bit for bit where it writes, so the order of rounding is part of the definition.
"""

import math

import torch
from torch import Tensor


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


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """``uint8 [..., D]`` codes -> ``uint8 [..., D*bits/8]`` bytes, the first code in the low bits."""
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, device=codes.device, dtype=torch.int32) * bits
    grouped = codes.reshape(*codes.shape[:-1], -1, per_byte).to(torch.int32)
    return (grouped << shifts).sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack_codes`, int32."""
    shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.int32) * bits
    return ((packed[..., None].to(torch.int32) >> shifts) & (2**bits - 1)).flatten(-2)
