"""Random packed caches for the kernel tests."""

from dataclasses import dataclass

import pytest
import torch

from jettison.csrc.layout import PageLayout


@dataclass
class Batch:
    """Sequences in a shuffled paged cache, with sentinel bytes around and between the pages."""

    layout: PageLayout
    key: torch.Tensor
    value: torch.Tensor
    query: torch.Tensor
    cache: torch.Tensor
    storage: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    table: torch.Tensor

    @property
    def scale(self) -> float:
        return self.layout.head_size**-0.5


SENTINEL = 0xA5


def make_batch(
    layout: PageLayout,
    lengths: list[int],
    queries: list[int],
    *,
    kv_heads: int = 2,
    group: int = 3,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    spread: float = 1.0,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * spread).to(dtype)

    pages = [-(-n // block_size) for n in lengths]
    total = sum(pages) + 2
    order = torch.randperm(total, generator=generator).tolist()
    table = torch.zeros(len(lengths), max([*pages, 1]), dtype=torch.int32)
    slots = []
    for i, (n, count) in enumerate(zip(lengths, pages, strict=True)):
        table[i, :count] = torch.tensor(order[:count], dtype=torch.int32)
        order = order[count:]
        slots += [int(table[i, t // block_size]) * block_size + t % block_size for t in range(n)]
    content = layout.bytes_per_token(block_size)
    page, gap = block_size * content, 64
    storage = torch.full((total * kv_heads * (page + gap) + gap,), SENTINEL, dtype=torch.uint8)
    cache = storage.as_strided(
        (total, kv_heads, block_size, content), (kv_heads * (page + gap), page + gap, content, 1), gap
    )
    tokens, size = sum(lengths), layout.head_size
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    return Batch(
        layout,
        key=normal(tokens, kv_heads, size),
        value=normal(tokens, kv_heads, size),
        query=normal(sum(queries), kv_heads * group, size),
        cache=cache,
        storage=storage,
        slots=torch.tensor(slots, dtype=torch.int64),
        query_start=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        table=table,
    )


@pytest.fixture(scope="session")
def batch_factory():
    return make_batch
