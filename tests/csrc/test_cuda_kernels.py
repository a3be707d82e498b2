"""The CUDA kernels against the reference, simulated on the host: every index map, fragment, mask and merge."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import simulated_kernels as simulated
from jettison.csrc import reference
from jettison.csrc.cuda import variants
from jettison.csrc.layout import PageLayout

BF16, F16 = torch.bfloat16, torch.float16
ROUNDING = {BF16: 2.0**-8, F16: 2.0**-10}
"""Half a unit of the output's last place, plus as much again for queries and weights held in fp16."""


@dataclass(frozen=True)
class Case:
    """A batch: `lengths` tokens stored per sequence, the last `queries` of them attend."""

    layout: PageLayout
    heads: int
    group: int
    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    dtype: torch.dtype = BF16
    rotate: bool = True
    block_size: int = 16
    window: int = -1
    softcap: float = 0.0
    head_sinks: bool = False
    blocks: int = 5

    @property
    def tuning(self) -> variants.DecodeTuning:
        return variants.tune(self.layout, max(self.queries) * self.group)


CASES = (
    Case(PageLayout(128, 4, 4), 2, 4, (100, 37), (1, 1)),
    Case(PageLayout(128, 4, 4), 2, 3, (300, 1, 50, 64), (1, 1, 0, 1), block_size=32, blocks=11),
    Case(PageLayout(64, 8, 4, 1), 3, 3, (100, 513), (1, 1)),
    Case(PageLayout(128, 2, 2), 1, 8, (200,), (1,), F16, rotate=False),
    Case(PageLayout(64, 4, 2, 2), 1, 4, (77, 40), (4, 2), blocks=4),
    Case(PageLayout(128, 8, 8), 1, 2, (90, 150), (1, 1), F16, window=40, head_sinks=True),
    Case(PageLayout(64, 16, 16), 2, 4, (90, 33), (1, 2), rotate=False),
    Case(PageLayout(96, 2, 2), 1, 4, (90, 33), (1, 1)),
    Case(PageLayout(96, 8, 4), 1, 5, (90, 33), (1, 1), softcap=20.0),
    Case(PageLayout(256, 4, 4), 1, 4, (90, 33), (1, 3)),
    Case(PageLayout(128, 16, 4, 3), 1, 16, (90, 33), (1, 1), F16),
    Case(PageLayout(128, 4, 2), 1, 4, (900, 60, 31), (1, 1, 1), blocks=2),
    Case(PageLayout(64, 4, 4), 1, 4, (200, 50), (40, 50), window=70, blocks=7),
    Case(PageLayout(128, 4, 16, 3), 1, 4, (90, 33), (1, 2), block_size=48, window=20),
)


@dataclass
class Batch:
    case: Case
    cache: Tensor
    table: Tensor
    key: Tensor
    value: Tensor
    slots: Tensor
    query: Tensor
    starts: Tensor
    lengths: Tensor
    codec: dict[str, Any]
    sinks: Tensor | None


