"""FP8 numbers with two levels of scales: E4M3 codes, a power of two per group, one float32 above. Part of the oracle.

``x ~ code * 2**(exponent - 127) * scale``. Groups of 32 or 128 neighbours along the reduction dimension share an E8M0
exponent; the last group of a row may be shorter. ``scale`` belongs to the tensor (one element) or to each row.
Every kernel follows this file bit for bit, so it is the definition:

1. ``a`` = largest magnitude of a group. A group with a NaN or an infinity is *lost*: exponent 255, all codes NaN; it
   takes no part in what follows, and reads back as NaN.
2. ``scale = max(a) / 448`` rounded *up* to float32, at least 2**-126, and 1 where all is zero; level `none`: always 1.
3. The exponent is the smallest ``e`` with ``a <= 448 * scale * 2**e`` (rounding up, RCEIL), found on the bits of
   float32. ``scale * 2**e`` is never below 2**-126, nor ``e`` below -127; a group of zeros has -127.
4. ``code = e4m3(x * (1 / scale * 2**-e))``: one reciprocal rounded to nearest, one product rounded to nearest, then
   to nearest even in E4M3, held within 448.

This is section 8 of our notes on MOSS (arXiv 2511.05811), which is silent on 2, 3's lower end, and divides in 4.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

E4M3_MAX = 448.0
GROUPS = (32, 128)
LEVELS = ("none", "row", "tensor")
BIAS = 127
NAN_EXPONENT = 255
NAN_CODE = 0x7F
SMALLEST_SCALE = 2.0**-126
_INFINITY_BITS = 0x7F800000

Level = Literal["none", "row", "tensor"]


class Quantised(NamedTuple):
    """A matrix ``[M, K]`` in FP8.

    Attributes:
        codes: ``float8_e4m3fn [M, K]``.
        exponents: ``uint8 [M, ceil(K / group)]``, biased by 127; ``[M, 0]`` without groups.
        scale: ``float32 [1]`` or ``[M]``.
        group: elements per exponent, 32 or 128; 0 without groups.
    """

    codes: Tensor
    exponents: Tensor
    scale: Tensor
    group: int


def power_of_two(exponent: Tensor) -> Tensor:
    """``2**exponent`` in float32, exactly: integers from -149 to 127, any shape."""
    e = exponent.to(torch.int32)
    subnormal = torch.ones_like(e) << (e + 149).clamp(0, 22)
    return torch.where(e >= -126, (e + BIAS).clamp(min=1) << 23, subnormal).view(torch.float32)


def scale_for(largest: Tensor) -> Tensor:
    """The smallest float32 ``s >= 2**-126`` with ``448 * s >= largest``; 1 where ``largest`` is 0. Any shape."""
    scale = (largest.double() / E4M3_MAX).float()
    short = scale.double() * E4M3_MAX < largest.double()
    scale = torch.where(short, torch.nextafter(scale, torch.full_like(scale, float("inf"))), scale)
    return torch.where(largest == 0, torch.ones_like(scale), scale.clamp(min=SMALLEST_SCALE))


def limit_of(scale: Tensor) -> Tensor:
    """The largest float32 that is at most ``448 * scale``: a float32 is beyond the codes exactly if it is above."""
    product = scale.double() * E4M3_MAX
    limit = product.float()
    return torch.where(limit.double() > product, torch.nextafter(limit, torch.zeros_like(limit)), limit)


def _exponent_field(x: Tensor) -> Tensor:
    return x.view(torch.int32) >> 23


def exponents_for(largest: Tensor, scale: Tensor, lowest: int | None = None) -> Tensor:
    """Step 3: ``int32`` exponents, unbiased, of groups with these largest magnitudes.

    Args:
        largest: ``float32``, finite, 0 or more.
        scale: ``float32``, broadcastable to ``largest``.
        lowest: least exponent; by default what keeps ``scale * 2**e`` a normal number.
    """
    limit = limit_of(scale)
    mantissa = 0x7FFFFF
    above = (largest.view(torch.int32) & mantissa) > (limit.view(torch.int32) & mantissa)
    exponent = _exponent_field(largest) - _exponent_field(limit) + above.to(torch.int32)
    least = (1 - _exponent_field(scale)).clamp(min=-BIAS) if lowest is None else torch.full_like(exponent, lowest)
    return torch.where(largest == 0, torch.full_like(exponent, -BIAS), torch.maximum(exponent, least))


def to_e4m3(x: Tensor) -> Tensor:
    """float32 -> ``float8_e4m3fn``, to nearest even, magnitudes held within 448, NaN to 0x7F."""
    codes = x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(x.isnan(), NAN_CODE, codes).view(torch.float8_e4m3fn)


def _grouped(x: Tensor, group: int) -> Tensor:
    """``[M, K]`` -> ``[M, ceil(K / group), group]``, padded with zeros."""
    missing = -x.shape[1] % group
    return torch.nn.functional.pad(x, (0, missing)).unflatten(1, (-1, group))


def expand_exponents(exponents: Tensor, group: int, columns: int) -> Tensor:
    """Biased exponents ``[M, G]`` -> their factors ``float32 [M, columns]``; NaN for 255."""
    factor = power_of_two(exponents.to(torch.int32) - BIAS)
    factor = torch.where(exponents == NAN_EXPONENT, float("nan"), factor)
    return factor.repeat_interleave(group, 1)[:, :columns]


def _top(largest: Tensor, level: str) -> Tensor:
    """Scale ``[M]`` or ``[1]`` of groups with these largest magnitudes ``[M, G]``."""
    if level == "none" or not largest.numel():
        return torch.ones(largest.shape[0] if level == "row" else 1, device=largest.device)
    return scale_for(largest.amax(1) if level == "row" else largest.amax().reshape(1))


def quantise(x: Tensor, group: int = 32, level: Level = "none") -> Quantised:
    """Quantise the rows of a matrix.

    Args:
        x: ``[M, K]``, any float type up to float32, any strides; M may be 0.
        group: 32 or 128; 0 for no exponents, where only the elements that are not finite are lost.
        level: what ``scale`` belongs to; `none` is the single level of the MX formats.

    Raises:
        ValueError: an unknown group or level, or neither level of scales.
    """
    check_recipe(group, level)
    x = x.float()
    if not group:
        largest = torch.where(x.isfinite(), x, 0.0).abs()
        scale = _top(largest, level)
        codes = to_e4m3(torch.where(x.isfinite(), x, float("nan")) * (1.0 / scale)[:, None])
        return Quantised(codes, torch.empty(x.shape[0], 0, dtype=torch.uint8, device=x.device), scale, 0)
    groups = _grouped(x, group)
    bits = groups.abs().view(torch.int32).amax(-1)
    largest = torch.where(bits >= _INFINITY_BITS, 0, bits).view(torch.float32)
    scale = _top(largest, level)
    exponents = exponents_for(largest, scale[:, None].expand_as(largest).contiguous())
    return _encode(groups, bits >= _INFINITY_BITS, largest, exponents, scale, x.shape[1])


def _encode(groups: Tensor, lost: Tensor, largest: Tensor, exponents: Tensor, scale: Tensor, columns: int) -> Quantised:
    up = power_of_two(-exponents.clamp(min=-BIAS))
    factor = torch.where(largest == 0, 0.0, (1.0 / scale)[:, None] * up)
    codes = to_e4m3(torch.where(lost[..., None], float("nan"), groups * factor[..., None]))
    biased = torch.where(lost, NAN_EXPONENT, exponents + BIAS).to(torch.uint8)
    codes = codes.view(torch.uint8).flatten(1)[:, :columns].contiguous().view(torch.float8_e4m3fn)
    return Quantised(codes, biased, scale, groups.shape[-1])


def check_recipe(group: int, level: str) -> None:
    """Refuse what is no format.

    Raises:
        ValueError: naming what was found and what is allowed.
    """
    if group not in (0, *GROUPS):
        raise ValueError(f"group {group} is not supported: use one of {GROUPS}, or 0 for no exponents")
    if level not in LEVELS:
        raise ValueError(f"level {level!r} is not supported: use one of {', '.join(LEVELS)}")
    if not group and level == "none":
        raise ValueError("group 0 with level 'none' has no scale at all: use level 'row' or 'tensor'")


def dequantise(quantised: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[M, K]`` in ``dtype``: exact in float64, one rounding in float32."""
    codes, exponents, scale, group = quantised
    values = codes.to(torch.float64)
    if group:
        values = values * expand_exponents(exponents, group, codes.shape[1]).double()
    values = values * scale.double()[:, None]
    return values if dtype == torch.float64 else values.float().to(dtype)


