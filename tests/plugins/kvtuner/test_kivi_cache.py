"""Per-channel keys: acceptance A2 and the three pitfalls of section 7."""

import pytest
import torch

from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner.codecs import PerChannel, PerToken
from jettison.plugins.kvtuner.kivi_cache import ChannelLayer


def states(tokens, seed=0, size=32):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, 1, 2, tokens, size, generator=generator)
    return pair[0], pair[1]


def half_steps(keys, bits, group=32):
    """Largest error allowed to every key of a whole group, float64, channel by channel and group by group.

    Half a step of the group's own range, which float16 widens: the zero is the minimum rounded down, the scale is
    rounded up (2^-10 of each at most).
    """
    allowed = torch.zeros_like(keys, dtype=torch.float64)
    for head in range(keys.shape[1]):
        for start in range(0, keys.shape[2] // group * group, group):
            for channel in range(keys.shape[3]):
                x = keys[0, head, start : start + group, channel].double()
                reach = (x.max() - x.min() + x.min().abs() * 2**-10) * (1 + 2**-10)
                allowed[0, head, start : start + group, channel] = reach / (2**bits - 1) / 2 + 1e-6
    return allowed


@pytest.mark.parametrize("tokens", [31, 32, 37, 64, 65, 127])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a2_keys_are_quantised_per_channel_in_whole_groups(tokens, bits):
    """Channels of very different size: each errs by its own group's step only, and the residual not at all."""
    key, value = states(tokens)
    key = key * torch.logspace(-2, 2, 32)
    keys, _ = ChannelLayer(KVFormat(bits, 16)).update(key, value)
    excess = (keys.double() - key.double()).abs() - half_steps(key, bits)
    assert (excess <= 0).all(), f"{tokens} tokens at {bits} bits: {excess.max().item()} too much"


@pytest.mark.parametrize("tokens", [37, 64, 96])
def test_a2_groups_never_mix_channels(tokens):
    """One channel scaled by 100 leaves every other channel exactly as it was."""
    key, value = states(tokens)
    louder = key.clone()
    louder[..., 7] *= 100
    plain, _ = ChannelLayer(KVFormat(4, 4)).update(key, value)
    changed, _ = ChannelLayer(KVFormat(4, 4)).update(louder, value)
    others = [channel for channel in range(32) if channel != 7]
    assert torch.equal(plain[..., others], changed[..., others]), f"{tokens} tokens"
    assert not torch.equal(plain[..., 7], changed[..., 7])


@pytest.mark.parametrize(("tokens", "native"), [(31, 31), (32, 0), (33, 1), (64, 0), (65, 1), (95, 31), (96, 0)])
@pytest.mark.parametrize("steps", ["prefill", "decode"])
def test_a2_exactly_the_residual_is_native(tokens, native, steps):
    """T mod 32 tokens, also where that is none: a slice [:-0] once made this look perfect (pitfall 7.2)."""
    key, value = states(tokens)
    layer = ChannelLayer(KVFormat(2, 2))
    for start in range(0, tokens, tokens if steps == "prefill" else 1):
        stop = tokens if steps == "prefill" else start + 1
        keys, values = layer.update(key[:, :, start:stop], value[:, :, start:stop])
    for side, found, exact in (("keys", keys, key), ("values", values, value)):
        same = (found == exact).all(-1).all(1)[0]
        assert same[tokens - native :].all(), f"{side}: {tokens} tokens, {steps}"
        assert not same[: tokens - native].any(), f"{side}: {tokens} tokens, {steps}: quantised tokens are exact"


def test_history_is_never_quantised_again():
    """Pitfall 7.3: after 20 more blocks the first one reads back bit for bit as when it was completed."""
    key, value = states(32 * 21)
    layer = ChannelLayer(KVFormat(2, 2))
    first = layer.update(key[:, :, :32], value[:, :, :32])
    for start in range(32, 32 * 21, 7):
        last = layer.update(key[:, :, start : start + 7], value[:, :, start : start + 7])
    for side, then, now in zip(("keys", "values"), first, last, strict=True):
        assert torch.equal(then, now[:, :, :32]), side


@pytest.mark.parametrize("tokens", [20, 32, 70, 128, 150])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_cache_stores_what_the_codec_measures(tokens, bits):
    """`codecs.PerChannel` and `PerToken`, which the search sees, are what the cache holds (but for its residual)."""
    key, value = states(tokens, size=64)
    keys, values = ChannelLayer(KVFormat(bits, bits)).update(key, value)
    assert torch.equal(keys, PerChannel(bits).round_trip(key)), f"{tokens} tokens at {bits} bits"
    whole = tokens // 32 * 32
    assert torch.equal(values[:, :, :whole], PerToken(bits, rotate=False).round_trip(value)[:, :, :whole])
    assert torch.equal(values[:, :, whole:], value[:, :, whole:])


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_real_bytes(bits, head_size):
    """Keys: one bit per element more than the codes in groups of 32; values: 4 bytes per token."""
    key, value = states(2048, size=head_size)
    layer = ChannelLayer(KVFormat(bits, bits))
    layer.update(key, value)
    assert layer.nbytes == 2 * 2048 * (head_size * (bits + 1) / 8 + head_size * bits / 8 + 4)


def test_a_cut_block_is_completed_without_harm():
    """Going back into a quantised block: its tokens wait as they were quantised, then share a new group's scale."""
    key, value = states(96)
    layer = ChannelLayer(KVFormat(8, 8))
    before, _ = layer.update(key[:, :, :64], value[:, :, :64])
    layer.crop(-10)
    after, _ = layer.update(key[:, :, 54:56], value[:, :, 54:56])
    assert torch.equal(after[:, :, :54], before[:, :, :54])
    assert torch.equal(after[:, :, 54:], key[:, :, 54:56])
    final, _ = layer.update(key[:, :, 56:], value[:, :, 56:])
    step = (key.amax() - key.amin()) / 255
    assert (final - key).abs().max() <= 1.1 * step, "at most half a step twice"
