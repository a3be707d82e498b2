"""The FP8 copy of one weight, and when it is out of date."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jettison.csrc import fp8_ops
from jettison.csrc.fp8_format import scale_for


def measured_codes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[N, K]``, transposed codes and scale ``[1]`` from the weight's present largest magnitude."""
    weight = weight.detach()
    scale = scale_for(finite_largest(weight).reshape(1))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    codes_t = torch.empty(weight.shape[::-1], dtype=torch.float8_e4m3fn, device=weight.device)
    clipped = torch.zeros((), dtype=torch.int64, device=weight.device)
    fp8_ops.cast_weight(weight, scale, codes, codes_t, clipped)
    return codes, codes_t, scale


def finite_largest(weight: Tensor) -> Tensor:
    """Largest finite magnitude, ``float32 []``; 0 for an empty weight."""
    if not weight.numel():
        return torch.zeros((), device=weight.device)
    magnitudes = weight.detach().float().abs()
    return torch.where(magnitudes.isfinite(), magnitudes, 0.0).amax()


class WeightCodes:
    """The FP8 copy of a weight. Layers that share the weight share it; a copied or pickled layer starts a new one.

    Attributes:
        managed: a :class:`~jettison.plugins.moss.scaling.WeightScales` refreshes it after each optimizer step.
        scale: ``float32 [1]``.
        clipped: ``int64 []``, elements held at the limit in the last cast.
    """

    def __init__(self) -> None:
        self.codes: Tensor | None = None
        self.codes_t: Tensor | None = None
        self.scale: Tensor | None = None
        self.clipped: Tensor | None = None
        self.version: int | None = None
        self.changed: Callable[[], None] | None = None

    @property
    def managed(self) -> bool:
        """Whether somebody refreshes it after each optimizer step."""
        return self.changed is not None

    def current(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, transposed codes and scale of the weight as it is now.

        Without a manager a training step measures and casts the weight every time, because an optimizer may change it
        in ways that leave no trace; inference casts it once.
        """
        if torch.compiler.is_compiling():
            return self._parts()
        if self.codes is None or self.codes.device != weight.device or self.codes.shape != weight.shape:
            self.version = None
        if self.changed is not None:
            if self.version != weight._version:
                self.changed()
        elif self.version != weight._version or torch.is_grad_enabled():
            self.codes, self.codes_t, self.scale = measured_codes(weight)
            self.version = None if torch.is_grad_enabled() else weight._version
        return self._parts()

    def cast(self, weight: Tensor, scale: Tensor) -> None:
        """Write the codes of ``weight`` with ``scale``, ``float32 [1]`` on the weight's device, in place."""
        weight = weight.detach()
        if (
            self.codes is None
            or self.clipped is None
            or self.codes.device != weight.device
            or self.codes.shape != weight.shape
        ):
            empty = {"dtype": torch.float8_e4m3fn, "device": weight.device}
            self.codes, self.codes_t = torch.empty(weight.shape, **empty), torch.empty(weight.shape[::-1], **empty)
            self.scale = torch.ones(1, device=weight.device)
            self.clipped = torch.zeros((), dtype=torch.int64, device=weight.device)
        self.scale.copy_(scale)  # type: ignore[union-attr]
        fp8_ops.cast_weight(weight, self.scale, self.codes, self.codes_t, self.clipped)
        self.version = weight._version

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.codes is None or self.codes_t is None or self.scale is None:
            raise AssertionError("the weight was never cast")
        return self.codes, self.codes_t, self.scale

    def __deepcopy__(self, memo: Any) -> WeightCodes:
        return WeightCodes()

    def __reduce__(self) -> tuple[type[WeightCodes], tuple[()]]:
        return WeightCodes, ()
