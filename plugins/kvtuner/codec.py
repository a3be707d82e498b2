"""The cache's codec on whole sequences: what a key or value reads back as, in plain torch.

One definition only: the scales, codes and rotation are those of `jettison.csrc.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.csrc.reference import hadamard, quantise


def round_trip(x: Tensor, bits: int) -> Tensor:
    """Quantise the last dimension (one scale and zero per row) and read it back, float32. 16 bits change nothing."""
    if bits == 16:
        return x.float()
    codes, scale, zero = quantise(x, bits)
    return codes * scale.float()[..., None] + zero.float()[..., None]


def store_keys(
    key: Tensor, bits: int, *, rotate: bool, sink_tokens: int, center: Tensor | None, scale: Tensor | None
) -> Tensor:
    """Keys [B, H, T, D] as they read back, in the model's own coordinates.

    Args:
        key: keys after RoPE; token 0 is the first of its sequence.
        bits: 16, 8, 4 or 2.
        rotate: Hadamard rotation of the centred and equalised keys.
        sink_tokens: first tokens that keep 16 bits.
        center, scale: [H, D] or None; the stored key is (key - center) / scale. The centre, which a cache never adds
            back because softmax does not see it, is added back here so that errors can be read off.
    """
    if bits == 16:
        return key.float()
    shift = 0.0 if center is None else center.float()[None, :, None]
    factor = torch.ones(()) if scale is None else scale.float()[None, :, None]
    coded = (key.float() - shift) / factor
    back = _rotated(coded, bits, rotate) * factor + shift
    return _with_sinks(back, key, sink_tokens)


def store_values(value: Tensor, bits: int, *, rotate: bool, sink_tokens: int) -> Tensor:
    """Values [B, H, T, D] as they read back."""
    if bits == 16:
        return value.float()
    return _with_sinks(_rotated(value.float(), bits, rotate), value, sink_tokens)


def _rotated(x: Tensor, bits: int, rotate: bool) -> Tensor:
    return hadamard(round_trip(hadamard(x), bits)) if rotate else round_trip(x, bits)


def _with_sinks(stored: Tensor, exact: Tensor, sink_tokens: int) -> Tensor:
    if not sink_tokens:
        return stored
    return torch.cat((exact[:, :, :sink_tokens].float(), stored[:, :, sink_tokens:]), 2)
