"""A linear layer whose three products are computed in FP8 (sections 2.3 to 2.5 of our notes on the paper).

Forward ``y = x @ W.T``: x in groups along its features. Backward ``dx = dy @ W``: dy in groups along its features;
``dW = dy.T @ x``: both in groups along tokens. W has one scale, so its codes serve both orientations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from jettison.csrc import fp8_ops
from jettison.csrc.fp8_format import Level, Quantised, dequantise
from jettison.plugins.moss.config import MossOptions
from jettison.plugins.moss.weight import WeightCodes, measured_codes


class MossLinear(nn.Linear):
    """A linear layer made by :func:`jettison.plugins.moss.convert.convert`.

    Parameters, state dictionary and shapes are those of `nn.Linear`.

    Attributes:
        options: how it computes.
        codes: the weight in FP8, made once per optimizer step where a :class:`WeightScales` manages it.
    """

    options: MossOptions
    codes: WeightCodes

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias``: ``[..., in_features]`` to ``[..., out_features]``, in the type of ``x``.

        Under autocast the result has autocast's type. An input that is not finite makes its token's outputs NaN.

        Raises:
            ValueError: ``x`` is float64 or not a float type.
        """
        options = self.options
        codes, codes_t, scale = self._weight()
        kind = x.device.type
        out_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        group, level = (0, "tensor") if options.backend == "tensor" else (options.group, options.level)
        rows = x.reshape(-1, self.in_features)
        y = _Linear.apply(
            rows, self.weight, self.bias, codes, codes_t, scale,
            group, level, options.backend, options.wgrad, options.save, out_dtype,
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], self.out_features)

    def _weight(self) -> tuple[Tensor, Tensor, Tensor]:
        if torch.compiler.is_compiling() and not self.codes.managed:
            return measured_codes(self.weight)
        return self.codes.current(self.weight)

    def extra_repr(self) -> str:
        """Return what `nn.Linear` shows, and how this layer computes."""
        return f"{super().extra_repr()}, backend={self.options.backend}, group={self.options.group}"


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, codes: Tensor, codes_t: Tensor, scale: Tensor,
        group: int, level: Level, backend: str, wgrad: str, save: str, out_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.recipe = (group, level, backend, wgrad, save)
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        kept: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[1] and wgrad == "fp8" and save == "fp8":
            rows, columns = _both(x, group, level)
            kept = columns[:3]
        else:
            rows = fp8_ops.quantise(x, group, level)
            if ctx.needs_input_grad[1]:
                kept = rows[:3] if save == "fp8" else (x,)
        ctx.save_for_backward(codes_t, scale, *kept)
        return fp8_ops.gemm(rows, _weight_operand(codes, scale), bias, out_dtype=out_dtype, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        group, level, backend, wgrad, _ = ctx.recipe
        codes_t, scale, *kept = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        rows, columns = None, None
        if wants_weight and wgrad == "fp8":
            rows, columns = _both(dy, group, level)
        elif wants_x:
            rows = fp8_ops.quantise(dy, group, level)
        dx = dw = db = None
        if wants_x and rows is not None:
            dx = fp8_ops.gemm(rows, _weight_operand(codes_t, scale), out_dtype=x_dtype, backend=backend)
        if columns is not None:
            dw = fp8_ops.gemm(columns, _tokens(kept, group, level), out_dtype=weight_dtype, backend=backend)
        elif wants_weight:
            dw = _bf16_gradient(dy, kept, group).to(weight_dtype)
        if wants_bias:
            db = dy.sum(0, dtype=torch.float32).to(bias_dtype)
        return dx, dw, db, *[None] * 9


def _both(x: Tensor, group: int, level: Level) -> tuple[Quantised, Quantised]:
    """Groups along both dimensions; without groups the same codes twice."""
    if group:
        return fp8_ops.quantise_both(x, group, level)
    rows = fp8_ops.quantise(x, 0, "tensor")
    return rows, Quantised(rows.codes.T.contiguous(), rows.exponents.new_empty(x.shape[1], 0), rows.scale, 0)


def _weight_operand(codes: Tensor, scale: Tensor) -> Quantised:
    return Quantised(codes, codes.new_empty((codes.shape[0], 0), dtype=torch.uint8), scale, 0)


def _tokens(kept: list[Tensor], group: int, level: Level) -> Quantised:
    """The kept activations in groups along tokens, ``[in_features, tokens]``."""
    if len(kept) == 3:
        return Quantised(kept[0], kept[1], kept[2], group)
    return _both(kept[0], group, level)[1]


def _bf16_gradient(dy: Tensor, kept: list[Tensor], group: int) -> Tensor:
    x = kept[0] if len(kept) == 1 else dequantise(Quantised(kept[0], kept[1], kept[2], group), torch.bfloat16)
    return dy.to(torch.bfloat16).T @ x.to(torch.bfloat16)
