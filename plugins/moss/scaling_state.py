"""Saving and resuming predictions, in the middle of an interval too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jettison.hooks.errors import InputRefused

if TYPE_CHECKING:
    from jettison.plugins.moss.scaling import WeightScales

_PREFIX = "autoscale"
_FIELDS = {"amax_pred": "predicted", "amax_meas": "measured", "step_meas": "measured_at"}


def save_scales(scales: WeightScales) -> dict[str, Tensor]:
    """``autoscale.<parameter>.{amax_pred, amax_meas, step_meas}`` and step counts, each a tensor of one element."""
    state = {f"{_PREFIX}.steps": torch.tensor([scales.steps])}
    for i, attached in enumerate(scales.attached):
        steps = -1 if attached.steps is None else attached.steps
        state[f"{_PREFIX}.optimizer.{i}.steps"] = torch.tensor([steps])
    for i, name in enumerate(scales.names):
        for field, attribute in _FIELDS.items():
            state[f"{_PREFIX}.{name}.{field}"] = getattr(scales, attribute)[i : i + 1].clone()
    return state


def load_scales(scales: WeightScales, state: dict[str, Tensor]) -> None:
    """See :meth:`WeightScales.load_state_dict`."""
    expected = save_scales(scales)
    for key in sorted(expected.keys() ^ state.keys()):
        raise InputRefused(
            f"the saved scales {'have' if key in state else 'lack'} {key!r}, which this model and its "
            f"{len(scales.attached)} attached optimizers {'lack' if key in state else 'have'}",
            do="convert the model and attach its optimizers as when the state was saved",
        )
    for key, tensor in state.items():
        least = -1 if key.startswith(f"{_PREFIX}.optimizer.") else 0  # -1: unknown
        if tensor.shape != (1,) or not bool(tensor.isfinite()) or float(tensor) < least:
            found = tensor.tolist() if tensor.numel() < 4 else f"of shape {tuple(tensor.shape)}"
            raise InputRefused(f"the saved scale {key!r} is {found}", allowed="allowed is one number, 0 or more")
    for field, attribute in _FIELDS.items():
        values = torch.cat([state[f"{_PREFIX}.{name}.{field}"] for name in scales.names])
        getattr(scales, attribute).copy_(values)
    scales.steps = int(state[f"{_PREFIX}.steps"])
    for i, attached in enumerate(scales.attached):
        steps = int(state[f"{_PREFIX}.optimizer.{i}.steps"])
        attached.steps = None if steps < 0 else steps
    scales.cast_loaded()
