"""Growing tensors with real bit packing: what the Hugging Face caches of this plugin store their tokens in.

Scales, zeros and codes are those of `jettison.csrc.codec`, so a token reads back as it does from an engine's page;
only the order of the bytes differs (plain rows here, tiles for kernels there).
"""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.csrc.codec import quantise

STEP = 64
"""Tokens that a store grows by: at most 63 are spare, and a token is copied once per 64 that follow."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., n] of 8, 4 or 2 bits into uint8 [..., n * bits / 8], the first code in the low bits."""
    if bits == 8:
        return codes
    parts = codes.unflatten(-1, (-1, 8 // bits)).unbind(-1)
    packed = parts[0]
    for place, part in enumerate(parts[1:], 1):
        packed = packed | (part << (bits * place))
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack`."""
    if bits == 8:
        return packed
    return torch.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1).flatten(-2)


class Rows:
    """A tensor [B, H, T, W] that grows along T, of the type and on the device of what is appended; `length` is T.

    Args:
        step: rows that it grows by.
    """

    def __init__(self, step: int = STEP) -> None:
        self._step = step
        self._data: Tensor | None = None
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare rows included."""
        return 0 if self._data is None else self._data.numel() * self._data.element_size()

    def append(self, rows: Tensor) -> None:
        """Add `rows` [B, H, n, W] at the end."""
        total = self.length + rows.shape[2]
        if self._data is None or self._data.shape[2] < total:
            grown = rows.new_empty((*rows.shape[:2], -(-total // self._step) * self._step, rows.shape[3]))
            if self._data is not None:
                grown[:, :, : self.length] = self._data[:, :, : self.length]
            self._data = grown
        self._data[:, :, self.length : total] = rows
        self.length = total

    def read(self, start: int = 0) -> Tensor:
        """Rows `start` to the end, a view."""
        if self._data is None:
            raise AssertionError("nothing was appended")
        return self._data[:, :, start : self.length]

    def cut(self, length: int) -> None:
        """Forget the rows from `length` on."""
        self.length = min(self.length, length)

    def drop(self, count: int) -> None:
        """Forget the first `count` rows and return their memory."""
        rest = self.read(count).clone() if self._data is not None else None
        self._data, self.length = None, 0
        if rest is not None:
            self.append(rest)

    def pick(self, index: Tensor) -> None:
        """Make row `index[b]` of the batch its row b."""
        if self._data is not None:
            self._data = self._data.index_select(0, index.to(self._data.device))


class PackedRows:
    """Float rows [B, H, T, W], each cut into pieces of `group` elements that share a float16 scale and zero.

    Args:
        bits: 8, 4 or 2 per element.
        group: elements per scale, a divisor of W; None for whole rows.
        step: rows that the store grows by.
        share: part of a piece's range that its codes span; see `jettison.csrc.codec.range_share`.
    """

    def __init__(self, bits: int, group: int | None = None, step: int = STEP, *, share: float = 1.0) -> None:
        self._bits, self._group, self._share = bits, group, share
        self._codes, self._meta = Rows(step), Rows(step)

    @property
    def length(self) -> int:
        """Rows stored."""
        return self._codes.length

    @property
    def nbytes(self) -> int:
        """Bytes allocated for codes, scales and zeros, spare rows included."""
        return self._codes.nbytes + self._meta.nbytes

    def append(self, rows: Tensor) -> None:
        """Quantise `rows` [B, H, n, W] and add them."""
        codes, scale, zero = quantise(rows.unflatten(-1, (-1, self._group or rows.shape[-1])), self._bits, self._share)
        self._codes.append(pack(codes, self._bits).flatten(-2))
        self._meta.append(torch.stack((scale, zero), -1).flatten(-2))

    def read(self, start: int = 0) -> Tensor:
        """Rows `start` to the end as they were stored, float32."""
        scale, zero = self._meta.read(start).float().unflatten(-1, (-1, 2)).unbind(-1)
        codes = unpack(self._codes.read(start), self._bits).unflatten(-1, (scale.shape[-1], -1)).float()
        return codes.mul_(scale[..., None]).add_(zero[..., None]).flatten(-2)

    def cut(self, length: int) -> None:
        """See `Rows.cut`."""
        self._codes.cut(length)
        self._meta.cut(length)

    def drop(self, count: int) -> None:
        """See `Rows.drop`."""
        self._codes.drop(count)
        self._meta.drop(count)

    def pick(self, index: Tensor) -> None:
        """See `Rows.pick`."""
        self._codes.pick(index)
        self._meta.pick(index)
