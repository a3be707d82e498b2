"""A layer of the packed Hugging Face cache whose sides are stored in named codecs: those that have a packed form."""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.csrc.codec import encode_keys, hadamard, range_share
from jettison.hooks.errors import ConfigError
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner.codec_kinds import Float8, Native, PerToken
from jettison.plugins.kvtuner.codecs import Codec
from jettison.plugins.kvtuner.hf_cache import TokenLayer
from jettison.plugins.kvtuner.packing import PackedRows, Rows


class Float8Rows(Rows):
    """Rows in fp8 e4m3, saturating, one byte per element."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self._scale = scale

    def append(self, rows: Tensor) -> None:
        """Round `rows` [B, H, n, W] and add them."""
        limit = torch.finfo(torch.float8_e4m3fn).max
        super().append((rows.float() / self._scale).clamp(-limit, limit).to(torch.float8_e4m3fn).view(torch.uint8))

    def read(self, start: int = 0) -> Tensor:
        """Rows `start` to the end as they were stored, float32."""
        return super().read(start).view(torch.float8_e4m3fn).float() * self._scale

    def drop(self, count: int) -> None:
        """See `Rows.drop`; what is stored is kept as it is."""
        kept = super().read(count).clone()
        self._data, self.length = None, 0
        super().append(kept)


class CodecLayer(TokenLayer):
    """Keys in one codec and values in another, each of `16`, `int8`, `int4`, `int2` (`-hadamard` or not) and `fp8`.

    Args:
        form: sink tokens and key statistics; its bits say only which sides are below 16, its rotation is off.
        window: visible tokens including the current one, or None for all.
        key, value: codecs.

    Raises:
        ConfigError: a codec has no packed form.
    """

    def __init__(self, form: KVFormat, window: int | None, key: Codec, value: Codec) -> None:
        self._codecs = key, value
        super().__init__(form, window)

    def _clear(self) -> None:
        self._keys, self._values = map(_store, self._codecs)

    def _append(self, key: Tensor, value: Tensor) -> None:
        key_codec, value_codec = self._codecs
        if not isinstance(key_codec, Native):
            rotate = _rotates(key_codec)
            coded = encode_keys(key.transpose(1, 2), rotate=rotate, center=self._center, scale=self._scale)
            key = coded.transpose(1, 2)
        self._keys.append(key)
        self._values.append(hadamard(value) if _rotates(value_codec) else value)

    def _read(self, start: int) -> tuple[Tensor, Tensor]:
        keys, values = self._keys.read(start), self._values.read(start)
        key_codec, value_codec = self._codecs
        if not isinstance(key_codec, Native):
            keys = self._rotated_back(keys) if _rotates(key_codec) else keys
            keys = keys if self._scale is None else keys * self._scale[:, None]
            keys = keys if self._center is None else keys + self._center[:, None]
        values = self._rotated_back(values) if _rotates(value_codec) else values
        return self._given(keys), self._given(values)


def _rotates(codec: Codec) -> bool:
    return isinstance(codec, PerToken) and codec.rotate


def _store(codec: Codec) -> Rows | PackedRows:
    if isinstance(codec, Native):
        return Rows()
    if isinstance(codec, PerToken):
        return PackedRows(codec.width, share=range_share(codec.width, rotate=codec.rotate))
    if isinstance(codec, Float8):
        return Float8Rows(codec.scale)
    raise ConfigError(
        f"codec {codec.name!r} has no packed form in the Hugging Face cache",
        allowed="packed are 16, int8, int4, int2, each of these with -hadamard, and fp8",
        do="measure it with jettison kvtuner compare",
    )
