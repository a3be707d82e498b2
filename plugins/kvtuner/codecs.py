"""Formats as plug-ins: what one side (keys or values) of a cache costs, and what it reads back as.

A codec is any object with the five members of `Codec`. Ours are registered below; others join by the entry-point group
`jettison.kv_codecs` (an entry point is a codec, or a function without arguments that returns one) or by `register`.
`page_bits` says which codecs the engines' packed pages hold. Others can be measured, searched and compared; those of
`codec_layer.CodecLayer` are stored by the Hugging Face cache.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from jettison.csrc.layout import PageLayout
from jettison.hooks.errors import ConfigError
from jettison.plugins.kvtuner.capture import Attend, Rule
from jettison.plugins.kvtuner.codec_kinds import Float8, Native, PerChannel, PerToken, Shrunk

ENTRY_POINTS = "jettison.kv_codecs"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@runtime_checkable
class Codec(Protocol):
    """One side of a cache.

    Attributes:
        name: lower-case letters, digits, dots, dashes and underscores; unique.
        bits: nominal bits per element, without scales and zeros.
        page_bits: width of the engines' packed pages that stores exactly this (with their rotation), or None.
    """

    @property
    def name(self) -> str:
        """Unique name."""
        ...

    @property
    def bits(self) -> float:
        """Nominal bits per element."""
        ...

    @property
    def page_bits(self) -> int | None:
        """Width of a packed page that stores it, or None."""
        ...

    def bytes_per_token(self, head_size: int) -> float:
        """Real bytes per token and KV head of this side of a long sequence, scales and zeros included."""
        ...

    def round_trip(self, x: Tensor) -> Tensor:
        """What `x` [B, H, T, D] (float; token 0 starts the sequence) reads back as: float32, same shape."""
        ...


def pair_bytes(key: Codec, value: Codec, head_size: int, sink_tokens: int = 0, block_size: int = 128) -> float:
    """Real bytes per token and head of both sides and their share of the sink area.

    Where pages hold both it is exactly `PageLayout.bytes_per_token`.
    """
    if key.page_bits is not None and value.page_bits is not None:
        return PageLayout(head_size, key.page_bits, value.page_bits, sink_tokens).bytes_per_token(block_size)
    sinks = math.ceil(PageLayout(head_size, 16, 16, sink_tokens).sink_bytes / block_size)
    return key.bytes_per_token(head_size) + value.bytes_per_token(head_size) + sinks


def nominal_bits(side: int | str) -> float:
    """Nominal bits per element of a page's side or a named codec; ConfigError for an unknown one."""
    return side if isinstance(side, int) else get(side).bits


def option_bytes(key: Codec, value: Codec, kv_heads: int, head_size: int, sink_tokens: int, block_size: int) -> int:
    """Bytes per token of one layer, all KV heads, rounded up to whole ones."""
    return math.ceil(kv_heads * pair_bytes(key, value, head_size, sink_tokens, block_size) - 1e-9)


