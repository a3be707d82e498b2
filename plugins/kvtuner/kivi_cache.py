"""Per-channel keys with a native residual, after KIVI: the paper's mode "per-channel-asym" (section 2.1).

Keys share a scale and zero over a group of tokens of one channel, values over one token, as in the other mode; tokens
wait at 16 bits until their block is complete. Three things differ from the paper's own code, where they are errors
(section 7.1-7.3): a group never holds elements of two channels, whatever the number of tokens; the residual is counted
from the front, so that its multiples are right; only a newly completed block is quantised, never the history again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from jettison.hooks.errors import ConfigError
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner.cache_layer import PackedLayer
from jettison.plugins.kvtuner.packing import STEP, PackedRows, Rows

GROUP = 32
"""Tokens of one channel that share a scale and zero."""

RESIDUAL = 32
"""Tokens per block: of T tokens the last T mod 32 are native, so T = 64 leaves none and T = 65 one."""

Clean = Callable[[Tensor, int], Tensor]
"""(states of whole blocks [B, H, n, D], index of the first one among the stored tokens) -> what to quantise."""


class Blocks:
    """One side of a layer [B, H, T, D]: whole blocks of tokens packed, the rest native.

    Args:
        bits: 8, 4 or 2 per element.
        block: tokens per block.
        group: tokens of a channel that share a scale, a divisor of `block`; None: the channels of a token do.
    """

    def __init__(self, bits: int, block: int, group: int | None) -> None:
        self._block, self._group = block, group
        self._unit = group or 1
        self._packed = PackedRows(bits, group, max(STEP // self._unit, 1))
        self._recent: Tensor | None = None

    @property
    def packed(self) -> int:
        """Tokens in whole blocks."""
        return self._packed.length * self._unit

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._packed.nbytes + (0 if self._recent is None else self._recent.numel() * self._recent.element_size())

    def append(self, states: Tensor, clean: Clean | None = None) -> None:
        """Add the next tokens [B, H, n, D] and pack the blocks that they complete, as `clean` returns them."""
        recent = states if self._recent is None else torch.cat((self._recent, states), 2)
        whole = recent.shape[2] // self._block * self._block
        if whole:
            full = recent[:, :, :whole]
            full = clean(full, self.packed) if clean is not None else full
            if self._group is not None:
                full = full.unflatten(2, (-1, self._group)).transpose(-1, -2).flatten(-2)
            self._packed.append(full)
        self._recent = _owned(recent[:, :, whole:])

    def read(self, start: int, dtype: torch.dtype) -> Tensor:
        """Tokens `start` to the end as they are stored, [B, H, n, D]."""
        if self._recent is None:
            raise AssertionError("nothing was appended")
        if start >= self.packed:
            return _owned(self._recent[:, :, start - self.packed :])
        rows = self._packed.read(start // self._unit)
        if self._group is not None:
            rows = rows.unflatten(-1, (-1, self._group)).transpose(-1, -2).flatten(2, 3)
        return torch.cat((rows.to(dtype)[:, :, start % self._unit :], self._recent), 2)

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens; those of a block that is cut stay as they were quantised."""
        if self._recent is None:
            return
        whole = min(length, self.packed) // self._block * self._block
        self._recent = _owned(self.read(whole, self._recent.dtype)[:, :, : length - whole])
        self._packed.cut(whole // self._unit)

    def drop(self, count: int) -> None:
        """Forget the first `count` tokens, whole blocks."""
        self._packed.drop(count // self._unit)

    def pick(self, index: Tensor) -> None:
        """Make row `index[b]` of the batch its row b."""
        self._packed.pick(index)
        self._recent = None if self._recent is None else self._recent.index_select(0, index)


class ChannelLayer(PackedLayer):
    """Keys per channel, values per token.

    Padding and sink tokens do not widen their groups' ranges. A crop into a quantised block leaves its tokens as they
    were quantised until the block is complete again.

    Args:
        form, window: as for `PackedLayer`.
        group: tokens of a channel that share a scale and zero.
        residual: tokens per block, a multiple of `group`.

    Raises:
        ConfigError: a rotation or key statistics (they mix or shift the channels that the groups keep apart), or
            sizes that would split a group.
    """

    def __init__(
        self, form: KVFormat, window: int | None = None, *, group: int = GROUP, residual: int = RESIDUAL
    ) -> None:
        if form.rotate or form.key_center is not None or form.key_scale is not None:
            raise ConfigError(
                "a format with a rotation or key statistics was given for per-channel keys",
                allowed="per-channel keys are quantised in the model's own channels",
                do="use rotate=False without key_center and key_scale, or keys='token'",
            )
        if group < 8 or group % 8 or residual < group or residual % group:
            raise ConfigError(
                f"groups of {group} with a residual of {residual} are refused",
                allowed="allowed are groups of a multiple of 8 tokens, and a residual of whole groups, at least one",
                do=f"use {GROUP} and {RESIDUAL}",
            )
        self._group, self._residual = group, residual
        super().__init__(form, window)
        self._drop_step = math.lcm(STEP, residual)

    def _clear(self) -> None:
        self._keys = _store(self.form.key_bits, self._residual, self._group)
        self._values = _store(self.form.value_bits, self._residual, None)

    def _append(self, key: Tensor, value: Tensor) -> None:
        if isinstance(self._keys, Blocks):
            self._keys.append(key, self._without_outsiders)
        else:
            self._keys.append(key)
        self._values.append(value)

    def _read(self, start: int) -> tuple[Tensor, Tensor]:
        return _read(self._keys, start, self.dtype), _read(self._values, start, self.dtype)

    def _cut(self, length: int) -> None:
        self._keys.cut(length)
        self._values.cut(length)

    def _droppable(self) -> int:
        return min(side.packed if isinstance(side, Blocks) else side.length for side in (self._keys, self._values))

    def _drop(self, count: int) -> None:
        self._keys.drop(count)
        self._values.drop(count)

    def _pick(self, index: Tensor) -> None:
        self._keys.pick(index)
        self._values.pick(index)

    def _without_outsiders(self, keys: Tensor, stored: int) -> Tensor:
        """`keys` of whole blocks, padding and sink tokens replaced by an ordinary key of their group (or zero)."""
        first = self._begin + stored
        if first >= self._sink_end:
            return keys
        at = torch.arange(first, first + keys.shape[2], device=self.device)[None]
        start = 0 if self._starts is None else self._starts[:, None]
        outside = (at < start + self.form.sink_tokens).unflatten(-1, (-1, self._group))[:, None, :, :, None]
        grouped = keys.unflatten(2, (-1, self._group))
        lowest = grouped.masked_fill(outside, torch.inf).amin(3, keepdim=True)
        return torch.where(outside, lowest.masked_fill(lowest == torch.inf, 0.0), grouped).flatten(2, 3)

    @property
    def _stored_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes


def _store(bits: int, block: int, group: int | None) -> Rows | Blocks:
    return Rows() if bits == 16 else Blocks(bits, block, group)


def _read(side: Rows | Blocks, start: int, dtype: torch.dtype) -> Tensor:
    return side.read(start, dtype) if isinstance(side, Blocks) else _owned(side.read(start))


def _owned(states: Tensor) -> Tensor:
    """A copy: a view would keep a whole prompt in memory."""
    return states.clone(memory_format=torch.contiguous_format)
