"""The scales of all FP8 weights of a model, predicted from the learning rate (section 2.7 of our notes).

After each optimizer step a weight's largest magnitude is at most what it was, decayed, plus what the step can add
(:mod:`.bounds`). That is a few numbers on the host for all layers together: no weight is read, no device waited for. At
intervals, and when the prediction has drifted, weights are measured again, all in one go.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jettison.csrc.fp8_format import scale_for
from jettison.hooks.errors import ConfigError
from jettison.plugins.moss.linear import MossLinear
from jettison.plugins.moss.scaling_optimizer import Attached
from jettison.plugins.moss.scaling_state import load_scales, save_scales
from jettison.plugins.moss.weight import WeightCodes, finite_largest

_log = logging.getLogger(__name__)
_ROUNDING_UP = 1 + 2.0**-22
"""A float32 weight is rounded three times in a step; predictions stay above."""


class WeightScales:
    """Keeps the scale and the FP8 copy of every :class:`MossLinear` weight of a model up to date.

    Attach it to the optimizer, then train as before: ``scales = WeightScales(model); scales.attach(optimizer)``. What
    changes weights in another way is noticed by the next eager forward or step, loaded state dictionaries at once; call
    :meth:`invalidate` after changes through ``.data`` or before a compiled model runs on changed weights.

    Args:
        model: converted by :func:`jettison.plugins.moss.convert.convert`, on its final device.
        process_group: ranks that hold parts of the same weights: measured values are the largest of all of them. None
            where each rank holds whole weights, as under DDP.

    Raises:
        ConfigError: the model has no MossLinear, or another WeightScales manages it.
    """

    def __init__(self, model: nn.Module, process_group: Any = None) -> None:
        self.names: list[str] = []
        self.weights: list[nn.Parameter] = []
        self.codes: list[WeightCodes] = []
        self._handles: list[Any] = []
        self._process_group = process_group
        self._index: dict[int, int] = {}
        self._collect(model)
        count = len(self.names)
        self.predicted = torch.zeros(count, dtype=torch.float64)
        self.measured = torch.zeros(count, dtype=torch.float64)
        self.measured_at = torch.zeros(count, dtype=torch.int64)
        self.steps = 0
        self.attached: list[Attached] = []
        self.events: Counter[str] = Counter()
        self.refused: dict[str, str] = {}
        self.broken = 0
        self.worst_ratio = 1.0
        self.not_finite: str | None = None
        self._clipped: dict[torch.device, Tensor] = {}
        self.refresh(range(count), "start")

    def _collect(self, model: nn.Module) -> None:
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, MossLinear)]
        if not layers:
            raise ConfigError("the model has no MossLinear", do="convert it first: moss.convert.convert(model)")
        if any(layer.codes.managed for _, layer in layers):
            raise ConfigError("another WeightScales manages this model", do="call its remove() first")
        self.options = layers[0][1].options
        for name, layer in layers:
            position = self._index.setdefault(id(layer.weight), len(self.names))
            if position == len(self.names):
                self.names.append(f"{name}.weight" if name else "weight")
                self.weights.append(layer.weight)
                self.codes.append(layer.codes)
                layer.codes.changed = partial(self.refresh, [position], "changed outside a step")
            loaded = partial(self._on_load, position)
            self._handles.append(layer.register_load_state_dict_post_hook(loaded))

    def _on_load(self, position: int, module: Any, incompatible: Any) -> None:
        self._index.pop(id(self.weights[position]), None)
        self.weights[position] = module.weight
        self._index[id(module.weight)] = position
        self.refresh([position], "loaded")

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow an optimizer that updates some of the weights; may be called for several.

        Where no bound is known for its steps (SGD, unknown classes, 16-bit weights in mode `strict`, whose moments are
        rounded too coarsely), weights are measured after each step; a warning and :meth:`report` say why.

        Raises:
            ConfigError: it holds none of the weights.
        """
        positions = [self._index[id(p)] for g in optimizer.param_groups for p in g["params"] if id(p) in self._index]
        if not positions:
            raise ConfigError(
                f"{type(optimizer).__name__} updates none of the model's FP8 weights",
                do="make the optimizer from the parameters of the model given to WeightScales",
            )
        self.attached.append(Attached(self, optimizer))

    def remove(self) -> None:
        """Stop: layers measure their weights themselves again."""
        for handle in [*self._handles, *self.attached]:
            handle.remove()
        for codes in self.codes:
            codes.changed, codes.version = None, None
        self._handles, self.attached = [], []

    def index_of(self, parameter: Tensor) -> int | None:
        """Position of a parameter among the weights, or None."""
        return self._index.get(id(parameter))

    def refuse(self, position: int, reason: str) -> None:
        """Note, once, why the scale of a weight is measured after each step."""
        if self.refused.get(self.names[position]) == reason:
            return
        if reason not in self.refused.values():
            _log.warning("FP8 weights are measured after every step instead of predicted: %s", reason)
        self.refused[self.names[position]] = reason

    def invalidate(self, reason: str = "asked for") -> None:
        """Measure and cast all weights now, for example after merging adapters or editing weights."""
        self.refresh(range(len(self.names)), reason)

    def finish_step(self, positions: Tensor, must_measure: Sequence[int]) -> None:
        """After an optimizer step: decide what to measure, then cast the weights at `positions`.

        Args:
            positions: ``int64 [n]`` of the weights that it updates, predictions already advanced.
            must_measure: those among them without a valid prediction.
        """
        self.predicted[positions] *= _ROUNDING_UP
        predicted, measured = self.predicted[positions], self.measured[positions]
        forced = torch.isin(positions, torch.tensor(must_measure, dtype=torch.int64))
        due = (self.steps - self.measured_at[positions] >= self.options.recalibrate_steps) & ~forced
        drifted = (predicted > self.options.recalibrate_ratio * measured) & ~due & ~forced
        self.events += Counter({"interval": int(due.sum()), "drift": int(drifted.sum())})
        kept = ~(forced | due | drifted) & (measured > 0)
        self.worst_ratio = max([self.worst_ratio, *(predicted[kept] / measured[kept]).tolist()])
        before = predicted[due | drifted]
        self._measure(positions[due | drifted].tolist())
        self.broken += int((self.measured[positions[due | drifted]] > before).sum())
        self._measure(positions[forced].tolist())
        self._cast(positions.tolist())

    def refresh(self, positions: Sequence[int], reason: str) -> None:
        """Measure and cast the weights at `positions`; `reason` is counted in :meth:`report`."""
        self.events[reason] += len(positions)
        self._measure(list(positions))
        self._cast(list(positions))

    def cast_loaded(self) -> None:
        """Cast all weights with loaded predictions; measure those that a prediction does not cover."""
        everything = list(range(len(self.names)))
        loaded = [x.clone() for x in (self.predicted, self.measured, self.measured_at)]
        self._measure(everything)
        short = (self.measured > loaded[0]).nonzero().flatten().tolist()
        found = self.predicted.clone()
        self.predicted, self.measured, self.measured_at = loaded
        for i in short:
            self.predicted[i], self.measured[i], self.measured_at[i] = found[i], found[i], self.steps
        self.events["below its weight when loaded"] += len(short)
        self._cast(everything)

    def _measure(self, positions: list[int]) -> None:
        if not positions:
            return
        largest = torch.stack([x.float() for x in self._norms(positions)])
        if self._process_group is not None:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self._process_group)
        values = largest.cpu().double()
        for i in (~values.isfinite()).nonzero().flatten().tolist():
            self.not_finite = self.not_finite or self.names[positions[i]]
            values[i] = finite_largest(self.weights[positions[i]]).double()
        at = torch.tensor(positions)
        self.predicted[at], self.measured[at], self.measured_at[at] = values, values, self.steps

    def _norms(self, positions: list[int]) -> list[Tensor]:
        weights = [self.weights[i].detach() for i in positions]
        empty = [not w.numel() for w in weights]
        norms = iter(torch._foreach_norm([w for w in weights if w.numel()], float("inf")) if not all(empty) else ())
        return [w.new_zeros(()) if nothing else next(norms) for w, nothing in zip(weights, empty, strict=True)]

    def _cast(self, positions: list[int]) -> None:
        scales = scale_for(self.predicted[positions])
        moved = {device: scales.to(device, non_blocking=True) for device in {self.weights[i].device for i in positions}}
        for i, position in enumerate(positions):
            weight, codes = self.weights[position], self.codes[position]
            codes.cast(weight, moved[weight.device][i : i + 1])
        for device in moved:
            counts = [self.codes[p].clipped for p in positions if self.weights[p].device == device]
            total = torch.stack([c for c in counts if c is not None]).sum()
            self._clipped[device] = self._clipped[device] + total if device in self._clipped else total

    @property
    def clipped(self) -> int:
        """Weight elements held at the limit so far, over all casts; waits for the device."""
        return sum(int(total) for total in self._clipped.values())

    def report(self) -> dict[str, Any]:
        """What happened so far, JSON-ready: steps, events, clipped elements, broken predictions, refusals."""
        return {
            "mode": self.options.weight_scale,
            "weights": len(self.names),
            "steps": self.steps,
            "events": dict(sorted(self.events.items())),
            "clipped": self.clipped,
            "broken_predictions": self.broken,
            "worst_ratio": self.worst_ratio,
            "refused": dict(sorted(self.refused.items())),
            "first_not_finite": self.not_finite,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that resuming needs, as named tensors for safetensors; see :mod:`.scaling_state`."""
        return save_scales(self)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`; load the model and the optimizer first.

        A prediction that is below a loaded weight is not used: that weight is measured, and the event counted.

        Raises:
            InputRefused: the state is not of these weights.
        """
        load_scales(self, state)
