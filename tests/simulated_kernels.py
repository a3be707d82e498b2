"""The CUDA kernels on the host: each variant is compiled with simt/simt.h and its blocks are run one after another."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jettison.csrc.cuda import compiler, variants
from jettison.csrc.cuda.variants import Variant
from jettison.csrc.layout import PageLayout

SIMT = Path(__file__).parent / "csrc" / "simt"
BUILD = Path(tempfile.gettempdir()) / f"jettison-simulated-{os.getuid()}"
ELEMENTS: dict[torch.dtype, variants.Element] = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@cache
def _headers() -> str:
    files = sorted([*compiler.FOLDER.glob("*.cuh"), *SIMT.glob("*.h")])
    return "".join(file.read_text() for file in files)


@cache
def library(variant: Variant) -> Any:
    """The variant as a host library; compiled once per content of the sources."""
    name = hashlib.sha256((variant.source() + _headers()).encode()).hexdigest()[:24]
    path = BUILD / f"{name}.so"
    if not path.exists():
        BUILD.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            source, built = Path(folder) / "variant.cpp", Path(folder) / "variant.so"
            source.write_text(variant.source())
            flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-w", "-ffp-contract=off"]
            include = [f"-I{compiler.FOLDER}", f"-I{SIMT}"]
            subprocess.run(["g++", *flags, *include, str(source), "-o", str(built)], check=True)
            os.replace(built, path)
    return ctypes.CDLL(str(path))


def number(variant: Variant, name: str) -> int:
    """A constant of the compiled variant: threads, shared_bytes or argument_bytes."""
    return ctypes.c_int.in_dll(library(variant), name).value


def run(variant: Variant, blocks: int, arguments: bytes) -> None:
    """Run all blocks to their end."""
    assert number(variant, "argument_bytes") == len(arguments), f"{variant.arguments} is laid out differently"
    library(variant).kernel(ctypes.create_string_buffer(arguments, len(arguments)), blocks)


def at(tensor: Tensor | None) -> int:
    """Address, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def kv_store(
    key: Tensor, value: Tensor, cache: Tensor, slots: Tensor, layout: PageLayout, *,
    rotate: bool, key_center: Tensor | None, key_scale: Tensor | None,
) -> None:  # fmt: skip
    """As `jettison.csrc.cuda.launch.kv_store`."""
    variant = variants.store(layout, rotate=rotate, element=ELEMENTS[key.dtype])
    arguments = variants.store_arguments(
        (at(key), at(value), at(cache), at(slots), at(key_center), at(key_scale)),
        (*cache.stride()[:2], *key.stride()[:2], *value.stride()[:2]),
        (len(slots), key.shape[1], cache.shape[2]),
    )
    run(variant, -(-2 * len(slots) * key.shape[1] * 32 // number(variant, "threads")), arguments)


def kv_unpack(
    cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, key_out: Tensor, value_out: Tensor, layout: PageLayout, *,
    rotate: bool, key_center: Tensor | None, key_scale: Tensor | None, starts: Tensor | None,
) -> None:  # fmt: skip
    """As `jettison.csrc.cuda.launch.kv_unpack`."""
    variant = variants.unpack(layout, rotate=rotate, element=ELEMENTS[key_out.dtype])
    tokens, heads, _ = key_out.shape
    arguments = variants.unpack_arguments(
        (
            at(cache),
            at(block_table),
            at(starts),
            at(cu_seqlens),
            at(key_out),
            at(value_out),
            at(key_center),
            at(key_scale),
        ),
        cache.stride()[:2],
        (block_table.stride(0), cache.shape[2], len(cu_seqlens) - 1, heads, tokens),
    )
    run(variant, -(-tokens * 32 // number(variant, "threads")), arguments)


def decode(
    query: Tensor, cache: Tensor, output: Tensor, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor,
    layout: PageLayout, *, scale: float, rotate: bool, key_scale: Tensor | None, window: int, softcap: float,
    sinks: Tensor | None, max_query_len: int, blocks: int, min_steps: int = 4,
) -> None:  # fmt: skip
    """As `jettison.csrc.cuda.launch.decode`, by `blocks` blocks; the counters must be zero again at its end."""
    heads, size = cache.shape[1], layout.head_size
    group = query.shape[1] // heads
    tuning = variants.tune(layout, max_query_len * group)
    partial, moments = (torch.full((2 * blocks * tuning.columns * n,), torch.nan) for n in (size, 2))
    counters = torch.zeros(blocks, dtype=torch.int32)
    header, entries = torch.zeros(2, dtype=torch.int64), torch.zeros(blocks * 8, dtype=torch.int64)
    batch = (at(query_start_loc), at(seq_lens), len(seq_lens), heads, group, window)
    run(variants.plan(tuning.columns), 1, variants.plan_arguments(batch, at(header), at(entries), blocks, min_steps))
    variant = variants.decode(layout, tuning, rotate=rotate, softcap=softcap > 0, element=ELEMENTS[query.dtype])
    arguments = variants.attention_arguments(
        batch,
        (at(cache), at(query), at(output), at(block_table), at(key_scale), at(sinks), at(header), at(entries),
         at(partial), at(moments), at(counters)),
        (*cache.stride()[:2], query.stride(0), output.stride(0)),
        (query.stride(1), output.stride(1), block_table.stride(0), cache.shape[2] // 16, scale, softcap),
    )  # fmt: skip
    run(variant, blocks, arguments)
    assert not counters.any(), "a counter was left above zero"
