"""The cache's codec on whole sequences: what a key or value reads back as, in plain torch.

One definition only: the scales, codes and rotation are those of `jettison.csrc.codec`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.csrc.codec import hadamard, quantise, range_share


def round_trip(x: Tensor, bits: int, *, share: float = 1.0) -> Tensor:
    """Quantise the last dimension (one scale and zero per row) and read it back, float32. 16 bits change nothing.

    Args:
        x: [..., D].
        bits: 16, 8, 4 or 2.
        share: part of each row's range that its codes span, around the middle.
    """
    if bits == 16:
        return x.float()
    codes, scale, zero = quantise(x, bits, share)
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
    back = rotated_round_trip(coded, bits, rotate=rotate) * factor + shift
    return _with_sinks(back, key, sink_tokens)


def store_values(value: Tensor, bits: int, *, rotate: bool, sink_tokens: int) -> Tensor:
    """Values [B, H, T, D] as they read back."""
    if bits == 16:
        return value.float()
    return _with_sinks(rotated_round_trip(value.float(), bits, rotate=rotate), value, sink_tokens)


def rotated_round_trip(x: Tensor, bits: int, *, rotate: bool) -> Tensor:
    """What a row reads back as, in its own coordinates, if pages rotate it or not."""
    if not rotate:
        return round_trip(x, bits)
    return hadamard(round_trip(hadamard(x), bits, share=range_share(bits, rotate=True)))


def _with_sinks(stored: Tensor, exact: Tensor, sink_tokens: int) -> Tensor:
    if not sink_tokens:
        return stored
    return torch.cat((exact[:, :, :sink_tokens].float(), stored[:, :, sink_tokens:]), 2)
