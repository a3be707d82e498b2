"""Which compiled variant serves a shape, and how its arguments are laid out. No CUDA is needed to ask.

A variant is a C++ template of this folder with everything that the inner loop could depend on fixed at compile time:
head size, bits, rotation, element type, query columns, pipeline depth, warps.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import Literal

from jettison.csrc.layout import PageLayout

Element = Literal["f32", "bf16", "f16"]

HEAD_SIZES = (64, 96, 128, 256)
MAX_DECODE_QUERIES = 64
"""New tokens per sequence that the decode kernel takes."""
SHARED_PER_SM = 227 * 1024
RESERVED_PER_BLOCK = 1024


@dataclass(frozen=True)
class Variant:
    """One template instance.

    Attributes:
        header: file of this folder that defines it.
        template: C++ type of the instance.
        arguments: C++ type of its only argument.
        places: blocks per SM it is compiled for.
        cluster: blocks that run together and reach each other's shared memory.
    """

    header: str
    template: str
    arguments: str
    places: int
    cluster: int = 1

    def source(self) -> str:
        """The translation unit: one kernel named `kernel`, its block size and shared memory as variables."""
        cluster = f"__cluster_dims__({self.cluster}, 1, 1) " if self.cluster > 1 else ""
        return (
            f'#include "{self.header}"\n'
            f"using Variant = jt::{self.template};\n"
            "#if defined(__CUDACC__) || defined(__CUDACC_RTC__)\n"
            'extern "C" __device__ int threads = Variant::threads, shared_bytes = Variant::shared_bytes;\n'
            f'extern "C" __global__ void {cluster}__launch_bounds__(Variant::threads, {self.places})\n'
            f"kernel(const __grid_constant__ jt::{self.arguments} arguments) {{ Variant::run(arguments); }}\n"
            "#else\n"
            'extern "C" int threads = Variant::threads, shared_bytes = Variant::shared_bytes;\n'
            f'extern "C" int argument_bytes = sizeof(jt::{self.arguments});\n'
            f'extern "C" void kernel(const jt::{self.arguments}* arguments, int blocks) {{\n'
            "  for (int block = 0; block < blocks; block++)\n"
            "    jt::simt::run_block(block, blocks, threads, shared_bytes, [&] { Variant::run(*arguments); });\n"
            "}\n"
            "#endif\n"
        )


def check(layout: PageLayout) -> None:
    """Refuse what no variant serves.

    Raises:
        ValueError: one sentence with the head size found and those allowed.
    """
    if layout.head_size not in HEAD_SIZES:
        raise ValueError(f"head size {layout.head_size} has no CUDA kernels: allowed are {HEAD_SIZES}")


@cache
def store(layout: PageLayout, *, rotate: bool, element: Element) -> Variant:
    """The writer: `element` is the type of the new keys and values."""
    return Variant("store.cuh", f"Store<{_page(layout)}, {_flag(rotate)}, jt::Type::{element}>", "StoreArgs", 4)


@cache
def unpack(layout: PageLayout, *, rotate: bool, element: Element) -> Variant:
    """Packed pages to keys and values of type `element`."""
    return Variant("unpack.cuh", f"Unpack<{_page(layout)}, {_flag(rotate)}, jt::Type::{element}>", "UnpackArgs", 4)


@dataclass(frozen=True)
class DecodeTuning:
    """Shape of a decode block: query columns, warps, ring depth in steps, blocks per SM."""

    columns: int
    warps: int
    stages: int
    places: int


def column_tile(head_size: int, columns: int) -> int:
    """Query columns that one pass over the pages serves, of `columns` wanted."""
    return 4 if columns <= 4 else 8 if columns <= 8 or head_size > 128 else 16


@cache
def tune(layout: PageLayout, columns: int) -> DecodeTuning:
    """The measured choice for `columns` query columns (query tokens x query heads per KV head)."""
    check(layout)
    size, bits = layout.head_size, layout.key_bits + layout.value_bits
    tile = column_tile(size, columns)
    wide = size > 128 or max(layout.key_bits, layout.value_bits) == 16
    warps = 2 if bits > 20 or (tile == 16 and size > 64) else 4
    resident = 8 if wide or (tile == 16 and size > 64) else 12 if tile == 16 or bits >= 12 else 16
    places = resident // warps
    while places > 1 and _stages(layout, tile, warps, places) < 2:
        places -= 1
    stages = min(2, _stages(layout, tile, warps, places))
    if stages < 1:
        raise ValueError(f"a tile of {layout} does not fit in shared memory")
    return DecodeTuning(tile, warps, stages, places)


@cache
def decode(layout: PageLayout, tuning: DecodeTuning, *, rotate: bool, softcap: bool, element: Element) -> Variant:
    """Attention of up to 16 query columns per KV head."""
    t = tuning
    shape = f"{_page(layout)}, {t.columns}, {t.warps}, {t.stages}, {t.places}"
    flags = ", ".join(map(_flag, (rotate, softcap)))
    template = f"Decode<jt::Shape<{shape}, {flags}, jt::Type::{element}>>"
    return Variant("decode.cuh", template, "AttentionArgs", t.places)


@cache
def plan(columns: int) -> Variant:
    """The cut of a step's work for tiles of `columns` query columns."""
    return Variant("plan.cuh", f"Plan<{columns}>", "PlanArgs", 1)


