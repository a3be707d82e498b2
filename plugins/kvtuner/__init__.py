"""KVTuner: each attention layer gets the key and value bits it can bear; the same memory holds three times the tokens.

Paper: "KVTuner: Sensitivity-Aware Layer-Wise Mixed-Precision KV Cache Quantization", arXiv 2502.04420 (ICML 2025).
What is kept: an offline, static table of (key bits, value bits) per layer; per-token asymmetric codes; keys and values
chosen apart; pruning, grouping, and a search with NSGA-II or MOEA/D. What differs: layers are ranked by the loss of the
model's own output distribution that each pair causes (`sensitivity`), not by the relative error of the attention
output; an exact dynamic programme over those predictions comes first (`select`), and the search refines it on the
measured KL with prefill error (`search`), under a budget of real bytes; finalists are ranked again on other text, and
by task accuracy (`tune`). Every layer may be a group of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jettison.hooks.specs import hookimpl

if TYPE_CHECKING:
    import click

    from jettison.plugins.kvtuner.config import KVTunerOptions
    from jettison.plugins.kvtuner.engine import KVTuner


@hookimpl
def options() -> type[KVTunerOptions]:
    """Return the class of the section `kvtuner`."""
    from jettison.plugins.kvtuner.config import KVTunerOptions

    return KVTunerOptions


@hookimpl
def activate(options: KVTunerOptions) -> KVTuner:
    """Return the object that answers one engine's question which format a layer has."""
    from jettison.plugins.kvtuner.engine import KVTuner

    return KVTuner(options)


@hookimpl
def commands(cli: click.Group) -> None:
    """Add `jettison kvtuner`."""
    from jettison.plugins.kvtuner.command import kvtuner

    cli.add_command(kvtuner)
