"""Keys and values, layers of every kind, and how to compare what they return, for the tests of the packed cache."""

from __future__ import annotations

import itertools

import pytest
import torch

from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner.codec_kinds import Float8, PerToken
from jettison.plugins.kvtuner.codec_layer import CodecLayer
from jettison.plugins.kvtuner.hf_cache import TokenLayer
from jettison.plugins.kvtuner.kivi_cache import ChannelLayer

BATCH, SHAPE = 2, (2, 3, 32)
IDENTITY = KVFormat(16, 16)


def states(tokens, seed=0, dtype=torch.float32, shape=SHAPE):
    batch, heads, size = shape
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, batch, heads, tokens, size, generator=generator).to(dtype)
    return pair[0], pair[1]


def fed(layer, key, value, cuts=()):
    """What `layer` returns last when it is given the tokens in pieces that end at `cuts`."""
    result = None
    for start, stop in itertools.pairwise((0, *cuts, key.shape[2])):
        result = layer.update(key[:, :, start:stop], value[:, :, start:stop])
    return result


def same(one, other):
    """Equal up to how one product with the rotation is cut into blocks: 2^-18 in float32, one unit in 16 bits."""
    tolerance = {torch.float32: 2**-18, torch.bfloat16: 2**-7, torch.float16: 2**-10}[one.dtype]
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=2**-18)


def held_bytes(thing, seen=None):
    """Bytes of every tensor that `thing` keeps alive, storage by storage."""
    seen = {} if seen is None else seen
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    elif isinstance(thing, dict):
        for item in thing.values():
            held_bytes(item, seen)
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            held_bytes(item, seen)
    elif type(thing).__module__.startswith(("jettison", "transformers.cache_utils")):
        held_bytes(vars(thing), seen)
    return sum(seen.values())


LAYER_KINDS = {
    "token": lambda window=None: TokenLayer(KVFormat(4, 2, rotate=True), window),
    "token sinks": lambda window=None: TokenLayer(KVFormat(4, 2, rotate=True, sink_tokens=3), window),
    "codecs": lambda window=None: CodecLayer(KVFormat(8, 4), window, Float8(), PerToken(4, rotate=False)),
    "codecs sinks": lambda window=None: CodecLayer(
        KVFormat(4, 8, sink_tokens=3), window, PerToken(4, rotate=True), Float8()
    ),
    "channel": lambda window=None: ChannelLayer(KVFormat(4, 2), window),
    "channel sinks": lambda window=None: ChannelLayer(KVFormat(4, 2, sink_tokens=3), window),
    "channel wide": lambda window=None: ChannelLayer(KVFormat(2, 16), window, group=16, residual=64),
    "identity": lambda window=None: TokenLayer(IDENTITY, window),
    "channel identity": lambda window=None: ChannelLayer(IDENTITY, window),
}
kinds = pytest.mark.parametrize("kind", list(LAYER_KINDS))
