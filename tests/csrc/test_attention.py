"""Attention over packed pages against float64, and the invariances that serving relies on."""

import itertools

import pytest
import torch

from jettison.csrc import ops, reference
from jettison.csrc.layout import SUPPORTED_BITS, PageLayout

# Relative error in the 2-norm against float64 on the same packed data: the rounding of the output's type, plus 15-bit
# queries and weights below 16 bits (2**-15 of the largest element).
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 1.5e-4}


def attend(batch, **options):
    out = torch.full_like(batch.query, 7.0)
    scale = options.pop("scale", batch.scale)
    ops.packed_attention(
        batch.query, batch.cache, out, batch.query_start, batch.seq_lens, batch.table, batch.layout,
        scale=scale, **options,
    )  # fmt: skip
    return out


def exact(batch, **options):
    out = torch.zeros(batch.query.shape, dtype=torch.float64)
    reference.packed_attention(
        batch.query, batch.cache, out, batch.query_start, batch.seq_lens, batch.table, batch.layout,
        scale=batch.scale, compute=torch.float64, **options,
    )  # fmt: skip
    return out


def stored(batch, **options):
    ops.kv_store(batch.key, batch.value, batch.cache, batch.slots, batch.layout, **options)
    return batch


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("head_size", [32, 48, 64, 80, 96, 112, 128, 160, 192, 256])
def test_every_pair_of_bits(batch_factory, head_size):
    for (key_bits, value_bits), (sinks, rotate) in itertools.product(
        itertools.product(SUPPORTED_BITS, repeat=2), ((0, False), (4, True))
    ):
        layout = PageLayout(head_size, key_bits, value_bits, sinks)
        scale = torch.rand(2, head_size, generator=torch.Generator().manual_seed(1)) + 0.5 if rotate else None
        batch = stored(
            batch_factory(layout, [1, 16, 17, 130], [1, 16, 5, 1], seed=head_size), rotate=rotate, key_scale=scale
        )
        options = {"rotate": rotate, "key_scale": scale}
        error = relative(attend(batch, **options), exact(batch, **options))
        assert error < TOLERANCE[torch.bfloat16], f"{layout} rotate={rotate}: relative error {error:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 16])
def test_groups_of_query_heads(batch_factory, group, dtype):
    for layout in (PageLayout(64, 8, 4), PageLayout(128, 4, 2), PageLayout(64, 16, 16)):
        batch = stored(batch_factory(layout, [40, 257], [3, 1], group=group, dtype=dtype, seed=group))
        error = relative(attend(batch), exact(batch))
        assert error < TOLERANCE[dtype], f"{layout} group {group} {dtype}: relative error {error:.2e}"


@pytest.mark.parametrize("block_size", [16, 32, 48, 128])
def test_lengths_around_every_boundary(batch_factory, block_size):
    lengths = [1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 1023, 1024, 1025, 2049, 4097]
    for layout in (PageLayout(64, 8, 4), PageLayout(64, 4, 4, 4)):
        queries = [min(n, 1 + i % 3) for i, n in enumerate(lengths)]
        batch = stored(batch_factory(layout, lengths, queries, block_size=block_size, kv_heads=1, group=2))
        out, expected = attend(batch), exact(batch)
        for i, n in enumerate(lengths):
            rows = slice(batch.query_start[i], batch.query_start[i + 1])
            error = relative(out[rows], expected[rows])
            assert error < TOLERANCE[torch.bfloat16], f"{layout} block {block_size} length {n}: error {error:.2e}"


@pytest.mark.parametrize("window", [1, 5, 16, 100, 128, 1000])
def test_sliding_window(batch_factory, window):
    for layout in (PageLayout(64, 8, 4), PageLayout(64, 16, 16), PageLayout(64, 4, 2, 4)):
        batch = stored(batch_factory(layout, [7, 129, 1500], [7, 40, 3]))
        error = relative(attend(batch, window=window), exact(batch, window=window))
        assert error < TOLERANCE[torch.bfloat16], f"{layout} window {window}: relative error {error:.2e}"


@pytest.mark.parametrize("layout", [PageLayout(64, 8, 4), PageLayout(64, 16, 16)], ids=str)
def test_soft_cap_and_attention_sinks(batch_factory, layout):
    batch = stored(batch_factory(layout, [9, 300], [9, 2], spread=3.0))
    sinks = torch.randn(6, generator=torch.Generator().manual_seed(5)) * 3
    for options in ({"softcap": 5.0}, {"sinks": sinks}, {"softcap": 30.0, "sinks": sinks, "window": 64}):
        expected = torch.zeros(batch.query.shape, dtype=torch.float64)
        reference.packed_attention(
            batch.query, batch.cache, expected, batch.query_start, batch.seq_lens, batch.table, layout,
            scale=batch.scale, compute=torch.float64, **options,
        )  # fmt: skip
        error = relative(attend(batch, **options), expected)
        assert error < TOLERANCE[torch.bfloat16], f"{layout} {sorted(options)}: relative error {error:.2e}"


