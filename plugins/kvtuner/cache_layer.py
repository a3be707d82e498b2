"""One layer of a packed Hugging Face cache: positions, sliding window, padding, sink tokens; subclasses store.

Every token is read back as it is stored, in the prefill too: generation attends to what an engine with the same table
attends to, and the paper evaluates so on purpose ("prefill uses dequantised KV", section 3.5).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from jettison.hooks.errors import ConfigError
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner.packing import STEP


class PackedLayer(CacheLayerMixin):
    """A layer on transformers' cache-layer interface. No gradient flows through it.

    Args:
        form: bits, rotation, statistics and sink tokens of the layer.
        window: visible tokens including the current one, or None for all.
    """

    is_croppable = True

    def __init__(self, form: KVFormat, window: int | None = None) -> None:
        super().__init__()
        self.form, self.window = form, window
        self.is_sliding = window is not None
        self.record_past = False
        self._drop_step = STEP
        self._starts: Tensor | None = None
        self._forget()

    def _forget(self) -> None:
        self.is_initialized = False
        self._batch = self._length = self._begin = self._sink_end = 0
        self._sinks: dict[str, Tensor] = {}
        self._clear()

    @abstractmethod
    def _clear(self) -> None:
        """Drop what is stored."""

    @abstractmethod
    def _append(self, key: Tensor, value: Tensor) -> None:
        """Store the next tokens, [B, H, n, D]."""

    @abstractmethod
    def _read(self, start: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the stored tokens from `start` on, counted from the first one not dropped; new tensors."""

    @abstractmethod
    def _cut(self, length: int) -> None:
        """Keep the first `length` stored tokens."""

    @abstractmethod
    def _droppable(self) -> int:
        """How many of the first stored tokens `_drop` can take."""

    @abstractmethod
    def _drop(self, count: int) -> None:
        """Forget the first `count` stored tokens, a multiple of `_drop_step`."""

    @abstractmethod
    def _pick(self, index: Tensor) -> None:
        """Make row `index[b]` of the batch its row b."""

    @property
    @abstractmethod
    def _stored_bytes(self) -> int:
        """Bytes allocated for everything but the sink tokens."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated: codes, scales, zeros, tokens at 16 bits, spare rows."""
        return self._stored_bytes + sum(kept.numel() * kept.element_size() for kept in self._sinks.values())

    def pad(self, starts: Tensor | None) -> None:
        """Say at which position each row's text starts, int [rows]; the batch may be a multiple (beams)."""
        if self._length:
            raise ConfigError("padding was told to a cache that holds tokens", do="call reset() first")
        self._starts = starts

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take type, device and shape from the first keys and values [B, H, n, D]."""
        _check_shapes(self.form, key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self._batch, heads, _, size = key_states.shape
        self._starts = _expanded(self._starts, self._batch, self.device)
        if sinks := self.form.sink_tokens:
            for side, bits in (("key", self.form.key_bits), ("value", self.form.value_bits)):
                if bits < 16:
                    self._sinks[side] = key_states.new_zeros((self._batch, heads, sinks, size))
        first = int(self._starts.max()) if self._starts is not None else 0
        self._sink_end = first + sinks
        self.is_initialized = True

    @torch.no_grad()
    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys (after RoPE) and values of the next tokens, [B, H, n, D].

        Returns:
            keys and values of all visible tokens as they are stored, in the model's own coordinates and type.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self._first_visible()
        self._keep_sinks("key", key_states)
        self._keep_sinks("value", value_states)
        self._append(key_states, value_states)
        self._length += key_states.shape[2]
        keys, values = self._read(first - self._begin)
        self._restore_sinks("key", keys, first)
        self._restore_sinks("value", values, first)
        if not self.record_past:
            self._trim()
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return number and first position of the keys that `update` returns for `query_length` new tokens."""
        first = self._first_visible()
        return self._length + query_length - first, first

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self._length

    def get_max_length(self) -> int:
        """Return the window, or -1 for none."""
        return self.window or -1

    def activate_past_recording(self) -> None:
        """Keep tokens that left the window until the next `crop`."""
        self.record_past = True

    def reset(self) -> None:
        """Forget all tokens and the padding, and return the memory."""
        self._starts = None
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; a positive number (deprecated upstream) is the length to keep.

        Raises:
            ConfigError: tokens that the shorter text sees have left the sliding window.
        """
        if tokens_to_remove > 0:
            length = min(self._length, tokens_to_remove)
        else:
            length = max(self._length + tokens_to_remove, 0)
        before, self._length = self._length, length
        if self._first_visible() < self._begin:
            self._length = before
            raise ConfigError(
                f"a sliding-window layer at token {before} cannot go back to {length}: the window's tokens are gone",
                do="call activate_past_recording() before generating",
            )
        self._cut(length - self._begin)
        self._trim()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row `beam_idx[b]` of the batch its row b."""
        if not self.is_initialized:
            return
        index = beam_idx.to(self.device)
        self._batch = len(index)
        self._pick(index)
        self._sinks = {side: kept.index_select(0, index) for side, kept in self._sinks.items()}
        if self._starts is not None:
            self._starts = self._starts.index_select(0, index)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, or those where the boolean `indices` is true."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self.reorder_cache(torch.arange(self._batch).repeat_interleave(repeats))

    def _first_visible(self) -> int:
        return 0 if self.window is None else max(self._length - self.window + 1, 0)

    def _trim(self) -> None:
        """Drop what no later token sees, in whole steps so that it is seldom."""
        gone = min(self._first_visible() - self._begin, self._droppable())
        gone -= gone % self._drop_step
        if gone:
            self._drop(gone)
            self._begin += gone

    def _keep_sinks(self, side: str, states: Tensor) -> None:
        if side not in self._sinks or self._length >= self._sink_end:
            return
        kept = self._sinks[side]
        at = torch.arange(kept.shape[2], device=self.device) - self._length
        at = at[None] + (0 if self._starts is None else self._starts[:, None])
        here = ((at >= 0) & (at < states.shape[2])).expand(kept.shape[0], -1)[:, None, :, None]
        at = at.clamp(0, states.shape[2] - 1).expand(kept.shape[0], -1)[:, None, :, None].expand_as(kept)
        self._sinks[side] = torch.where(here, states.gather(2, at), kept)

    def _restore_sinks(self, side: str, states: Tensor, first: int) -> None:
        """Overwrite the sink tokens among `states`, whose first token has position `first`, by their 16-bit copies."""
        if side not in self._sinks or first >= self._sink_end:
            return
        kept, head = self._sinks[side], states[:, :, : self._sink_end - first]
        at = torch.arange(first, first + head.shape[2], device=self.device)[None]
        at = (at - (0 if self._starts is None else self._starts[:, None])).expand(kept.shape[0], -1)
        here = ((at >= 0) & (at < kept.shape[2]))[:, None, :, None]
        at = at.clamp(0, kept.shape[2] - 1)[:, None, :, None].expand_as(head)
        head.copy_(torch.where(here, kept.gather(2, at), head))


def _expanded(starts: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
    if starts is None:
        return None
    if batch % len(starts):
        raise ConfigError(f"the attention mask has {len(starts)} rows, the batch {batch}", do="pass the prompt's mask")
    return starts.to(device).repeat_interleave(batch // len(starts))


def _check_shapes(form: KVFormat, key: Tensor, value: Tensor) -> None:
    if key.shape != value.shape:
        raise ConfigError(
            f"keys of shape {tuple(key.shape)} and values of {tuple(value.shape)} do not match",
            allowed="packed are keys and values of one size per KV head",
            do="keep this model's cache at 16 bits",
        )
    for name in ("key_center", "key_scale"):
        rows = getattr(form, name)
        if rows is not None and (len(rows), len(rows[0])) != (key.shape[1], key.shape[3]):
            raise ConfigError(
                f"{name} is for {len(rows)} KV heads of size {len(rows[0])}, the model has {key.shape[1]} of "
                f"{key.shape[3]}",
                do="measure a table for this model",
            )
