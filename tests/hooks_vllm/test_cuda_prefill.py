"""Prefill on CUDA with its kernels replaced by slow ones: what is handed to them gives the attention of the pages."""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from jettison.csrc.layout import PageLayout
from jettison.csrc.ops import kv_store, packed_attention
from jettison.hooks.vllm.cuda_metadata import to_device
from jettison.hooks.vllm.cuda_prefill import Prefill, pages_attention
from jettison.hooks.vllm.kv_format import LayerFormat
from jettison.hooks.vllm.prefill_plan import count_decodes, plan_prefill

HEADS, KV_HEADS, SIZE, BLOCK, PAGES = 4, 2, 64, 16, 14
SCALE = SIZE**-0.5


def flash(window: int) -> Any:
    """What FlashAttention promises for variable lengths, in float64: causal, aligned to the last key."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int,
    ) -> None:  # fmt: skip
        queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert (queries[-1], keys[-1]) == (q.shape[0], k.shape[0]) == (out.shape[0], v.shape[0])
        for i in range(len(queries) - 1):
            rows, columns = slice(*queries[i : i + 2]), slice(*keys[i : i + 2])
            count, length = queries[i + 1] - queries[i], keys[i + 1] - keys[i]
            assert count <= max_seqlen_q
            assert length <= max_seqlen_k
            here = torch.arange(count)[:, None] + length - count
            there = torch.arange(length)[None]
            seen = (there <= here) & ((there > here - window) if window > 0 else True)
            group = HEADS // KV_HEADS
            ks, vs = (x[columns].double().repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[rows].double(), ks) * SCALE
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            out[rows] = torch.einsum("hqk,khd->qhd", weights, vs).to(out.dtype)

    return attend


class Batch:
    """Sequences with and without history, all of whose tokens are stored, in shuffled pages."""

    def __init__(self, page: LayerFormat, seed: int) -> None:
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        queries = [1, 1, *sorted(rng.randint(2, 40) for _ in range(5))]
        histories = [rng.choice((0, 0, rng.randint(1, 150))) for _ in queries]
        self.bounds = [0, *accumulate(queries)]
        self.lengths = [q + h for q, h in zip(queries, histories, strict=True)]
        count = len(queries)
        self.block_table = torch.randperm(count * PAGES, generator=generator).view(count, PAGES).int()
        layout = page.layout
        self.cache = torch.zeros(count * PAGES, KV_HEADS, BLOCK, layout.bytes_per_token(BLOCK), dtype=torch.uint8)
        new = []
        for row, length in enumerate(self.lengths):
            pair = torch.randn(2, length, KV_HEADS, SIZE, generator=generator)
            tokens = torch.arange(length)
            slots = self.block_table[row].long()[tokens // BLOCK] * BLOCK + tokens % BLOCK
            kv_store(
                *pair, self.cache, slots, layout, rotate=page.rotate, key_center=page.key_center,
                key_scale=page.key_scale,
            )  # fmt: skip
            new.append(pair[:, length - queries[row] :])
        self.key, self.value = torch.cat(new, 1)
        self.query = torch.randn(self.bounds[-1], HEADS, SIZE, generator=generator)

    def prefill(self, page: LayerFormat, window: int, *, read_fresh: bool, capacity: int, short: int = 0) -> Tensor:
        first = count_decodes(self.bounds, 1)
        assert first == 2
        runs = plan_prefill(
            self.bounds, self.lengths, first, window=window, capacity=capacity, read_fresh=read_fresh, short=short
        )
        room = torch.full((2, capacity, KV_HEADS, SIZE), float("nan"))
        output = torch.full_like(self.query, 7.0)
        pages = pages_attention(page, scale=SCALE, window=window, softcap=0.0, sinks=None, workspace=lambda: None)
        serve = Prefill(page, flash(window), pages, lambda: (room[0], room[1]))
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        serve(self.query, self.key, self.value, self.cache, output, to_device(runs, self.block_table, lengths))
        assert (output[:2] == 7.0).all(), "rows that decode are not prefill's"
        return output[2:]

    def pages(self, page: LayerFormat, window: int) -> Tensor:
        output = torch.empty_like(self.query)
        bounds, lengths = (torch.tensor(x, dtype=torch.int32) for x in (self.bounds, self.lengths))
        packed_attention(
            self.query, self.cache, output, bounds, lengths, self.block_table, page.layout, scale=SCALE,
            rotate=page.rotate, key_scale=page.key_scale, window=window,
        )  # fmt: skip
        return output[2:]


def page(key_bits: int, value_bits: int, *, rotate: bool, channels: bool, sink_tokens: int = 0) -> LayerFormat:
    generator = torch.Generator().manual_seed(9)
    center = torch.randn(KV_HEADS, SIZE, generator=generator) if channels else None
    scale = torch.rand(KV_HEADS, SIZE, generator=generator) + 0.5 if channels else None
    return LayerFormat(PageLayout(SIZE, key_bits, value_bits, sink_tokens), rotate, center, scale)


@pytest.mark.parametrize("window", [-1, 24])
@pytest.mark.parametrize("capacity", [200, 1000])
@pytest.mark.parametrize(
    "what",
    [
        page(16, 16, rotate=False, channels=False),
        page(8, 8, rotate=True, channels=True),
        page(4, 2, rotate=True, channels=True, sink_tokens=4),
    ],
    ids=["k16v16", "k8v8", "k4v2s4"],
)
def test_reading_back_is_attention_over_the_pages(what: LayerFormat, window: int, capacity: int) -> None:
    """The CPU op quantises queries for its integer products, so both are compared on the scale of the values."""
    for seed in range(4):
        batch = Batch(what, seed)
        found = batch.prefill(what, window, read_fresh=False, capacity=capacity)
        expected = batch.pages(what, window)
        worst = (found - expected).abs().max().item()
        limit = 0.02 if what.layout.key_bits == 16 else 0.05
        assert worst < limit, f"seed {seed}: off by {worst}"


@pytest.mark.parametrize("window", [-1, 24])
def test_short_runs_are_served_from_the_pages(window: int) -> None:
    what = page(4, 4, rotate=True, channels=True)
    for seed in range(4):
        batch = Batch(what, seed)
        found = batch.prefill(what, window, read_fresh=False, capacity=1000, short=40)
        assert torch.equal(found, batch.pages(what, window)), f"seed {seed}"


@pytest.mark.parametrize("window", [-1, 24])
def test_new_keys_are_used_as_they_are(window: int) -> None:
    """Rows without history: exact attention over the new keys, whatever the pages hold of them."""
    what = page(2, 2, rotate=True, channels=True)
    for seed in range(4):
        batch = Batch(what, seed)
        found = batch.prefill(what, window, read_fresh=True, capacity=1000)
        for row in range(2, len(batch.lengths)):
            begin, end = batch.bounds[row : row + 2]
            if batch.lengths[row] != end - begin:
                continue
            exact = torch.empty(end - begin, HEADS, SIZE)
            bounds = torch.tensor([0, end - begin])
            flash(window)(
                batch.query[begin:end], batch.key[begin:end], batch.value[begin:end], exact, bounds, bounds,
                end - begin, end - begin,
            )  # fmt: skip
            assert torch.equal(found[begin - 2 : end - 2], exact), f"seed {seed}, row {row}"
