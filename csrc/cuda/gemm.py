"""FP8 matrix products on Hopper: tensor maps for the driver, and the launch of fp8_gemm.cuh."""

from __future__ import annotations

import ctypes
import struct
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from . import driver
from .launch import function
from .variants import Variant

BLOCK_K = 128
SCALE_ROWS = 256
"""Rows of scales are padded to a multiple of this."""
_CLUSTER = 2
_E4M3, _BF16 = 0, 9  # CU_TENSOR_MAP_DATA_TYPE_UINT8, ..._BFLOAT16
_SWIZZLE_128B, _L2_256B = 3, 3
_ARGUMENTS = struct.Struct("<384s4Q5i12x")
_MAP_BYTES = 128


@cache
def variant(*, b_scaled: bool) -> Variant:
    """The kernel; `b_scaled` if B has scales along the reduction as A has."""
    return Variant("fp8_gemm.cuh", f"Fp8Gemm<{'true' if b_scaled else 'false'}>", "GemmArgs", 1, _CLUSTER)


def matmul(
    a: Tensor, b: Tensor, out: Tensor, a_scale: Tensor, b_scale: Tensor | None, row_scale: Tensor | None,
    factor: Tensor | None,
) -> None:  # fmt: skip
    """out[m, n] = row_scale[m] * factor * sum over j of a_scale[j, m] * b_scale[j, n] * (block j of A times that of B).

    Args:
        a, b: float8_e4m3fn [M, K], [N, K], rows contiguous, K a multiple of 128.
        out: bfloat16 [M, N], rows contiguous, N a multiple of 8.
        a_scale, b_scale: float32 [K / 128, rows], rows a multiple of 256 and at least M or N.
        row_scale: float32 [M]; factor: float32 [1].
    """
    m, k = a.shape
    n, device = b.shape[0], a.device.index
    maps = (_map(a, 128, BLOCK_K), _map(b, 128, BLOCK_K), _map(out, 64, 64))
    arguments = _ARGUMENTS.pack(
        b"".join(maps), a_scale.data_ptr(), _at(b_scale), _at(row_scale), _at(factor),
        m, n, k, a_scale.shape[1], 0 if b_scale is None else b_scale.shape[1],
    )  # fmt: skip
    tiles = -(-m // 256) * -(-n // 256)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    blocks = _CLUSTER * min(tiles, processors // _CLUSTER)
    stream = int(torch.cuda.current_stream(a.device).cuda_stream)
    function(variant(b_scaled=b_scale is not None), device).launch(blocks, arguments, stream)


def _map(matrix: Tensor, rows: int, columns: int) -> bytes:
    return _encoded(
        matrix.data_ptr(), matrix.shape[0], matrix.shape[1], matrix.stride(0) * matrix.element_size(), rows, columns,
        matrix.element_size(),
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _encoded(address: int, height: int, width: int, pitch: int, rows: int, columns: int, size: int) -> bytes:
    """A CUtensorMap of a matrix, read or written in boxes of rows x columns with the 128-byte swizzle."""
    buffer = ctypes.create_string_buffer(_MAP_BYTES + 64)
    aligned = (ctypes.addressof(buffer) + 63) // 64 * 64

    def words(kind: Any, *values: int) -> Any:
        return (kind * len(values))(*values)

    driver.call(
        "cuTensorMapEncodeTiled", ctypes.c_void_p(aligned), _E4M3 if size == 1 else _BF16, 2, ctypes.c_void_p(address),
        words(ctypes.c_uint64, width, height), words(ctypes.c_uint64, pitch), words(ctypes.c_uint32, columns, rows),
        words(ctypes.c_uint32, 1, 1), 0, _SWIZZLE_128B, _L2_256B, 0,
    )  # fmt: skip
    return ctypes.string_at(aligned, _MAP_BYTES)


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