def make(case: Case, seed: int = 0) -> Batch:
    """Random content; pages in random order, what is not written holds random bytes (NaN scales among them)."""
    random = torch.Generator().manual_seed(seed)
    size, heads, n = case.layout.head_size, case.heads, case.block_size
    pages = [-(-length // n) for length in case.lengths]
    order = torch.randperm(sum(pages) + 3, generator=random).int()
    shape = (len(order), heads, n, case.layout.bytes_per_token(n))
    cache = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    table = torch.full((len(pages), max(pages) + 2), -7, dtype=torch.int32)
    first = 0
    for row, count in enumerate(pages):
        table[row, :count] = order[first : first + count]
        first += count
    slots = torch.cat(
        [table[i][torch.arange(x) // n].long() * n + torch.arange(x) % n for i, x in enumerate(case.lengths)]
    )
    tokens, columns = sum(case.lengths), case.heads * case.group
    key = (torch.randn(tokens, heads, size, generator=random) * 2).to(case.dtype)
    value = torch.randn(tokens, heads, size, generator=random).to(case.dtype)
    query = (torch.randn(sum(case.queries), columns, size, generator=random) * 2).to(case.dtype)
    codec = {
        "rotate": case.rotate,
        "key_center": torch.randn(heads, size, generator=random) * 0.5,
        "key_scale": torch.rand(heads, size, generator=random) + 0.5,
    }
    starts = torch.tensor([0, *torch.tensor(case.queries).cumsum(0)], dtype=torch.int32)
    sinks = torch.randn(columns, generator=random) if case.head_sinks else None
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    return Batch(case, cache, table, key, value, slots, query, starts, lengths, codec, sinks)


def wanted(case: Case) -> list[variants.Variant]:
    element = simulated.ELEMENTS[case.dtype]
    capped = case.softcap > 0
    return [
        variants.store(case.layout, rotate=case.rotate, element=element),
        variants.unpack(case.layout, rotate=case.rotate, element=element),
        variants.plan(case.tuning.columns),
        variants.decode(case.layout, case.tuning, rotate=case.rotate, softcap=capped, element=element),
    ]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(simulated.library, dict.fromkeys(v for case in CASES for v in wanted(case))))


def attend(batch: Batch, dtype: torch.dtype, op: Any, **more: Any) -> Tensor:
    case = batch.case
    out = torch.full(batch.query.shape, torch.nan, dtype=dtype)
    codec = {name: batch.codec[name] for name in ("rotate", "key_scale")}
    op(
        batch.query, batch.cache, out, batch.starts, batch.lengths, batch.table, case.layout,
        scale=case.layout.head_size**-0.5, window=case.window, softcap=case.softcap, sinks=batch.sinks, **codec, **more,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pages_are_bit_for_bit_the_reference(case: Case) -> None:
    batch = make(case)
    expected = batch.cache.clone()
    reference.kv_store(batch.key, batch.value, expected, batch.slots, case.layout, **batch.codec)
    simulated.kv_store(batch.key, batch.value, batch.cache, batch.slots, case.layout, **batch.codec)
    assert torch.equal(batch.cache, expected), case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_the_reference_up_to_rounding(case: Case) -> None:
    batch = make(case)
    reference.kv_store(batch.key, batch.value, batch.cache, batch.slots, case.layout, **batch.codec)
    exact = attend(batch, torch.float64, reference.packed_attention, compute=torch.float64)
    found = attend(batch, case.dtype, simulated.decode, max_query_len=max(case.queries), blocks=case.blocks)
    error = float((found.double() - exact).norm() / exact.norm())
    assert error < ROUNDING[case.dtype], f"{case}: relative error {error}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reading_back_is_the_reference(case: Case) -> None:
    batch = make(case)
    reference.kv_store(batch.key, batch.value, batch.cache, batch.slots, case.layout, **batch.codec)
    starts = torch.tensor([length // 3 for length in case.lengths], dtype=torch.int32)
    bounds = torch.tensor([0, *(batch.lengths - starts).cumsum(0)], dtype=torch.int32)
    results = []
    for op in (reference.kv_unpack, simulated.kv_unpack):
        out = [
            torch.full((int(bounds[-1]), case.heads, case.layout.head_size), torch.nan, dtype=case.dtype) for _ in "kv"
        ]
        op(batch.cache, batch.table, bounds, *out, case.layout, starts=starts, **batch.codec)
        results.append(torch.stack(out).float())
    assert torch.equal(*results), case


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7, 8, 16, 40])
def test_the_cut_does_not_matter(blocks: int) -> None:
    case = replace(CASES[1], lengths=(300, 1, 500, 64), queries=(1, 1, 0, 1))
    batch = make(case)
    reference.kv_store(batch.key, batch.value, batch.cache, batch.slots, case.layout, **batch.codec)
    exact = attend(batch, torch.float64, reference.packed_attention, compute=torch.float64)
    found = attend(batch, case.dtype, simulated.decode, max_query_len=1, blocks=blocks, min_steps=1)
    error = float((found.double() - exact).norm() / exact.norm())
    assert error < ROUNDING[case.dtype], f"{blocks} blocks: relative error {error}"


def test_a_token_with_nan_gives_nan_to_those_who_see_it_only() -> None:
    case = CASES[0]
    batch = make(case)
    batch.key[40, 1, 5] = torch.nan
    simulated.kv_store(batch.key, batch.value, batch.cache, batch.slots, case.layout, **batch.codec)
    found = attend(batch, case.dtype, simulated.decode, max_query_len=1, blocks=3)
    assert found[0, 4:].isnan().all()
    assert found[0, :4].isfinite().all()
    assert found[1].isfinite().all()


def test_slots_below_zero_are_skipped() -> None:
    case = CASES[0]
    batch = make(case)
    before = batch.cache.clone()
    simulated.kv_store(
        batch.key, batch.value, batch.cache, torch.full_like(batch.slots, -1), case.layout, **batch.codec
    )
    assert torch.equal(batch.cache, before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_fit_the_processor(case: Case) -> None:
    variant = wanted(case)[-1]
    needed = (simulated.number(variant, "shared_bytes") + variants.RESERVED_PER_BLOCK) * variant.places
    assert needed <= variants.SHARED_PER_SM, f"{case.tuning}: {needed} bytes"
    assert simulated.number(variant, "threads") * variant.places <= 1024


@pytest.mark.parametrize("size", variants.HEAD_SIZES)
def test_every_format_keeps_enough_bytes_in_flight(size: int) -> None:
    least = 4.27e12 / 132 * 0.8e-6  # copy bandwidth per processor x time from request to data
    for key_bits, value_bits in product((16, 8, 4, 2), repeat=2):
        layout = PageLayout(size, key_bits, value_bits, 4)
        for columns in (1, 4, 5, 8, 9, 16, 64):
            tuning = variants.tune(layout, columns)
            flying = tuning.places * tuning.warps * tuning.stages * 2 * layout.tile_bytes
            assert flying >= least, (layout, tuning, flying)


def test_a_head_size_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head size 80 has no CUDA kernels: allowed are \(64, 96, 128, 256\)"):
        variants.tune(PageLayout(80, 4, 4), 4)
