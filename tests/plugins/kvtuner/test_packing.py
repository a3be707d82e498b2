import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jettison.csrc.codec import quantise
from jettison.plugins.kvtuner.packing import STEP, PackedRows, Rows, pack, unpack


def test_the_first_code_is_in_the_low_bits():
    assert pack(torch.tensor([1, 2, 3, 0, 0, 0, 0, 2], dtype=torch.uint8), 2).tolist() == [0b00111001, 0b10000000]
    assert pack(torch.tensor([1, 15], dtype=torch.uint8), 4).tolist() == [0xF1]


@given(st.sampled_from([8, 4, 2]), st.lists(st.integers(0, 255), min_size=1, max_size=40), st.integers(1, 3))
def test_packing_is_undone_and_takes_the_bits_it_says(bits, values, rows):
    codes = torch.tensor(values * 4).remainder(2**bits).to(torch.uint8).expand(rows, -1)
    packed = pack(codes, bits)
    assert packed.shape == (rows, len(values) * 4 * bits // 8), (bits, rows)
    assert torch.equal(unpack(packed, bits), codes), (bits, values)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_a1_rows_read_back_within_half_a_step(bits, group, magnitude):
    torch.manual_seed(bits)
    x = torch.randn(2, 3, 70, 64) * magnitude
    store = PackedRows(bits, group)
    store.append(x[:, :, :33])
    store.append(x[:, :, 33:])
    back = store.read()
    pieces = x.unflatten(-1, (-1, group or 64))
    _, scale, _ = quantise(pieces, bits)
    error = (back.unflatten(-1, (-1, group or 64)) - pieces).abs().amax(-1)
    # NOTES: reading back is one product and one sum in float32, each rounded once.
    allowed = scale.float() * 0.5 + pieces.abs().amax(-1) * 2**-22
    assert (error <= allowed).all(), f"{bits} bits, group {group}, x {magnitude}: {(error / scale).max().item()} steps"


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("group", [None, 16])
def test_a1_storing_what_was_read_changes_nothing(bits, group):
    """No element moves to another code; the scale may be rounded up once more, by 2^-10 of itself."""
    torch.manual_seed(bits)
    store, again = PackedRows(bits, group), PackedRows(bits, group)
    store.append(torch.randn(2, 3, 70, 64))
    back = store.read()
    again.append(back)
    pieces = back.unflatten(-1, (-1, group or 64))
    reach = pieces.amax(-1) - pieces.amin(-1)
    change = (again.read() - back).unflatten(-1, (-1, group or 64)).abs().amax(-1)
    assert (change <= reach * 2**-10 * 1.01).all(), f"{bits} bits, group {group}: {(change / reach).max().item()}"


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a1_constant_rows_are_exact(bits):
    x = torch.tensor([0.0, 1.5, -2.0])[None, None, :, None].expand(1, 2, 3, 32)
    store = PackedRows(bits)
    store.append(x)
    assert torch.equal(store.read(), x)


@pytest.mark.parametrize(("bits", "group", "expected"), [(8, None, 68), (4, None, 36), (2, None, 20), (4, 32, 40)])
def test_a1_packed_bytes_are_the_formula(bits, group, expected):
    """Per row of 64: 64 * bits / 8 bytes of codes, and 4 bytes of scale and zero per group."""
    store = PackedRows(bits, group)
    store.append(torch.randn(2, 3, 2 * STEP, 64))
    assert store.nbytes == 2 * 3 * 2 * STEP * expected
    store.append(torch.randn(2, 3, 1, 64))
    assert store.nbytes == 2 * 3 * 3 * STEP * expected, "grows by a step"


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["append", "cut", "drop", "pick"]), st.integers(0, 150)), min_size=1, max_size=12
    )
)
def test_rows_do_what_a_list_does(steps):
    rows, expected, fresh = Rows(), torch.zeros(2, 1, 0, 1, dtype=torch.int64), 0
    rows.append(expected)
    for what, amount in steps:
        if what == "append":
            new = torch.arange(fresh, fresh + 2 * amount).reshape(2, 1, amount, 1)
            fresh += 2 * amount
            rows.append(new)
            expected = torch.cat((expected, new), 2)
        elif what == "cut":
            rows.cut(amount)
            expected = expected[:, :, :amount]
        elif what == "drop":
            count = min(amount, expected.shape[2])
            rows.drop(count)
            expected = expected[:, :, count:]
        else:
            index = torch.tensor([amount % 2, 1])
            rows.pick(index)
            expected = expected[index]
        assert rows.length == expected.shape[2], steps
        assert torch.equal(rows.read(), expected), steps
        assert rows.nbytes % (2 * STEP * 8) == 0, steps
