import itertools

import pytest
import torch

from jettison.csrc import reference
from jettison.csrc.codec import hadamard
from jettison.csrc.layout import PageLayout
from jettison.plugins.kvtuner.capture import causal_attention
from jettison.plugins.kvtuner.codec import round_trip, store_keys, store_values

CASES = list(itertools.product((16, 8, 4, 2), (True, False), (0, 1, 5), (True, False)))


@pytest.mark.parametrize(("bits", "rotate", "sinks", "channels"), CASES)
@pytest.mark.parametrize("size", [32, 64, 80])
def test_what_is_measured_is_what_a_page_returns(bits, rotate, sinks, channels, size):
    """The fake quantisation of a whole sequence equals storing it in pages and unpacking them."""
    torch.manual_seed(bits + size)
    tokens, heads, block = 37, 3, 16
    key, value = (torch.randn(1, heads, tokens, size).bfloat16().float() for _ in range(2))
    center = torch.randn(heads, size) if channels else None
    scale = torch.rand(heads, size) + 0.5 if channels else None
    layout = PageLayout(size, bits, bits, sinks)
    cache = torch.zeros(3, heads, block, layout.bytes_per_token(block), dtype=torch.uint8)
    codec = {"rotate": rotate, "key_center": center, "key_scale": scale}
    rows = [x[0].transpose(0, 1).contiguous() for x in (key, value)]
    reference.kv_store(*rows, cache, torch.arange(tokens), layout, **codec)
    keys, values = reference.unpack(cache, torch.arange(3), layout, torch.bfloat16)
    if bits < 16:
        keys, values = (hadamard(x) if rotate else x for x in (keys, values))
        keys = keys * scale + center if channels else keys
    stored_key = store_keys(key, bits, rotate=rotate, sink_tokens=sinks, center=center, scale=scale)
    stored_value = store_values(value, bits, rotate=rotate, sink_tokens=sinks)
    # NOTES: a page keeps the first tokens in float16, here they are exact.
    tolerance = {"rtol": 2e-3, "atol": 4e-3}
    case = f"bits {bits}, rotate {rotate}, sinks {sinks}, channels {channels}, size {size}"
    for name, stored, unpacked in (("key", stored_key, keys), ("value", stored_value, values)):
        expected = unpacked[:tokens].transpose(0, 1)
        torch.testing.assert_close(stored[0], expected, **tolerance, msg=lambda m, n=name: f"{n}, {case}: {m}")


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_error_is_at_most_half_a_step(bits):
    torch.manual_seed(bits)
    x = torch.randn(500, 64) * torch.logspace(-3, 2, 500)[:, None]
    step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    worst = ((round_trip(x, bits) - x).abs().amax(-1) / step).max().item()
    assert worst <= 0.51, f"{bits} bits: {worst} steps"


def test_constant_rows_are_exact():
    x = torch.tensor([0.0, 1.5, -2.0])[:, None].expand(3, 32)
    assert torch.equal(round_trip(x, 2), x)


@pytest.mark.parametrize("window", [-1, 1, 7, 20, 64])
def test_causal_attention(window):
    torch.manual_seed(window)
    query, key, value = torch.randn(1, 6, 20, 32), torch.randn(1, 2, 20, 32), torch.randn(1, 2, 20, 32)
    scores = torch.einsum("hqd,hkd->hqk", query[0].double(), key[0].repeat_interleave(3, 0).double()) * 0.3
    at = torch.arange(20)
    distance = at[:, None] - at[None]
    scores[:, (distance < 0) | ((window > 0) & (distance >= window))] = -torch.inf
    expected = scores.softmax(-1) @ value[0].repeat_interleave(3, 0).double()
    found = causal_attention(query, key, value, 0.3, window)[0].double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
