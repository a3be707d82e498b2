"""Following one optimizer: what its steps can add to each weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jettison.plugins.moss.bounds import Bound, Unbounded, bound_for

if TYPE_CHECKING:
    from jettison.plugins.moss.scaling import WeightScales

_SIXTEEN = "a step of 16-bit weights has no bound, because its moments are rounded to 16 bits too"
_BETAS = "betas were changed while moments made with other ones were kept"


class Attached:
    """Hooks on one optimizer.

    Attributes:
        steps: steps since its state was empty, None if that is unknown.
    """

    def __init__(self, scales: WeightScales, optimizer: torch.optim.Optimizer) -> None:
        self.scales, self.optimizer = scales, optimizer
        self.steps: int | None = None if any(optimizer.state.values()) else 0
        self._betas: dict[int, Any] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_post_hook(self._loaded),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _loaded(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps = None
        self._betas = {}

    def _positions(self, group: dict[str, Any]) -> list[int]:
        found = (self.scales.index_of(p) for p in group["params"])
        return [position for position in found if position is not None]

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        stale = [
            i for group in optimizer.param_groups for i in self._positions(group)
            if self.scales.codes[i].version != self.scales.weights[i]._version
        ]  # fmt: skip
        if stale:
            self.scales.refresh(stale, "changed outside a step")

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.steps is not None:
            self.steps += 1
        self.scales.steps += 1
        everything: list[int] = []
        must_measure: list[int] = []
        for i, group in enumerate(optimizer.param_groups):
            positions = self._positions(group)
            everything += positions
            must_measure += self._advance(i, group, positions)
        self.scales.finish_step(torch.tensor(everything, dtype=torch.int64), must_measure)

    def _advance(self, number: int, group: dict[str, Any], positions: list[int]) -> list[int]:
        """Move the predictions of one group; return the positions that have none."""
        mode = self.scales.options.weight_scale
        if mode == "jit":
            return positions
        bound = bound_for(self.optimizer, group, self.steps, strict=mode == "strict")
        if self._betas.setdefault(number, group.get("betas")) != group.get("betas"):
            bound = Unbounded(_BETAS)
        if isinstance(bound, Unbounded):
            for position in positions:
                self.scales.refuse(position, bound.reason)
            return positions
        coarse = [i for i in positions if mode == "strict" and self.scales.weights[i].dtype.itemsize < 4]
        for position in coarse:
            self.scales.refuse(position, _SIXTEEN)
        self._add(bound, [i for i in positions if i not in set(coarse)])
        return coarse

    def _add(self, bound: Bound, positions: list[int]) -> None:
        if not positions:
            return
        scales = self.scales
        weights = [scales.weights[i] for i in positions]
        skipped = getattr(self.optimizer, "found_inf", None) is not None  # the step may not have happened
        decay = torch.tensor([1.0 if skipped or w.grad is None else bound.decay for w in weights], dtype=torch.float64)
        before = scales.predicted[positions]
        growth = (before * bound.relative).clamp(min=bound.growth)
        if bound.per_root_element:
            growth = growth * torch.tensor([float(w.numel()) for w in weights], dtype=torch.float64).sqrt()
        scales.predicted[positions] = before * decay + growth
