"""The FP8 quantiser for CUDA, run on the host lane by lane: bit for bit csrc/fp8_format.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import simulated_kernels as simulated
from jettison.csrc import fp8_format
from jettison.csrc.cuda import variants

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def quantise(x: Tensor, group: int, *, row: bool) -> tuple[fp8_format.Quantised, Tensor]:
    """By the kernel; also the exponents as factors, [groups, rows padded to 256]."""
    m, k = x.shape
    groups, padded = -(-k // group), -(-m // 256) * 256
    codes, exponents = torch.zeros(m, k, dtype=torch.uint8), torch.zeros(m, groups, dtype=torch.uint8)
    scale, promotions = torch.ones(m if row else 1), torch.full((groups, padded), 7.0)
    variant = variants.quantise(group=group, row=row, element=simulated.ELEMENTS[x.dtype])
    arguments = variants.quantise_arguments(
        tuple(map(simulated.at, (x, codes, exponents, scale, promotions))), x.stride(0), (m, k, padded)
    )
    simulated.run(variant, -(-m * 32 // simulated.number(variant, "threads")), arguments)
    return fp8_format.Quantised(codes.view(torch.float8_e4m3fn), exponents, scale, group), promotions


def matrix(m: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows of very different size, with zeros, groups of zeros, edges of powers of two, NaN, infinities, denormals."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * torch.exp2(torch.randint(-9, 9, (m, 1), generator=generator).float())
    x[:, : k // 3] *= 2.0**-11
    x[1 % m, : min(k, 64)] = 0
    x[2 % m] = 0
    x[3 % m, 0] = float("nan")
    x[4 % m, k - 1] = float("-inf")
    x[5 % m] = 448 * torch.exp2(torch.randint(-12, 3, (k,), generator=generator).float())
    x[6 % m] = torch.exp2(torch.arange(k) % 30 - 24.0) * torch.where(torch.arange(k) % 2 == 0, 1.0, -1.0)
    if dtype != F16:
        x[7 % m] *= 2.0**-130
    return x.to(dtype)


@pytest.mark.parametrize("row", [False, True], ids=["none", "row"])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize(
    ("m", "k", "dtype"), [(11, 512, BF16), (9, 1000, F32), (8, 40, F16), (1, 130, BF16), (17, 264, BF16)]
)
def test_codes_exponents_and_scales_are_the_definition(
    m: int, k: int, dtype: torch.dtype, group: int, row: bool
) -> None:
    for seed in range(3):
        x = matrix(m, k, dtype, seed)
        wide = torch.full((m, k + 8), 3.0, dtype=dtype)
        wide[:, :k] = x
        for given in (x, wide[:, :k]) if k % 8 == 0 else (x,):
            found, promotions = quantise(given, group, row=row)
            expected = fp8_format.quantise(given, group, "row" if row else "none")
            where = f"seed {seed}, stride {given.stride(0)}"
            assert torch.equal(found.scale.view(torch.int32), expected.scale.view(torch.int32)), where
            assert torch.equal(found.exponents, expected.exponents), where
            assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8)), where
            factors = fp8_format.expand_exponents(expected.exponents, 1, expected.exponents.shape[1]).T
            assert torch.equal(promotions[:, :m].nan_to_num(-1), factors.nan_to_num(-1)), where
            assert (promotions[:, m:] == 7).all(), "what pads the factors is not written"
