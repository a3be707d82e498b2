"""The part of the artefact `kvtuner.table` that is in force at run time."""

from __future__ import annotations

import base64
import binascii
import math
import struct
from typing import Annotated, Literal

from pydantic import Field, model_validator

from jettison.hooks.errors import ConfigError
from jettison.plugins.kvtuner.artefact import Bits, Choice, Name, Pair, Part

Channels = list[list[float]]
"""One number per channel of one layer's keys, [num_kv_heads][head_size]."""

_MAX_ELEMENTS = 1 << 24


class LayerBits(Part):
    """Bits of one layer.

    `key_codec` and `value_codec` are names of codecs in a table of the codec `named` and absent in others; the bits are
    then theirs, rounded up to one of those that a page has.
    """

    layer: Annotated[int, Field(ge=0)]
    key_bits: Bits
    value_bits: Bits
    key_codec: Name | None = None
    value_codec: Name | None = None

    @classmethod
    def named(cls, layer: int, key: str, value: str) -> LayerBits:
        """Make a layer of two codecs; ConfigError if one is unknown or of more than 16 bits."""
        bits = [rounded_up(name) for name in (key, value)]
        return cls(layer=layer, key_bits=bits[0], value_bits=bits[1], key_codec=key, value_codec=value)


class Payload(Part):
    """What is in force at run time.

    Attributes:
        layers: one entry per layer, in order.
        rotate: rotate keys and values by a Hadamard matrix before quantising.
        sink_tokens: first tokens of a sequence that are kept at 16 bits.
        key_center, key_scale: base64 of little-endian float16 [num_layers, num_kv_heads, head_size], or None.
        codec: `token-head`: one scale and zero per token and KV head on both sides, what engines serve; `kivi`: keys
            per channel in groups of tokens, values per token (paper, section 2.1), for the Hugging Face cache only;
            `named`: those that every layer names (`codecs`), for the Hugging Face cache where they have a packed form.
        group_size, residual: of `kivi`: tokens per group, and the newest tokens that keep 16 bits.
    """

    layers: Annotated[list[LayerBits], Field(min_length=1)]
    rotate: bool
    sink_tokens: Annotated[int, Field(ge=0, le=16)]
    key_center: str | None
    key_scale: str | None
    codec: Literal["token-head", "kivi", "named"] = "token-head"
    group_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    residual: Annotated[int, Field(ge=0, le=65536)] | None = None

    @model_validator(mode="after")
    def _one_codec(self) -> Payload:
        plain = not self.rotate and not self.sink_tokens and self.key_center is None and self.key_scale is None
        sized = self.group_size is not None and self.residual is not None
        if self.codec == "kivi" and not (plain and sized):
            raise ValueError(
                "codec kivi has group_size and residual, and no rotation, sink tokens, key_center or key_scale"
            )
        if self.codec != "kivi" and (self.group_size, self.residual) != (None, None):
            raise ValueError(f"codec {self.codec} has neither group_size nor residual")
        names = [name for entry in self.layers for name in (entry.key_codec, entry.value_codec)]
        if self.codec == "named" and (None in names or self.rotate):
            raise ValueError("codec named has key_codec and value_codec in every layer, and no rotation but theirs")
        if self.codec != "named" and names != [None] * len(names):
            raise ValueError(f"codec {self.codec} has neither key_codec nor value_codec")
        for entry in self.layers if self.codec == "named" else ():
            if entry != LayerBits.named(entry.layer, str(entry.key_codec), str(entry.value_codec)):
                raise ValueError(f"the bits of layer {entry.layer} are not those of its codecs")
        return self

    def at(self, layer: int) -> str:
        """The codec of one layer in words: `kivi`, or `fp8/int4` for keys and values in named codecs."""
        entry = self.layers[layer]
        return f"{entry.key_codec}/{entry.value_codec}" if self.codec == "named" else self.codec

    @property
    def named(self) -> list[tuple[str, str]]:
        """(key codec, value codec) of every layer of the codec `named`; empty for others."""
        return [(str(entry.key_codec), str(entry.value_codec)) for entry in self.layers if entry.key_codec is not None]

    def named_sizes(self, kv_heads: int, head_size: int, block_size: int) -> tuple[float, int]:
        """Mean nominal bits and bytes per token of all layers, of the codec `named`."""
        from jettison.plugins.kvtuner.codecs import get, option_bytes

        pairs = [(get(key), get(value)) for key, value in self.named]
        nominal = sum(codec.bits for pair in pairs for codec in pair) / (2 * len(pairs))
        sizes = [option_bytes(*pair, kv_heads, head_size, self.sink_tokens, block_size) for pair in pairs]
        return nominal, sum(sizes)

    @property
    def choices(self) -> list[Choice]:
        """What every layer stores: `named` if it has names, `pairs` otherwise."""
        return [*self.named] or [*self.pairs]

    @property
    def pairs(self) -> list[Pair]:
        """(key bits, value bits) of every layer, in order."""
        return [(entry.key_bits, entry.value_bits) for entry in self.layers]


def rounded_up(name: str) -> Bits:
    """The bits of the codec `name`, rounded up to 2, 4, 8 or 16; ConfigError if it is unknown or has more."""
    from jettison.plugins.kvtuner.codecs import get

    exact = get(name).bits
    if exact > 16:
        raise ConfigError(f"codec {name!r} has {exact:g} bits", allowed="a table holds codecs of at most 16")
    found: Bits = 2 if exact <= 2 else 4 if exact <= 4 else 8 if exact <= 8 else 16
    return found


def read_channels(text: str, layer: int, kv_heads: int, head_size: int) -> Channels:
    """Decode one layer of what `table.encode_channels` wrote."""
    values = struct.unpack_from(f"<{kv_heads * head_size}e", base64.b64decode(text), 2 * layer * kv_heads * head_size)
    return [list(values[head * head_size : (head + 1) * head_size]) for head in range(kv_heads)]


def check_channels(name: str, text: str | None, elements: int, *, positive: bool) -> None:
    """Raise ValueError unless `text` is None or holds `elements` finite float16 numbers, above 0 if `positive`."""
    if text is None:
        return
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"payload.{name} is not base64") from error
    if len(data) != 2 * elements or elements > _MAX_ELEMENTS:
        raise ValueError(f"payload.{name} holds {len(data)} bytes, the model's shape needs {2 * elements}")
    for index, value in enumerate(struct.unpack(f"<{elements}e", data)):
        if not math.isfinite(value) or (positive and value <= 0):
            raise ValueError(f"payload.{name} element {index} is {value}; it must be finite{' and above 0' * positive}")
