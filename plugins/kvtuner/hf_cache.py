"""A Hugging Face cache that stores keys and values in the bits of a table, really packed: `model.generate` takes it.

    table = load_table("table.json")
    model.generate(**inputs, past_key_values=PackedCache.from_table(table, model.config))

Paper: section 2.1, mode "per-token-asym" (`TokenLayer`) and "per-channel-asym" (`kivi_cache.ChannelLayer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from jettison.csrc.codec import encode_keys, hadamard, range_share
from jettison.hooks.errors import ConfigError
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner.artefact import Pair
from jettison.plugins.kvtuner.cache_layer import PackedLayer
from jettison.plugins.kvtuner.packing import PackedRows, Rows
from jettison.plugins.kvtuner.table import Table

Keys = Literal["token", "channel"]


class TokenLayer(PackedLayer):
    """One scale and zero per token and KV head on both sides: the codes of an engine with the same table.

    A 16-bit side is kept in the model's own type, so it is exact.
    """

    def _clear(self) -> None:
        self._keys: Rows | PackedRows = _store(self.form.key_bits, rotate=self.form.rotate)
        self._values: Rows | PackedRows = _store(self.form.value_bits, rotate=self.form.rotate)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """See `PackedLayer.lazy_initialization`."""
        super().lazy_initialization(key_states, value_states)
        statistics = (self.form.key_center, self.form.key_scale)
        self._center, self._scale = (
            None if rows is None else torch.tensor(rows, device=self.device) for rows in statistics
        )

    def _append(self, key: Tensor, value: Tensor) -> None:
        if self.form.key_bits < 16:
            key = encode_keys(key.transpose(1, 2), rotate=self.form.rotate, center=self._center, scale=self._scale)
            key = key.transpose(1, 2)
        if self.form.value_bits < 16 and self.form.rotate:
            value = hadamard(value)
        self._keys.append(key)
        self._values.append(value)

    def _read(self, start: int) -> tuple[Tensor, Tensor]:
        keys, values = self._keys.read(start), self._values.read(start)
        if self.form.key_bits < 16:
            keys = self._rotated_back(keys) if self.form.rotate else keys
            if self._scale is not None:
                keys = keys.mul_(self._scale[:, None])
            if self._center is not None:
                keys = keys.add_(self._center[:, None])
        if self.form.value_bits < 16 and self.form.rotate:
            values = self._rotated_back(values)
        return self._given(keys), self._given(values)

    def _given(self, states: Tensor) -> Tensor:
        """`states` in the model's type, never a view of what is stored."""
        return states.to(self.dtype, copy=True, memory_format=torch.contiguous_format)

    def _rotated_back(self, rows: Tensor) -> Tensor:
        exact = torch.promote_types(self.dtype, torch.float32)
        return rows.to(exact) @ _rotation(rows.shape[-1], exact, self.device)

    def _cut(self, length: int) -> None:
        self._keys.cut(length)
        self._values.cut(length)

    def _droppable(self) -> int:
        return self._keys.length

    def _drop(self, count: int) -> None:
        self._keys.drop(count)
        self._values.drop(count)

    def _pick(self, index: Tensor) -> None:
        self._keys.pick(index)
        self._values.pick(index)

    @property
    def _stored_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes


