"""FP8 ops: Python signatures, argument checks, fake implementations, CPU implementations.

They are registered under ``torch.ops.jettison.fp8_*`` and need no compiled library; on the CPU the reference runs. The
CUDA kernels register themselves in :mod:`jettison.csrc.cuda`.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from . import fp8_reference as reference
from .fp8_format import Level, Quantised, check_recipe

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantise(x: Tensor, group: int = 32, level: Level = "none") -> Quantised:
    """Quantise the rows of a matrix; :mod:`jettison.csrc.fp8_format` defines every bit.

    Args:
        x: ``[M, K]`` float32, bfloat16 or float16, any strides; M may be 0.
        group: elements along K that share an exponent, 32 or 128; 0 for none.
        level: what one float32 scale belongs to: `row`, `tensor`, or `none` for exponents alone.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check_matrix("x", x)
    check_recipe(group, level)
    codes, exponents, scale = torch.ops.jettison.fp8_quantise(x, group, level)
    return Quantised(codes, exponents, scale, group)


def quantise_both(x: Tensor, group: int = 32, level: Level = "none") -> tuple[Quantised, Quantised]:
    """Quantise a matrix along its rows and along its columns, from one read of the original.

    The second, ``[K, M]``, always has level `none`: a scale per column would need the whole matrix first.

    Args, raises:
        as :func:`quantise`; ``group`` must not be 0.
    """
    _check_matrix("x", x)
    check_recipe(group, level)
    check_recipe(group, "none")
    codes, exponents, scale, codes_t, exponents_t = torch.ops.jettison.fp8_quantise_both(x, group, level)
    one = torch.ones(1, dtype=torch.float32, device=x.device)
    return Quantised(codes, exponents, scale, group), Quantised(codes_t, exponents_t, one, group)


def rms_norm_quantise(
    x: Tensor, weight: Tensor, eps: float, group: int = 32, level: Level = "none"
) -> tuple[Quantised, Tensor]:
    """RMSNorm of each row and :func:`quantise`; the normalised row is rounded to the type of ``x`` between them.

    Args:
        x: ``[M, K]``; weight: ``[K]``; eps: added to the mean square.

    Returns:
        the quantised matrix, and ``1 / rms`` of each row, ``float32 [M]``, for a backward pass.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check_matrix("x", x)
    check_recipe(group, level)
    if weight.shape != x.shape[1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, but rows of x have {x.shape[1]} elements")
    codes, exponents, scale, reciprocal = torch.ops.jettison.fp8_rms_norm_quantise(x, weight, eps, group, level)
    return Quantised(codes, exponents, scale, group), reciprocal


def swiglu_quantise(gate: Tensor, up: Tensor, group: int = 32, level: Level = "none") -> Quantised:
    """``silu(gate) * up``, rounded to the type of ``gate``, and :func:`quantise`; both ``[M, K]``.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check_matrix("gate", gate)
    _check_matrix("up", up)
    check_recipe(group, level)
    if gate.shape != up.shape:
        raise ValueError(f"gate has shape {tuple(gate.shape)}, but up has {tuple(up.shape)}")
    codes, exponents, scale = torch.ops.jettison.fp8_swiglu_quantise(gate, up, group, level)
    return Quantised(codes, exponents, scale, group)


def cast_weight(weight: Tensor, scale: Tensor, codes: Tensor, codes_t: Tensor, clipped: Tensor) -> None:
    """Write the codes of a weight with a known scale, as stored and transposed, in place and in one read.

    Args:
        weight: ``[N, K]`` float32, bfloat16 or float16.
        scale: ``float32 [1]``, positive: the weight is ``codes * scale``.
        codes: ``float8_e4m3fn [N, K]``; codes_t: ``float8_e4m3fn [K, N]``, or empty to leave it out.
        clipped: ``int64 []``, becomes the number of elements beyond ``448 * scale``, which are held at the limit.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check_matrix("weight", weight)
    if codes.shape != weight.shape or (codes_t.numel() and codes_t.shape != weight.shape[::-1]):
        raise ValueError(
            f"codes {tuple(codes.shape)} and codes_t {tuple(codes_t.shape)} do not fit the weight's "
            f"{tuple(weight.shape)} and its transposed shape"
        )
    if scale.numel() != 1 or scale.dtype != torch.float32:
        raise ValueError(f"scale is {scale.dtype} with {scale.numel()} elements: one float32 is needed")
    torch.ops.jettison.fp8_cast_weight(weight, scale, codes, codes_t, clipped)


def gemm(
    a: Quantised,
    b: Quantised,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "block",
) -> Tensor:
    """``a @ b.T + bias``: ``[M, K]`` by ``[N, K]`` gives ``[M, N]``.

    Args:
        a, b: quantised; where both have groups, equal ones. K must be the same.
        bias: ``[N]`` or None.
        out_dtype: float32, bfloat16 or float16.
        backend: `block` multiplies sums of a group by its powers of two as they are promoted to float32; `bf16_fold`
            multiplies elements, exactly, and multiplies matrices in bf16; `tensor` takes operands without groups.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if a.codes.shape[1] != b.codes.shape[1]:
        raise ValueError(f"a has K = {a.codes.shape[1]}, b has K = {b.codes.shape[1]}: they must be equal")
    if a.group and b.group and a.group != b.group:
        raise ValueError(f"a has groups of {a.group}, b of {b.group}: they must be equal")
    if backend not in reference.BACKENDS:
        raise ValueError(f"backend {backend!r} is not supported: use one of {', '.join(reference.BACKENDS)}")
    if backend == "tensor" and (a.group or b.group):
        raise ValueError("backend 'tensor' takes no exponents: quantise with group 0, or use backend 'block'")
    if out_dtype not in _FLOATS:
        raise ValueError(f"out_dtype {out_dtype} is not supported: use float32, bfloat16 or float16")
    result = torch.ops.jettison.fp8_gemm(
        a.codes, a.exponents, a.scale, a.group, b.codes, b.exponents, b.scale, b.group, bias, out_dtype, backend
    )
    return cast(Tensor, result)


