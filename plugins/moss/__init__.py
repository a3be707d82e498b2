"""MOSS: linear layers train in FP8, and their weights' scales are predicted instead of measured.

Paper: "MOSS: Efficient and Accurate FP8 LLM Training with Microscaling and Automatic Scaling", arXiv 2511.05811 (ICLR
2026). What is kept: E4M3 with a power of two per group and a float32 above; one scale per weight, predicted from the
learning rate, measured again at intervals. What differs: Hopper has no product that takes powers of two per 32, so
groups of 128 are applied where sums are promoted to float32; the prediction is a bound that the optimizer cannot break
(the paper's can, and an optimizer without one is measured every step); weight decay tightens it; activations are kept
for the backward pass in FP8, grouped along tokens, so that nothing is rounded twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jettison.hooks.errors import EnvironmentRefused
from jettison.hooks.specs import hookimpl

if TYPE_CHECKING:
    from jettison.plugins.moss.config import MossOptions


@hookimpl
def options() -> type[MossOptions]:
    """Return the class of the section `moss`."""
    from jettison.plugins.moss.config import MossOptions

    return MossOptions


@hookimpl
def activate(options: MossOptions) -> object:
    """Refuse: an engine that serves has no use for the options of training.

    Raises:
        EnvironmentRefused: always.
    """
    raise EnvironmentRefused(
        "plugin 'moss' does not serve models yet",
        allowed="it trains them: jettison.plugins.moss.convert.convert(model, options)",
        do="start the engine without --with moss",
    )
