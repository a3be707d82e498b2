"""Options of the section `moss`: which numbers linear layers compute with, and who says a weight's scale."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from jettison.hooks.config import PluginOptions

Backend = Literal["block", "bf16_fold", "tensor"]
WeightScale = Literal["strict", "paper", "jit"]


class MossOptions(PluginOptions):
    """How the linear layers of a model are converted.

    Attributes:
        group: activations and gradients along the reduction dimension that share a power of two, 128 or 32. On Hopper
            128 is what `block` computes at full speed; 32 is for `bf16_fold`.
        level: what a float32 scale above the powers of two belongs to: `row` (a token), `tensor`, or `none`. `none`
            needs one pass for both orientations of a matrix and has the same error (section 2.6 of our notes).
        backend: `block` applies powers of two where sums are promoted to float32; `bf16_fold` is exact and multiplies
            in bf16; `tensor` has one scale per tensor and no groups, whatever `group` and `level` say.
        wgrad: the weight's gradient is computed in `fp8` or in `bf16`.
        save: activations are kept for the backward pass in `fp8`, 0.52 of their bytes, or as they are (`input`).
        weight_scale: `strict`, a bound that cannot be broken; `paper`, the paper's estimate, clipped where it is
            broken; `jit`, measured every step.
        recalibrate_steps: a predicted scale is measured again after this many optimizer steps; 500.
        recalibrate_ratio: and as soon as it has grown by this factor since it was measured; 1.25.
        skip: a layer with one of these as a part of its dotted name stays as it is.
        min_features: so does a layer with fewer inputs or outputs than this, because FP8 does not pay there; 1024.
    """

    group: Literal[32, 128] = 128
    level: Literal["none", "row", "tensor"] = "none"
    backend: Backend = "block"
    wgrad: Literal["fp8", "bf16"] = "fp8"
    save: Literal["fp8", "input"] = "fp8"
    weight_scale: WeightScale = "strict"
    recalibrate_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    recalibrate_ratio: Annotated[float, Field(gt=1, le=16, allow_inf_nan=False)] = 1.25
    skip: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = ("lm_head", "embed_tokens")
    min_features: Annotated[int, Field(ge=1, le=1_000_000)] = 1024

    @model_validator(mode="after")
    def _groups_are_exponents(self) -> MossOptions:
        if self.backend == "tensor" and "group" in self.model_fields_set:
            raise ValueError("'group' has no meaning with backend 'tensor', which has no groups: leave it out")
        return self