def _check_matrix(name: str, x: Tensor) -> None:
    if x.dim() != 2 or x.dtype not in _FLOATS:
        raise ValueError(
            f"{name} is {x.dtype} with {x.dim()} dimensions: a matrix of float32, bfloat16 or float16 is needed"
        )


@torch.library.custom_op("jettison::fp8_quantise", mutates_args=(), device_types="cpu")
def _quantise(x: Tensor, group: int, level: str) -> tuple[Tensor, Tensor, Tensor]:
    return reference.quantise(x, group, cast(Level, level))[:3]


@torch.library.custom_op("jettison::fp8_quantise_both", mutates_args=(), device_types="cpu")
def _quantise_both(x: Tensor, group: int, level: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, columns = reference.quantise_both(x, group, cast(Level, level))
    return (*rows[:3], columns.codes, columns.exponents)


@torch.library.custom_op("jettison::fp8_rms_norm_quantise", mutates_args=(), device_types="cpu")
def _rms_norm_quantise(
    x: Tensor, weight: Tensor, eps: float, group: int, level: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quantised, reciprocal = reference.rms_norm_quantise(x, weight, eps, group, cast(Level, level))
    return (*quantised[:3], reciprocal)


@torch.library.custom_op("jettison::fp8_swiglu_quantise", mutates_args=(), device_types="cpu")
def _swiglu_quantise(gate: Tensor, up: Tensor, group: int, level: str) -> tuple[Tensor, Tensor, Tensor]:
    return reference.swiglu_quantise(gate, up, group, cast(Level, level))[:3]


@torch.library.custom_op("jettison::fp8_cast_weight", mutates_args=("codes", "codes_t", "clipped"), device_types="cpu")
def _cast_weight(weight: Tensor, scale: Tensor, codes: Tensor, codes_t: Tensor, clipped: Tensor) -> None:
    reference.cast_weight(weight, scale, codes, codes_t, clipped)


@torch.library.custom_op("jettison::fp8_gemm", mutates_args=(), device_types="cpu")
def _gemm(
    a: Tensor,
    a_exponents: Tensor,
    a_scale: Tensor,
    a_group: int,
    b: Tensor,
    b_exponents: Tensor,
    b_scale: Tensor,
    b_group: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    left, right = Quantised(a, a_exponents, a_scale, a_group), Quantised(b, b_exponents, b_scale, b_group)
    return reference.gemm(left, right, bias, out_dtype, backend)


def _fake_matrix(x: Tensor, shape: Sequence[int], group: int, level: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = shape
    return (
        x.new_empty((rows, columns), dtype=torch.float8_e4m3fn),
        x.new_empty((rows, -(-columns // group) if group else 0), dtype=torch.uint8),
        x.new_empty((rows if level == "row" else 1,), dtype=torch.float32),
    )


@_quantise.register_fake
def _quantise_fake(x, group, level):
    return _fake_matrix(x, x.shape, group, level)


@_quantise_both.register_fake
def _quantise_both_fake(x, group, level):
    rows, columns = x.shape
    return (*_fake_matrix(x, (rows, columns), group, level), *_fake_matrix(x, (columns, rows), group, "none")[:2])


@_rms_norm_quantise.register_fake
def _rms_norm_quantise_fake(x, weight, eps, group, level):
    return (*_fake_matrix(x, x.shape, group, level), x.new_empty(x.shape[:1], dtype=torch.float32))


@_swiglu_quantise.register_fake
def _swiglu_quantise_fake(gate, up, group, level):
    return _fake_matrix(gate, gate.shape, group, level)


@_cast_weight.register_fake
def _cast_weight_fake(weight, scale, codes, codes_t, clipped):
    return None


@_gemm.register_fake
def _gemm_fake(a, a_exponents, a_scale, a_group, b, b_exponents, b_scale, b_group, bias, out_dtype, backend):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)
