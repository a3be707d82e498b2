"""The oracle of the FP8 ops in plain torch: what each means, and in which order it rounds.

Same names and arguments as :mod:`jettison.csrc.fp8_ops`. Runs on any device. Codes, exponents and scales are bit-exact
in every kernel; products of matrices are compared with float64 within the rounding of their accumulators.
"""

import torch
from torch import Tensor

from .fp8_format import Level, Quantised, dequantise, expand_exponents, limit_of, quantise, to_e4m3

BACKENDS = ("block", "bf16_fold", "tensor")
PROMOTION = 128
"""Products along the reduction dimension that tensor cores add up before float32 takes over."""

__all__ = [
    "BACKENDS", "PROMOTION", "cast_weight", "dequantise", "gemm", "quantise", "quantise_both", "rms_norm_quantise",
    "swiglu_quantise",
]  # fmt: skip


def quantise_both(x: Tensor, group: int = 32, level: Level = "none") -> tuple[Quantised, Quantised]:
    """See :func:`jettison.csrc.fp8_ops.quantise_both`."""
    return quantise(x, group, level), quantise(x.T.contiguous(), group, "none")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x / rms(x) * weight`` of each row, rounded to the type of ``x``; and ``1 / rms`` as ``float32 [M]``."""
    wide = x.float()
    reciprocal = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * reciprocal[:, None] * weight.float()).to(x.dtype), reciprocal


def rms_norm_quantise(
    x: Tensor, weight: Tensor, eps: float, group: int = 32, level: Level = "none"
) -> tuple[Quantised, Tensor]:
    """See :func:`jettison.csrc.fp8_ops.rms_norm_quantise`."""
    normalised, reciprocal = rms_norm(x, weight, eps)
    return quantise(normalised, group, level), reciprocal


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` in float32, rounded to the type of ``gate``."""
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


def swiglu_quantise(gate: Tensor, up: Tensor, group: int = 32, level: Level = "none") -> Quantised:
    """See :func:`jettison.csrc.fp8_ops.swiglu_quantise`."""
    return quantise(swiglu(gate, up), group, level)


def cast_weight(weight: Tensor, scale: Tensor, codes: Tensor, codes_t: Tensor, clipped: Tensor) -> None:
    """See :func:`jettison.csrc.fp8_ops.cast_weight`."""
    wide = weight.float()
    codes.copy_(to_e4m3(torch.where(wide.isfinite(), wide * (1.0 / scale), float("nan"))))
    if codes_t.numel():
        codes_t.copy_(codes.T)
    clipped.copy_((wide.abs() > limit_of(scale)).sum())


def gemm(a: Quantised, b: Quantised, bias: Tensor | None, out_dtype: torch.dtype, backend: str = "block") -> Tensor:
    """``a @ b.T + bias``, accumulated in float32; see :func:`jettison.csrc.fp8_ops.gemm`.

    `block`: sums of one group (128 where neither side has groups) are multiplied by both sides' powers of two when
    they are promoted to the float32 accumulator. `bf16_fold`: powers of two are folded into bf16 elements first.
    Scales come last, then the bias, then one rounding to ``out_dtype``.
    """
    group = a.group or b.group
    left, right = a.codes.float(), b.codes.float()
    if backend == "bf16_fold":
        left, right = _folded(a), _folded(b)
        group = 0
    total = torch.zeros(left.shape[0], right.shape[0], device=left.device)
    for i, start in enumerate(range(0, left.shape[1], group or PROMOTION)):
        window = slice(start, start + (group or PROMOTION))
        partial = left[:, window] @ right[:, window].T
        if group and a.group:
            partial = partial * expand_exponents(a.exponents[:, i : i + 1], 1, 1)
        if group and b.group:
            partial = partial * expand_exponents(b.exponents[:, i : i + 1], 1, 1).T
        total += partial
    total = total * a.scale[:, None] * b.scale
    return (total if bias is None else total + bias.float()).to(out_dtype)


def _folded(x: Quantised) -> Tensor:
    values = x.codes.float()
    if x.group:
        values = values * expand_exponents(x.exponents, x.group, values.shape[1])
    return values.to(torch.bfloat16).float()
