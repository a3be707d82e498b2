"""The built-in formats of one side of a cache: see `codecs.Codec` for what their members mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jettison.csrc.codec import hadamard
from jettison.csrc.layout import PageLayout
from jettison.hooks.errors import ConfigError
from jettison.plugins.kvtuner.codec import rotated_round_trip, round_trip


@dataclass(frozen=True)
class Native:
    """16 bits: nothing changes."""

    name: str = "16"
    bits: float = 16
    page_bits: int | None = 16

    def bytes_per_token(self, head_size: int) -> float:
        """Two bytes per element."""
        return side_bytes(head_size, 16)

    def round_trip(self, x: Tensor) -> Tensor:
        """`x` in float32."""
        return x.float()


@dataclass(frozen=True)
class PerToken:
    """Asymmetric integers, one fp16 scale and zero per token and head (paper section 4, per-token mode).

    Attributes:
        width: 8, 4 or 2 bits.
        rotate: orthonormal Hadamard rotation before, and back after.
    """

    width: int
    rotate: bool

    @property
    def name(self) -> str:
        """`int4`, or `int4-hadamard`."""
        return f"int{self.width}{'-hadamard' * self.rotate}"

    @property
    def bits(self) -> float:
        """The width."""
        return self.width

    @property
    def page_bits(self) -> int | None:
        """The width: pages hold both, a table rotates all layers or none."""
        return self.width

    def bytes_per_token(self, head_size: int) -> float:
        """Codes and four bytes of scale and zero, as pages store them."""
        return side_bytes(head_size, self.width)

    def round_trip(self, x: Tensor) -> Tensor:
        """Codes of `jettison.csrc.codec.quantise`, read back."""
        return rotated_round_trip(x, self.width, rotate=self.rotate)


@dataclass(frozen=True)
class Shrunk:
    """`PerToken` with rotation, whose range is shrunk to the share that errs least: outliers clip, the rest gains.

    A page could store it (a scale and a zero like any other), but the engines' writers do not search the range.
    """

    width: int
    shares: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
    page_bits: int | None = None

    @property
    def name(self) -> str:
        """`int2-shrunk`."""
        return f"int{self.width}-shrunk"

    @property
    def bits(self) -> float:
        """The width."""
        return self.width

    def bytes_per_token(self, head_size: int) -> float:
        """As `PerToken`."""
        return side_bytes(head_size, self.width)

    def round_trip(self, x: Tensor) -> Tensor:
        """The read-back of the share with the least squared error per token and head."""
        rotated = hadamard(x)
        best = round_trip(rotated, self.width)
        least = (best - rotated).square().sum(-1, keepdim=True)
        for share in self.shares[1:]:
            tried = round_trip(rotated, self.width, share=share)
            error = (tried - rotated).square().sum(-1, keepdim=True)
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
        return hadamard(best)


@dataclass(frozen=True)
class Float8:
    """fp8 e4m3 with one static scale, 1 by default: the engines' `fp8` cache. Beyond 448 it saturates."""

    scale: float = 1.0
    name: str = "fp8"
    bits: float = 8
    page_bits: int | None = None

    def bytes_per_token(self, head_size: int) -> float:
        """One byte per element; a scale per tensor costs nothing."""
        return float(head_size)

    def round_trip(self, x: Tensor) -> Tensor:
        """Rounded to the nearest e4m3 number, saturating."""
        limit = torch.finfo(torch.float8_e4m3fn).max
        return (x.float() / self.scale).clamp(-limit, limit).to(torch.float8_e4m3fn).float() * self.scale


@dataclass(frozen=True)
class PerChannel:
    """Keys per channel (paper section 4, KIVI mode): one fp16 scale and zero per channel and `group` tokens.

    The last T mod `residual` tokens stay at 16 bits; only whole groups are ever quantised. No engine page holds it.
    """

    width: int
    group: int = 32
    residual: int = 32
    page_bits: int | None = None

    def __post_init__(self) -> None:
        if self.group < 1 or self.residual < 1 or self.residual % self.group:
            raise ConfigError(
                f"residual {self.residual} with groups of {self.group} is refused",
                allowed="the residual is a multiple of the group, so that no group is ever split",
            )

    @property
    def name(self) -> str:
        """`kivi4`; other sizes are named, e.g. `kivi4-g64-r128`."""
        default = self.group == 32 and self.residual == 32
        return f"kivi{self.width}" + ("" if default else f"-g{self.group}-r{self.residual}")

    @property
    def bits(self) -> float:
        """The width."""
        return self.width

    def bytes_per_token(self, head_size: int) -> float:
        """Codes and 4 bytes per channel and group: one bit per element more at groups of 32.

        The residual, at most `residual` tokens per sequence, is not counted.
        """
        return head_size * (self.width / 8 + 4 / self.group)

    def round_trip(self, x: Tensor) -> Tensor:
        """Every whole group as it reads back, the rest as it is."""
        length = x.shape[2]
        whole = length - length % self.residual
        groups = x[:, :, :whole].float().unflatten(2, (whole // self.group, self.group)).transpose(-1, -2)
        stored = round_trip(groups, self.width) if whole else groups
        return torch.cat((stored.transpose(-1, -2).flatten(2, 3), x[:, :, whole:].float()), 2)


def side_bytes(head_size: int, bits: int) -> float:
    """Bytes per token and head of one side of a packed page: codes, scale and zero; without the sink area."""
    layout = PageLayout(head_size, bits, 16)
    return layout.bytes_per_token(16) - 2 * head_size