def test_a11_identity_format_is_plain_attention(batch_factory):
    """16-bit keys and values: what torch computes from the tensors that were never packed."""
    batch = stored(batch_factory(PageLayout(64, 16, 16), [200], [200]), rotate=True)
    q, k, v = (x.double().transpose(0, 1)[None] for x in (batch.query, batch.key, batch.value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    error = relative(attend(batch, rotate=True), expected[0].transpose(0, 1))
    assert error < TOLERANCE[torch.bfloat16], f"relative error {error:.2e}"


def test_codec_options_change_nothing_but_the_quantisation_error(batch_factory):
    """Rotation, centring and equalisation are exact identities of attention: at 8 bits the error stays small."""
    plain = batch_factory(PageLayout(64, 16, 16), [300], [300], seed=9)
    expected = attend(stored(plain)).double()
    generator = torch.Generator().manual_seed(2)
    center, scale = torch.randn(2, 64, generator=generator), torch.rand(2, 64, generator=generator) + 0.5
    coded = batch_factory(PageLayout(64, 8, 8), [300], [300], seed=9)
    stored(coded, rotate=True, key_center=center, key_scale=scale)
    error = relative(attend(coded, rotate=True, key_scale=scale), expected)
    assert error < 2e-2, f"relative error {error:.2e}"


@pytest.mark.parametrize("layout", [PageLayout(64, 8, 4), PageLayout(64, 4, 4, 4), PageLayout(64, 16, 8)], ids=str)
def test_a_token_depends_on_its_prefix_alone(batch_factory, layout):
    """Bit for bit: whole prompt, chunks of any size, one token at a time, alone or beside other sequences."""
    length = 1100
    whole = stored(batch_factory(layout, [length, 77], [length, 77], kv_heads=1), rotate=True)
    expected = attend(whole, rotate=True)[:length]
    for cuts in ([0, 1, 8, 530, 1100], [0, 1024, 1099, 1100]):
        pieces = []
        for start, stop in itertools.pairwise(cuts):
            out = torch.zeros_like(whole.query[start:stop])
            ops.packed_attention(
                whole.query[start:stop], whole.cache, out,
                torch.tensor([0, stop - start], dtype=torch.int32), torch.tensor([stop], dtype=torch.int32),
                whole.table[:1], layout, scale=whole.scale, rotate=True,
            )  # fmt: skip
            pieces.append(out)
        assert torch.equal(torch.cat(pieces), expected), f"{layout} cut at {cuts}"


def test_number_of_threads_does_not_matter(batch_factory):
    batch = stored(batch_factory(PageLayout(64, 8, 4), [3000, 5], [1, 5]))
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(attend(batch))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("magnitude", [0.0, 1e-44, 1e-36, 1e30])
def test_queries_of_any_magnitude(batch_factory, magnitude):
    """Queries too small for a reciprocal attend evenly, like zeros; huge ones pick the best key."""
    batch = stored(batch_factory(PageLayout(64, 8, 4), [200], [2], dtype=torch.float32))
    batch.query.mul_(magnitude)
    error = relative(attend(batch), exact(batch))
    assert error < TOLERANCE[torch.float32], f"queries of {magnitude}: relative error {error:.2e}"


@pytest.mark.parametrize("side", ["key", "value"])
def test_nan_stays_in_its_sequence_and_after_its_token(batch_factory, side):
    layout = PageLayout(64, 8, 4)
    batch = batch_factory(layout, [60, 60], [60, 60])
    clean = attend(stored(batch))
    getattr(batch, side)[30, 0, 0] = float("nan")
    poisoned = attend(stored(batch))
    touched = (clean != poisoned).any(-1).any(-1).nonzero().flatten().tolist()
    assert touched == list(range(30, 60)), f"{side}: tokens {touched}"
    assert poisoned[30:60, :3].isnan().all()
    assert torch.equal(poisoned[30:60, 3:], clean[30:60, 3:])


@pytest.mark.parametrize("garbage", [0xFF, 0x7C])  # NaNs of fp16 and bf16, and fp16 infinities
@pytest.mark.parametrize("window", [-1, 33, 64])
def test_slots_outside_length_and_window_are_never_seen(batch_factory, window, garbage):
    """Bit for bit the same with clean and with garbage pages, also where pages before the window were given away."""
    for (key_bits, value_bits), length, rows in itertools.product(
        ((16, 16), (8, 16), (16, 8), (8, 4), (2, 16)), (5, 37, 150, 700), (1, 20)
    ):
        layout = PageLayout(64, key_bits, value_bits)
        batch = batch_factory(layout, [length], [min(rows, length)], block_size=32)
        results = []
        for fill in (0, garbage):
            batch.storage.fill_(fill)
            stored(batch)
            first = max(0, length - min(rows, length) - window + 1) // 32 if window > 0 else 0
            batch.cache[batch.table[0, :first].long()] = fill
            results.append(attend(batch, window=window))
        assert torch.equal(*results), f"{layout} length {length} rows {rows} window {window}"


def test_empty_batch_and_sequences_without_queries(batch_factory):
    layout = PageLayout(64, 4, 4)
    batch = stored(batch_factory(layout, [20, 30], [0, 2]))
    out = attend(batch)
    assert relative(out, exact(batch)) < TOLERANCE[torch.bfloat16]
    none = torch.zeros(0, 6, 64, dtype=torch.bfloat16)
    ops.packed_attention(
        none, batch.cache, none.clone(), torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32),
        batch.table[:0], layout, scale=1.0,
    )  # fmt: skip


def test_output_rows_beyond_the_queries_are_untouched(batch_factory):
    batch = stored(batch_factory(PageLayout(64, 8, 8), [20], [3]))
    out = torch.full((5, 6, 64), 7.0, dtype=torch.bfloat16)
    ops.packed_attention(
        batch.query, batch.cache, out, batch.query_start, batch.seq_lens, batch.table, batch.layout, scale=1.0
    )
    assert (out[3:] == 7).all()
    assert (out[:3] != 7).any()
