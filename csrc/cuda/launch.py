"""The ops on CUDA tensors: choose a variant, lay out its arguments, launch it. Nothing here synchronises."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from jettison.csrc.layout import PageLayout

from . import compiler, variants
from .driver import Function
from .variants import Element, Variant

ELEMENTS: dict[torch.dtype, Element] = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
MAX_PLACES = 8
_COUNTER = 4  # bytes
MIN_STEPS = 16
"""Least 32-token steps that are worth a block of their own."""


@cache
def function(variant: Variant, device: int) -> Function:
    """The loaded kernel; compiled at most once per machine, loaded once per process and device."""
    with torch.cuda.device(device):
        torch.cuda.current_stream()
        return Function(compiler.cubin(variant))


def prepare(
    layout: PageLayout, *, rotate: bool, softcap: bool, dtype: torch.dtype, columns: tuple[int, ...], device: int
) -> None:
    """Compile and load, in parallel, what one kind of layer needs; without it the first call does.

    Args:
        dtype: of queries, keys, values and output.
        columns: query columns that decode steps will have (query tokens x query heads per KV head).
    """
    element = ELEMENTS[dtype]
    wanted = {
        variants.store(layout, rotate=rotate, element=element),
        variants.unpack(layout, rotate=rotate, element=element),
        *(variants.plan(variants.tune(layout, count).columns) for count in columns),
        *(
            variants.decode(layout, variants.tune(layout, count), rotate=rotate, softcap=softcap, element=element)
            for count in columns
        ),
    }
    with ThreadPoolExecutor() as pool:
        list(pool.map(compiler.cubin, wanted))
    for variant in wanted:
        function(variant, device)


def kv_store(
    key: Tensor, value: Tensor, cache: Tensor, slots: Tensor, layout: PageLayout, *,
    rotate: bool, key_center: Tensor | None, key_scale: Tensor | None,
) -> None:  # fmt: skip
    """See :func:`jettison.csrc.ops.kv_store`."""
    tokens, heads = slots.shape[0], key.shape[1]
    if not tokens:
        return
    variant = variants.store(layout, rotate=rotate, element=ELEMENTS[key.dtype])
    arguments = variants.store_arguments(
        (key.data_ptr(), value.data_ptr(), cache.data_ptr(), slots.data_ptr(), _at(key_center), _at(key_scale)),
        (*cache.stride()[:2], *key.stride()[:2], *value.stride()[:2]),
        (tokens, heads, cache.shape[2]),
    )
    kernel = function(variant, key.device.index)
    kernel.launch(-(-2 * tokens * heads * 32 // kernel.threads), arguments, _stream(key))


def kv_unpack(
    cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, key_out: Tensor, value_out: Tensor, layout: PageLayout, *,
    rotate: bool, key_center: Tensor | None, key_scale: Tensor | None, starts: Tensor | None,
) -> None:  # fmt: skip
    """See :func:`jettison.csrc.ops.kv_unpack`."""
    tokens, heads, _ = key_out.shape
    if not tokens:
        return
    variant = variants.unpack(layout, rotate=rotate, element=ELEMENTS[key_out.dtype])
    arguments = variants.unpack_arguments(
        (cache.data_ptr(), block_table.data_ptr(), _at(starts), cu_seqlens.data_ptr(), key_out.data_ptr(),
         value_out.data_ptr(), _at(key_center), _at(key_scale)),
        cache.stride()[:2],
        (block_table.stride(0), cache.shape[2], cu_seqlens.shape[0] - 1, heads, tokens),
    )  # fmt: skip
    kernel = function(variant, cache.device.index)
    kernel.launch(-(-tokens * 32 // kernel.threads), arguments, _stream(cache))


@dataclass(frozen=True)
class _Regions:
    """Addresses in a workspace: what the plan kernel writes, what the blocks of a launch tell each other."""

    header: int
    entries: int
    counters: int
    moments: int
    partial: int

    @classmethod
    def of(cls, workspace: Tensor, blocks: int, columns: int, device: int) -> _Regions:
        places = MAX_PLACES * _multiprocessors(device)
        entries = workspace.data_ptr() + variants.HEADER_BYTES
        counters = entries + places * variants.ENTRY_BYTES
        moments = counters + places * _COUNTER
        return cls(workspace.data_ptr(), entries, counters, moments, moments + 2 * blocks * columns * 8)


def attention_workspace(num_heads: int, num_kv_heads: int, head_size: int, max_query_len: int, device: int) -> Tensor:
    """See :func:`jettison.csrc.ops.attention_workspace`."""
    columns = variants.column_tile(head_size, max_query_len * num_heads // num_kv_heads)
    places = _multiprocessors(device) * MAX_PLACES
    size = variants.HEADER_BYTES + places * (variants.ENTRY_BYTES + _COUNTER + 2 * columns * (head_size + 2) * 4)
    return torch.zeros(size, dtype=torch.uint8, device=torch.device("cuda", device))


def plan(
    query_start_loc: Tensor, seq_lens: Tensor, layout: PageLayout, *, num_heads: int, num_kv_heads: int,
    max_query_len: int, window: int, workspace: Tensor,
) -> None:  # fmt: skip
    """See :func:`jettison.csrc.ops.attention_plan`."""
    device, group = seq_lens.device.index, num_heads // num_kv_heads
    tuning = variants.tune(layout, max_query_len * group)
    blocks = tuning.places * _multiprocessors(device)
    at = _Regions.of(workspace, blocks, tuning.columns, device)
    batch = (query_start_loc.data_ptr(), seq_lens.data_ptr(), seq_lens.shape[0], num_kv_heads, group, window)
    arguments = variants.plan_arguments(batch, at.header, at.entries, blocks, MIN_STEPS)
    function(variants.plan(tuning.columns), device).launch(1, arguments, _stream(seq_lens))


def decode(
    query: Tensor, cache: Tensor, output: Tensor, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor,
    layout: PageLayout, *, scale: float, rotate: bool, key_scale: Tensor | None, window: int, softcap: float,
    sinks: Tensor | None, max_query_len: int, workspace: Tensor | None, planned: bool,
) -> None:  # fmt: skip
    """Attention of up to 16 query columns per KV head and pass; more columns read the pages more than once."""
    device, heads, kv_heads = query.device.index, query.shape[1], cache.shape[1]
    if workspace is None:
        workspace, planned = attention_workspace(heads, kv_heads, layout.head_size, max_query_len, device), False
    if not planned:
        plan(query_start_loc, seq_lens, layout, num_heads=heads, num_kv_heads=kv_heads, max_query_len=max_query_len,
             window=window, workspace=workspace)  # fmt: skip
    tuning, element = variants.tune(layout, max_query_len * heads // kv_heads), ELEMENTS[query.dtype]
    variant = variants.decode(layout, tuning, rotate=rotate, softcap=softcap > 0, element=element)
    blocks = tuning.places * _multiprocessors(device)
    at = _Regions.of(workspace, blocks, tuning.columns, device)
    arguments = variants.attention_arguments(
        (query_start_loc.data_ptr(), seq_lens.data_ptr(), seq_lens.shape[0], kv_heads, heads // kv_heads, window),
        (cache.data_ptr(), query.data_ptr(), output.data_ptr(), block_table.data_ptr(), _at(key_scale), _at(sinks),
         at.header, at.entries, at.partial, at.moments, at.counters),
        (*cache.stride()[:2], query.stride(0), output.stride(0)),
        (query.stride(1), output.stride(1), block_table.stride(0), cache.shape[2] // 16, scale, softcap),
    )  # fmt: skip
    function(variant, device).launch(blocks, arguments, _stream(query))


@cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _stream(tensor: Tensor) -> int:
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
