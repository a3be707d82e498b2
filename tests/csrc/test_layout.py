"""The page format: every byte of a tile is used exactly once, and the hand-computed addresses hold."""

import itertools

import pytest
import torch

from jettison.csrc import codec, reference
from jettison.csrc.layout import SUPPORTED_BITS, TILE_TOKENS, PageLayout

HEAD_SIZES = range(32, 257, 16)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_every_byte_of_a_tile_has_one_owner(head_size):
    for key_bits, value_bits in itertools.product(SUPPORTED_BITS, SUPPORTED_BITS):
        layout = PageLayout(head_size, key_bits, value_bits)
        owners = torch.zeros(layout.tile_bytes, dtype=torch.int32)
        key_at, value_at, meta_at = reference._offsets(layout, torch.device("cpu"))
        for at in (key_at, value_at, meta_at):
            owners.index_add_(0, at.flatten(), torch.ones(at.numel(), dtype=torch.int32))
        assert owners.eq(1).all(), (
            f"D={head_size} K{key_bits}V{value_bits}: bytes {owners.ne(1).nonzero().flatten()[:8]}"
        )


def test_addresses_of_the_probed_format():
    """The index maps of the measured head-size-128 kernel, written down by hand."""
    four, two, eight = PageLayout(128, 4, 4), PageLayout(128, 2, 2), PageLayout(128, 8, 8)
    assert [four.key_offset(3, 17), two.key_offset(3, 17), eight.key_offset(3, 70)] == [209, 113, 1024 + 3 * 64 + 6]
    # token 5: half 0, pair 2, odd; word 9 = channel group 2, word 1
    assert four.value_offset(5, 9) - four.key_bytes == (2 * 4 + 2) * 16 + 4 + 2
    # token 12: half 1, pair 2, even; word 21 = group 2, plane 1, column 1
    assert eight.value_offset(12, 21) - eight.key_bytes == 1024 + 512 + (2 * 4 + 2) * 16 + 4
    assert four.meta_offset(9) - four.key_bytes - four.value_bytes == 3 * 8
    assert (four.tile_bytes, two.tile_bytes, eight.tile_bytes) == (16 * 136, 16 * 72, 16 * 264)


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "sinks", "expected"),
    [(16, 16, 0, 256), (8, 8, 0, 136), (8, 4, 0, 104), (4, 4, 0, 72), (2, 2, 0, 40), (16, 4, 0, 164), (4, 4, 4, 80)],
)
def test_a1_bytes_per_token(key_bits, value_bits, sinks, expected):
    assert PageLayout(64, key_bits, value_bits, sinks).bytes_per_token(128) == expected


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((40, 8, 8), "head size 40"), ((16, 8, 8), "head size 16"), ((272, 8, 8), "head size 272"),
     ((64, 3, 8), "key_bits 3"), ((64, 8, 32), "value_bits 32"), ((64, 8, 8, 17), "sink_tokens 17"),
     ((64, 8, 8, -1), "sink_tokens -1")],
)  # fmt: skip
def test_unsupported_layouts_are_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        PageLayout(*arguments)


@pytest.mark.parametrize("block_size", [0, 8, 24, -16])
def test_block_sizes_that_cut_tiles_are_refused(block_size):
    with pytest.raises(ValueError, match=f"block size {block_size}"):
        PageLayout(64, 4, 4).bytes_per_token(block_size)


def test_packed_unpacked_packed_is_the_identity_on_every_byte_pair():
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256)).to(torch.uint8)
    for bits in (2, 4, 8):
        codes = codec.unpack_codes(pairs, bits)
        assert torch.equal(codec.pack_codes(codes.to(torch.uint8), bits), pairs), f"{bits} bits"
        assert codes.max() == 2**bits - 1
    assert TILE_TOKENS == 16
