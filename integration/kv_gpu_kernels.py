"""The CUDA kernels alone: bytes of packed pages per second while decoding, and the writer of a step's tokens.

`python kv_gpu_kernels.py jettison-4.25` prints lines as `kv_gpu_engine.py` does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from jettison.csrc.layout import PageLayout
from jettison.csrc.ops import attention_plan, attention_workspace, kv_store, packed_attention
from kv_gpu_engine import LLAMA_8B, PACKED, report

COPY_BYTES_PER_S = 4.27e12
"""Device copy of an H200, measured; shares are of this."""

SEQUENCES, CONTEXT, BLOCK = 64, 8192, 128
HEADS, KV_HEADS, HEAD_SIZE = (int(str(LLAMA_8B[k])) for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
LAYERS = int(str(LLAMA_8B["num_hidden_layers"]))


class Kernels:
    """One layer's cache of `SEQUENCES` sequences in shuffled pages, filled through the writer."""

    def __init__(self, key_bits: int, value_bits: int) -> None:
        self.device = torch.device("cuda")
        self.layout = PageLayout(HEAD_SIZE, key_bits, value_bits)
        pages = CONTEXT // BLOCK
        generator = torch.Generator(self.device).manual_seed(3)
        order = torch.randperm(SEQUENCES * pages, generator=generator, device=self.device)
        self.block_table = order.view(SEQUENCES, pages).int()
        shape = (SEQUENCES * pages, KV_HEADS, BLOCK, self.layout.bytes_per_token(BLOCK))
        self.cache = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        self.scale = torch.ones(KV_HEADS, HEAD_SIZE, device=self.device)
        self.new = torch.randn(
            2, CONTEXT, KV_HEADS, HEAD_SIZE, generator=generator, device=self.device, dtype=torch.bfloat16
        )
        for sequence in range(SEQUENCES):
            self.store(self.slots(sequence))
        self.query = torch.randn(
            SEQUENCES, HEADS, HEAD_SIZE, generator=generator, device=self.device, dtype=torch.bfloat16
        )
        self.workspace = attention_workspace(HEADS, KV_HEADS, HEAD_SIZE, 1, self.device)
        self.starts = torch.arange(SEQUENCES + 1, dtype=torch.int32, device=self.device)

    def slots(self, sequence: int) -> torch.Tensor:
        """Where every token of a sequence is stored."""
        tokens = torch.arange(CONTEXT, device=self.device)
        return self.block_table[sequence].long()[tokens // BLOCK] * BLOCK + tokens % BLOCK

    def store(self, slots: torch.Tensor) -> None:
        """Write the first `len(slots)` of the new tokens."""
        kv_store(*self.new, self.cache, slots, self.layout, rotate=True, key_center=self.scale, key_scale=self.scale)

    def read_seconds(self, lengths: torch.Tensor) -> float:
        """Seconds of one decode step of this layer; the shares of the step are computed once for all layers."""
        output = torch.empty_like(self.query)
        attention_plan(
            self.starts, lengths, self.layout, num_heads=HEADS, num_kv_heads=KV_HEADS, max_query_len=1,
            workspace=self.workspace,
        )  # fmt: skip

        def step() -> None:
            packed_attention(
                self.query, self.cache, output, self.starts, lengths, self.block_table, self.layout,
                scale=HEAD_SIZE**-0.5, rotate=True, key_scale=self.scale, max_query_len=1, workspace=self.workspace,
                planned=True,
            )  # fmt: skip

        return seconds(step)

    def write_seconds(self) -> float:
        """Seconds of writing one new token of every sequence."""
        slots = torch.stack([self.slots(sequence)[-1] for sequence in range(SEQUENCES)])
        return seconds(lambda: self.store(slots))

    def bytes(self, lengths: torch.Tensor) -> int:
        """Packed bytes of these tokens."""
        return int(lengths.sum()) * KV_HEADS * self.layout.bytes_per_token(BLOCK)


def seconds(call: Callable[[], None], repeats: int = 50) -> float:
    """Seconds of one call inside a CUDA graph of `repeats`, the best of five replays."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    best = float("inf")
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3 / repeats)
    return best


def main(system: str) -> None:
    """Measure the layouts of `system`; layers take them in turn, so their bytes and seconds add up."""
    layers = [Kernels(*pair) for pair in PACKED[system]]
    generator = torch.Generator().manual_seed(5)
    equal = torch.full((SEQUENCES,), CONTEXT, dtype=torch.int32)
    uneven = torch.randint(512, CONTEXT + 1, (SEQUENCES,), generator=generator, dtype=torch.int32)
    for case, lengths in (("64x8192", equal), ("64x512..8192", uneven)):
        there = lengths.to("cuda")
        moved = sum(layer.bytes(there) for layer in layers)
        taken = sum(layer.read_seconds(there) for layer in layers)
        report(case, "attention_bandwidth_share", moved / taken / COPY_BYTES_PER_S, "ratio")
    writer = sum(layer.write_seconds() for layer in layers) * LAYERS / len(layers)
    report("64x8192", "writer_ms_per_step", 1e3 * writer, "ms")


if __name__ == "__main__":
    main(sys.argv[1])
