"""Quantise-and-pack: error bounds, bit-equality with the reference, nothing written beside its place."""

import itertools

import pytest
import torch

from jettison.csrc import codec, ops, reference
from jettison.csrc.layout import SUPPORTED_BITS, PageLayout

FAMILIES = {
    "normal": lambda g: torch.randn(64, 80, generator=g),
    "offset": lambda g: torch.randn(64, 80, generator=g) + 37.0,
    "outlier": lambda g: torch.randn(64, 80, generator=g) * (1 + 99 * (torch.arange(80) == 7)),
    "tiny": lambda g: torch.randn(64, 80, generator=g) * 1e-6,
    "negative": lambda g: -torch.rand(64, 80, generator=g) - 1e-3,
    "denormal": lambda g: torch.randn(64, 80, generator=g) * 1e-39,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a1_error_is_at_most_half_a_step(family, bits):
    x = FAMILIES[family](torch.Generator().manual_seed(bits))
    codes, scale, zero = codec.quantise(x, bits)
    error = (x.double() - (codes.double() * scale.double()[:, None] + zero.double()[:, None])).abs()
    bound = scale.double()[:, None] * (0.5 + 1e-5) + x.abs().double() * 1e-6
    assert (error <= bound).all(), f"{family} {bits} bits: {(error - bound).max():.3e} above the bound"


def test_rotated_rows_at_2_bits_span_the_middle_of_their_range():
    """By hand: -8 to 8, of which three quarters are -6 to 6, so the levels are -6, -2, 2, 6."""
    row = torch.tensor([-8.0, -5.0, -3.0, 0.5, 3.5, 4.5, 7.0, 8.0])
    codes, scale, zero = codec.quantise(row, 2, codec.range_share(2, rotate=True))
    assert (float(scale), float(zero)) == (4.0, -6.0)
    assert codes.tolist() == [0, 0, 1, 2, 2, 3, 3, 3]
    assert [codec.range_share(b, rotate=r) for b in (8, 4, 2) for r in (True, False)] == [1, 1, 1, 1, 0.75, 1]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a1_constant_rows_are_exact(bits):
    x = torch.tensor([0.0, 1.5, -3.25, 40.0, -0.001])[:, None].bfloat16().float().expand(-1, 64)
    codes, scale, zero = codec.quantise(x, bits)
    read = codes * scale.float()[:, None] + zero.float()[:, None]
    assert torch.equal(read[:4], x[:4])
    assert (read[4] - x[4]).abs().max() <= scale[4].float() / 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a1_quantising_again_changes_nothing(bits):
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    codes, scale, zero = codec.quantise(x, bits)
    read = codes * scale.float()[:, None] + zero.float()[:, None]
    again = codec.quantise(read, bits)
    error = (again[0] * again[1].float()[:, None] + again[2].float()[:, None] - read).abs().max()
    assert error <= scale.float().max() * 2**-9, f"{bits} bits: drifted by {error:.2e}"


def test_a2_a_row_does_not_see_its_neighbours():
    """Per token and head: scaling one row by 100 leaves every other row's codes and scales as they were."""
    x = torch.randn(37, 3, 64, generator=torch.Generator().manual_seed(2))
    louder = x.clone()
    louder[11, 1] *= 100
    for bits in (2, 4, 8):
        for before, after in zip(codec.quantise(x, bits), codec.quantise(louder, bits), strict=True):
            changed = (before != after).reshape(37, 3, -1).any(-1).nonzero().tolist()
            assert changed in ([[11, 1]], []), f"{bits} bits: rows {changed} changed"


def test_hand_computed_row():
    """0..15 in 4 bits: scale 1, zero 0, codes are the values."""
    row = torch.arange(16.0).repeat(4)[None]
    codes, scale, zero = codec.quantise(row, 4)
    assert torch.equal(codes[0].float(), row[0])
    assert (scale.item(), zero.item()) == (1.0, 0.0)


@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 240, 256])
def test_kernel_writes_the_bytes_of_the_reference(batch_factory, head_size):
    for (key_bits, value_bits), sinks in itertools.product(itertools.product(SUPPORTED_BITS, repeat=2), (0, 4)):
        layout = PageLayout(head_size, key_bits, value_bits, sinks)
        for dtype, rotate in ((torch.bfloat16, True), (torch.float16, False), (torch.float32, True)):
            batch = batch_factory(layout, [1, 17, 50], [1, 1, 1], dtype=dtype, block_size=32, seed=head_size)
            expected = batch.storage.clone()
            pages = expected.as_strided(batch.cache.shape, batch.cache.stride(), batch.cache.storage_offset())
            generator = torch.Generator().manual_seed(3)
            options = {
                "rotate": rotate,
                "key_center": torch.randn(2, head_size, generator=generator),
                "key_scale": torch.rand(2, head_size, generator=generator) + 0.5,
            }
            batch.slots[5] = -1
            reference.kv_store(batch.key, batch.value, pages, batch.slots, layout, **options)
            ops.kv_store(batch.key, batch.value, batch.cache, batch.slots, layout, **options)
            wrong = (expected != batch.storage).sum().item()
            assert wrong == 0, f"{layout} {dtype} rotate={rotate}: {wrong} bytes differ (sentinels included)"


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_a_poisoned_row_reads_as_nan_and_alone(batch_factory, poison):
    layout = PageLayout(64, 4, 4)
    batch = batch_factory(layout, [40, 40], [1, 1], dtype=torch.float32)
    batch.key[5, 0, 3] = poison
    ops.kv_store(batch.key, batch.value, batch.cache, batch.slots, layout)
    keys, values = reference.unpack(batch.cache, batch.table[0].long(), layout, torch.bfloat16)
    bad = keys[:40].isnan().all(-1).nonzero().tolist()
    assert bad == [[5, 0]]
    assert values[:40].isfinite().all()


def test_strided_inputs_and_surplus_rows(batch_factory):
    """Keys and values may be slices of one QKV tensor; rows beyond slot_mapping are ignored."""
    layout = PageLayout(64, 8, 4)
    batch = batch_factory(layout, [33], [1])
    fused = torch.randn(40, 4, 64).bfloat16()
    key, value = fused[:, :2], fused[:, 2:]
    ops.kv_store(key, value, batch.cache, batch.slots, layout, rotate=True)
    plain = batch.cache.clone()
    ops.kv_store(key.contiguous()[:33], value.contiguous()[:33], batch.cache, batch.slots, layout, rotate=True)
    assert torch.equal(plain, batch.cache)


def test_nothing_to_store(batch_factory):
    layout = PageLayout(64, 4, 4)
    batch = batch_factory(layout, [16], [1])
    before = batch.storage.clone()
    ops.kv_store(batch.key[:0], batch.value[:0], batch.cache, batch.slots[:0], layout)
    ops.kv_store(batch.key, batch.value, batch.cache, torch.full((16,), -1), layout)
    assert torch.equal(before, batch.storage)