def _local(quantised: Quantised) -> Tensor:
    """Values before the scale, exact in float32."""
    codes, exponents, _, group = quantised
    return codes.float() * expand_exponents(exponents, group, codes.shape[1])


def _regroup(values: Tensor, group: int, scale: Tensor) -> Quantised:
    groups = _grouped(values, group)
    lost = ~groups.isfinite().all(-1)
    largest = torch.where(lost, 0.0, groups.nan_to_num(0.0).abs().amax(-1))
    exponents = exponents_for(largest, torch.ones_like(largest), lowest=-BIAS)
    encoded = _encode(groups, lost, largest, exponents, torch.ones(1, device=values.device), values.shape[1])
    return encoded._replace(scale=scale)


def reblock(quantised: Quantised, group: int, *, turn: bool = False) -> Quantised:
    """Other groups for the same values, by moving exponents: exact but for what falls under E4M3's smallest step.

    Args:
        quantised: with groups.
        group: 32 or 128.
        turn: transpose, so that groups run along the other dimension.

    Raises:
        ValueError: no exponents to move, or turning rows that have scales of their own.
    """
    check_recipe(group, "none")
    if not quantised.group:
        raise ValueError("this matrix has no exponents to move: quantise it with group 32 or 128")
    if not turn:
        return _regroup(_local(quantised), group, quantised.scale)
    if quantised.scale.numel() != 1:
        raise ValueError(
            f"rows with {quantised.scale.numel()} scales cannot be turned exactly: quantise with level 'none' or "
            "'tensor', or quantise the transposed matrix"
        )
    return _regroup(_local(quantised).T.contiguous(), group, quantised.scale)