@cache
def quantise(*, group: int, row: bool, element: Element) -> Variant:
    """Rows to FP8: `group` elements per exponent, with a scale per row above them or without."""
    return Variant("fp8_quantise.cuh", f"Quantise<{group}, {_flag(row)}, jt::Type::{element}>", "QuantiseArgs", 4)


_BATCH = "2Q4i"
_ATTENTION = struct.Struct(f"<{_BATCH}11Q4q4i2f")
_PLAN = struct.Struct(f"<{_BATCH}2Q2i")
ENTRY_BYTES, HEADER_BYTES = 64, 16
_STORE = struct.Struct("<6Q6q4i")
_UNPACK = struct.Struct("<8Q2q6i")
_QUANTISE = struct.Struct("<5Qq4i")


Batch = tuple[int, int, int, int, int, int]
"""Addresses of query_start_loc and seq_lens; sequences, KV heads, query heads per KV head, window."""


def attention_arguments(
    batch: Batch, pointers: tuple[int, ...], strides: tuple[int, ...], rest: tuple[float, ...]
) -> bytes:
    """AttentionArgs of attention.cuh: the batch, 11 pointers, 4 long strides, 4 integers, 2 floats."""
    return _ATTENTION.pack(*batch, *pointers, *strides, *rest)


def plan_arguments(batch: Batch, header: int, entries: int, places: int, min_steps: int) -> bytes:
    """PlanArgs of plan.cuh."""
    return _PLAN.pack(*batch, header, entries, places, min_steps)


def store_arguments(pointers: tuple[int, ...], strides: tuple[int, ...], rest: tuple[int, ...]) -> bytes:
    """StoreArgs of store.cuh: 6 pointers, 6 strides, tokens, heads, block size."""
    return _STORE.pack(*pointers, *strides, *rest, 0)


def unpack_arguments(pointers: tuple[int, ...], strides: tuple[int, ...], rest: tuple[int, ...]) -> bytes:
    """UnpackArgs of unpack.cuh: 8 pointers, 2 strides, table stride, block size, sequences, heads, tokens."""
    return _UNPACK.pack(*pointers, *strides, *rest, 0)


def quantise_arguments(pointers: tuple[int, ...], stride: int, rest: tuple[int, ...]) -> bytes:
    """QuantiseArgs of fp8_quantise.cuh: 5 pointers, row stride, rows, columns, padded rows of promotions."""
    return _QUANTISE.pack(*pointers, stride, *rest, 0)


def _stages(layout: PageLayout, columns: int, warps: int, places: int) -> int:
    fixed = columns * (layout.head_size + 36) * 4 + RESERVED_PER_BLOCK + 512
    return (SHARED_PER_SM // places - fixed) // (warps * 2 * layout.tile_bytes)


def _page(layout: PageLayout) -> str:
    return f"{layout.head_size}, {layout.key_bits}, {layout.value_bits}, {layout.sink_tokens}"


def _flag(value: bool) -> str:
    return "true" if value else "false"