class PackedCache(Cache):
    """Keys and values of all layers, packed; for `model.generate(past_key_values=...)` and plain forward calls.

    Batches with left padding, beam search, assisted generation (crop) and sliding windows work as with a
    `DynamicCache`. Only the tokens are packed: an attention call sees one layer's visible tokens unpacked at a time.

    Args:
        formats: one per attention layer that has a cache of its own.
        config: the model's configuration.
        keys: "token" for one scale per token and head, as engines store them; "channel" for KIVI's per-channel keys,
            whose rotation and key statistics must be off.
        codecs: with "token": names of key codec and value codec of every layer, see `codec_layer.CodecLayer`.
        attention_mask: the prompt's mask [rows, T], 0 for padding on the left. Without it, padding counts as text:
            sink tokens are then the first of the padded row, and padding takes part in per-channel ranges.
        sizes: with "channel": `group` and `residual` of `kivi_cache.ChannelLayer`, 32 and 32 unless given.

    Raises:
        ConfigError: a model whose layers are not plain or sliding-window attention, a wrong number of formats, a mask
            with padding on the right.
    """

    def __init__(
        self,
        formats: Sequence[KVFormat],
        config: Any,
        *,
        keys: Keys = "token",
        codecs: Sequence[tuple[str, str]] | None = None,
        attention_mask: Tensor | None = None,
        **sizes: int,
    ) -> None:
        windows = layer_windows(config)
        if len(formats) != len(windows):
            raise ConfigError(
                f"{len(formats)} formats were given for {len(windows)} layers", do="give one per attention layer"
            )
        names: list[tuple[str, str] | None] = [*codecs] if codecs else [None] * len(windows)
        kinds = zip(formats, windows, names, strict=True)
        super().__init__(layers=[_layer(keys, form, window, sizes, own) for form, window, own in kinds])
        if attention_mask is not None:
            self.pad(attention_mask)

    @classmethod
    def from_table(cls, table: Table, config: Any, *, attention_mask: Tensor | None = None) -> PackedCache:
        """Make an empty cache in the formats of `table`; arguments are those of the class.

        Raises:
            ConfigError: as for the class; also a table that was measured on a model of another shape.
        """
        check_shape(table, config)
        payload = table.payload
        if payload.codec == "kivi":
            formats = [KVFormat(*pair) for pair in payload.pairs]
            sizes: dict[str, Any] = {"group": payload.group_size or 0, "residual": payload.residual or 0}
            return cls(formats, config, keys="channel", attention_mask=attention_mask, **sizes)
        if payload.codec == "named":
            formats = [_statics(table, layer) for layer in range(table.model.num_layers)]
            return cls(formats, config, codecs=payload.named, attention_mask=attention_mask)
        return cls(table.formats(), config, attention_mask=attention_mask)

    @classmethod
    def uniform(
        cls,
        pair: Pair,
        config: Any,
        *,
        keys: Keys = "token",
        rotate: bool | None = None,
        sink_tokens: int = 0,
        attention_mask: Tensor | None = None,
    ) -> PackedCache:
        """Make an empty cache with the same (key bits, value bits) in every layer.

        `rotate` is on with one scale per token, off with per-channel keys, unless given.
        """
        form = KVFormat(*pair, rotate=keys == "token" if rotate is None else rotate, sink_tokens=sink_tokens)
        return cls([form] * len(layer_windows(config)), config, keys=keys, attention_mask=attention_mask)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the tokens so far: codes, scales, zeros, 16-bit tokens and at most 63 spare rows."""
        return sum(layer.nbytes for layer in self.layers)

    def pad(self, attention_mask: Tensor) -> None:
        """Tell an empty cache which tokens of the prompt are padding.

        Args:
            attention_mask: [rows, T], 0 for padding, which must be on the left. The batch may be a multiple of the
                rows (beam search repeats each).

        Raises:
            ConfigError: padding elsewhere, a row of padding only, or the cache holds tokens.
        """
        mask = attention_mask != 0
        if mask.dim() != 2 or not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise ConfigError(
                f"an attention mask of shape {tuple(mask.shape)} has padding that is not on the left",
                do="use tokenizer.padding_side = 'left'",
            )
        starts = None if bool(mask.all()) else (~mask).sum(1)
        for layer in self.layers:
            layer.pad(starts)


def layer_windows(config: Any) -> list[int | None]:
    """Sliding window of each layer that has a cache of its own, None for full attention.

    Raises:
        ConfigError: the model keeps something else than keys and values per head.
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise ConfigError(
            f"{text.model_type} uses multi-head latent attention: its cache holds one latent vector per token, "
            "not keys and values per head",
            allowed="packed are keys and values of plain, grouped-query and sliding-window attention",
            do="keep this model's cache at 16 bits",
        )
    windows: list[int | None] = []
    for number, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ConfigError(
                f"layer {number} of {text.model_type} keeps a {type(layer).__name__}",
                allowed="packed are keys and values of plain, grouped-query and sliding-window attention",
                do="keep this model's cache at 16 bits",
            )
        windows.append(getattr(layer, "sliding_window", None))
    return windows


def check_shape(table: Table, config: Any) -> None:
    """Raise ConfigError unless the model of `config` has the layers, KV heads and head size of the table's."""
    text = config.get_text_config(decoder=True)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    table.check_model((len(layer_windows(config)), text.num_key_value_heads, size))


def _layer(
    keys: Keys, form: KVFormat, window: int | None, sizes: dict[str, int], names: tuple[str, str] | None
) -> PackedLayer:
    if keys == "token":
        if sizes:
            raise ConfigError(f"{', '.join(sizes)} was given for keys per token", do="use keys='channel'")
        if names is None:
            return TokenLayer(form, window)
        from jettison.plugins.kvtuner.codec_layer import CodecLayer
        from jettison.plugins.kvtuner.codecs import get

        return CodecLayer(form, window, get(names[0]), get(names[1]))
    from jettison.plugins.kvtuner.kivi_cache import ChannelLayer

    return ChannelLayer(form, window, **sizes)


def _statics(table: Table, layer: int) -> KVFormat:
    """Sink tokens and key statistics of a layer in named codecs, with bits that say which sides are below 16."""
    center, scale = table.statistics(layer)
    pair, sinks = table.payload.pairs[layer], table.payload.sink_tokens
    return KVFormat(*pair, rotate=False, sink_tokens=sinks, key_center=center, key_scale=scale)


def _store(bits: int, *, rotate: bool) -> Rows | PackedRows:
    return Rows() if bits == 16 else PackedRows(bits, share=range_share(bits, rotate=rotate))


@lru_cache
def _rotation(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix of `hadamard`: reading is what decoding does all day, and one product is four times as fast."""
    return hadamard(torch.eye(size, dtype=dtype, device=device))