def store(
    codec: Codec, x: Tensor, *, sink_tokens: int = 0, center: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """One side [B, H, T, D] as it reads back in the model's own coordinates, float32.

    Args:
        codec: the side's format.
        x: keys after RoPE, or values; token 0 starts the sequence.
        sink_tokens: first tokens that keep 16 bits.
        center, scale: [H, D] or None, for keys: what is coded is (x - center) / scale.
    """
    if isinstance(codec, Native):
        return x.float()
    shift = 0.0 if center is None else center.float()[None, :, None]
    factor = 1.0 if scale is None else scale.float()[None, :, None]
    back = codec.round_trip((x.float() - shift) / factor) * factor + shift
    return torch.cat((x[:, :, :sink_tokens].float(), back[:, :, sink_tokens:]), 2) if sink_tokens else back


def storing(
    keys: Sequence[Codec],
    values: Sequence[Codec],
    *,
    sink_tokens: int = 0,
    center: Tensor | None = None,
    scale: Tensor | None = None,
) -> Attend:
    """Attention to a cache stored in any codecs, for `capture.intercept`: how a model does with them, prefill included.

    Args:
        keys, values: one codec per layer each.
        sink_tokens: first tokens that keep 16 bits.
        center, scale: [L, Hkv, D] statistics of the keys, or None.
    """

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        statics = {
            name: None if channels is None else channels[layer].to(key.device)
            for name, channels in (("center", center), ("scale", scale))
        }
        stored_key = store(keys[layer], key, sink_tokens=sink_tokens, **statics).to(query.dtype)
        stored_value = store(values[layer], value, sink_tokens=sink_tokens).to(query.dtype)
        return rule.attend(query, stored_key, stored_value)

    return attend


WIDTHS = (8, 4, 2)
BUILT_IN: tuple[Codec, ...] = (
    Native(),
    *(PerToken(width, rotate) for width in WIDTHS for rotate in (False, True)),
    *(Shrunk(width) for width in (4, 2)),
    Float8(),
    *(PerChannel(width) for width in WIDTHS),
)
_registered: dict[str, Codec] = {}


def names() -> list[str]:
    """Names of all codecs: built in, registered, and of installed packages."""
    return [*(codec.name for codec in BUILT_IN), *_registered, *_installed()]


def get(name: str) -> Codec:
    """The codec of that name.

    Raises:
        ConfigError: there is none, or the package that offers it is broken; its reason is given.
    """
    for codec in (*BUILT_IN, *_registered.values()):
        if codec.name == name:
            return codec
    offered = _installed()
    if name not in offered:
        raise ConfigError(f"codec {name!r} is unknown", allowed=f"allowed are {', '.join(names())}")
    try:
        loaded: Any = offered[name].load()
        return checked(loaded if isinstance(loaded, Codec) and not isinstance(loaded, type) else loaded(), name)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"codec {name!r} of {offered[name].value} does not load ({type(error).__name__}: {error})",
            do="repair or remove that package",
        ) from error


def register(codec: Codec) -> None:
    """Add a codec for this process.

    Raises:
        ConfigError: its name is taken or not allowed, or it does not do what a codec does.
    """
    if getattr(codec, "name", None) in names():
        raise ConfigError(f"codec {codec.name!r} is taken", do="choose another name")
    _registered[checked(codec).name] = codec


def unregister(name: str) -> None:
    """Remove a codec that `register` added; others stay."""
    _registered.pop(name, None)


@cache
def _installed() -> dict[str, Any]:
    taken = {codec.name for codec in BUILT_IN}
    return {point.name: point for point in entry_points(group=ENTRY_POINTS) if point.name not in taken}


def checked(codec: object, name: str | None = None) -> Codec:
    """Return `codec` if it keeps the protocol on a small tensor, with `name` if one is expected.

    Raises:
        ConfigError: what it does wrong.
    """
    if not isinstance(codec, Codec):
        raise ConfigError(f"{codec!r} is no codec", allowed=f"allowed is {Codec.__module__}.Codec")
    if not isinstance(codec.name, str) or not _NAME.fullmatch(codec.name) or name not in (None, codec.name):
        raise ConfigError(
            f"a codec calls itself {codec.name!r}", allowed=repr(name) if name else f"allowed is {_NAME.pattern}"
        )
    x = torch.randn(1, 2, 70, 64, generator=torch.Generator().manual_seed(0))
    given = x.clone()
    back, size = codec.round_trip(x), codec.bytes_per_token(64)
    wrong = {
        "changes its argument": not torch.equal(x, given),
        f"returns {back.dtype} {list(back.shape)}": back.dtype != torch.float32 or back.shape != x.shape,
        "returns numbers that are not finite": not bool(torch.isfinite(back).all()),
        f"costs {size} bytes per token": not (math.isfinite(size) and size > 0),
        f"has {codec.bits} bits": not (math.isfinite(codec.bits) and codec.bits > 0),
        f"has {codec.page_bits} page bits": codec.page_bits not in (None, 16, 8, 4, 2),
    }
    if found := [what for what, so in wrong.items() if so]:
        raise ConfigError(f"codec {codec.name!r} {found[0]}", allowed="float32 of the given shape, finite, untouched")
    return codec
