"""The canary: does a table still do to this model what it did when it was made?

A table carries the token ids of a sample (about 2,000 tokens), how likely the model found them, and the mean KL that
its formats cost on them. Before a table is trusted the sample is run again, once exactly and once with the formats.
Another checkpoint shows in the likelihood, a broken codec or a changed statistic in the KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from jettison.hooks.errors import ConfigError, InputRefused
from jettison.hooks.quality import compare, summarise
from jettison.plugins.kvtuner.artefact import Canary
from jettison.plugins.kvtuner.hf_cache import check_shape
from jettison.plugins.kvtuner.quality import Stored, log_probabilities, stored
from jettison.plugins.kvtuner.table import Table

RELATIVE = 0.05
"""Share of the stored KL by which a float32 run may differ. Other rounding moves single codes, which averages out over
the sample; two bits less for the values of one of SmolLM2's 30 layers move it by 7 %, no sink token by 15 %."""

ABSOLUTE = 1e-5
"""Nats by which any KL may differ: the float32 error of a mean near zero."""

LIKELIHOOD = 0.01
"""Nats per token by which the unquantised model's likelihood may differ: float32 kernels agree to 1e-4, other weights
do not. A bfloat16 checkpoint is the same weights whatever it is computed in."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of a canary run.

    Attributes:
        stored_kl, found_kl: nats, when the table was made and now.
        tolerance: nats by which they may differ.
        stored_nll, found_nll: nats per token of the unquantised model; stored is None in tables without it.
        top1_agreement: share of positions at which the most likely token is unchanged by the formats, now.
        tokens: of the sample.
    """

    stored_kl: float
    found_kl: float
    tolerance: float
    stored_nll: float | None
    found_nll: float
    top1_agreement: float
    tokens: int

    @property
    def same_model(self) -> bool:
        """Whether the unquantised model finds the sample as likely as the one that the table was made on."""
        return self.stored_nll is None or abs(self.found_nll - self.stored_nll) <= LIKELIHOOD

    @property
    def holds(self) -> bool:
        """Whether model and KL are those of the table, within the tolerances."""
        return self.same_model and abs(self.found_kl - self.stored_kl) <= self.tolerance

    @property
    def content(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "same_model": self.same_model, "holds": self.holds}

    def check(self, table: Table) -> None:
        """Raise InputRefused unless the verdict holds."""
        if not self.same_model:
            raise InputRefused(
                f"the model finds the canary of the table of {table.model.name!r} at {self.found_nll:.4f} nats per "
                f"token, the one it was made on at {self.stored_nll:.4f}",
                allowed=f"allowed is a difference of {LIKELIHOOD:g}",
                do="give the checkpoint that the table was made for, or make a new table",
            )
        if not self.holds:
            raise InputRefused(
                f"the canary of the table of {table.model.name!r} has a KL of {self.found_kl:.6f} nats here, "
                f"{self.stored_kl:.6f} when it was made",
                allowed=f"allowed is a difference of {self.tolerance:.6f}",
                do="make a new table",
            )


def record(model: Any, ids: Sequence[int], formats: Stored) -> Canary:
    """Make the canary of a table.

    Args:
        model: a Hugging Face causal LM in float32.
        ids: token ids of one text, 2 to 8,192.
        formats: the table's.
    """
    parts, exact, changed = _run(model, torch.tensor(list(ids)), formats)
    found = summarise([parts])
    rows = exact.tolist(), changed.tolist()
    return Canary.of(ids, max(0.0, found.mean_kl), found.standard_error, -float(exact.mean()), rows)


def tolerance(stored: float) -> float:
    """Nats by which the KL of a sample may differ from `stored`."""
    return ABSOLUTE + RELATIVE * stored


def check_sample(table: Table) -> Canary:
    """Return the table's canary.

    Raises:
        InputRefused: it has none.
    """
    if table.canary is None:
        raise InputRefused(
            f"the table of {table.model.name!r} has no canary",
            do="make the table with jettison kvtuner search, which stores one",
        )
    return table.canary


def verify(table: Table, model: Any) -> Verdict:
    """Run the table's sample through `model`, a Hugging Face causal LM in float32, exactly and with its formats.

    Takes two forward passes over the sample and two float32 tensors [tokens, vocabulary]. The KL covers the errors of
    the prefill. A KL that differs raises nothing: see `Verdict.check`.

    Raises:
        InputRefused: the table has no canary, or its tokens are not this model's.
        ConfigError: the model is of another shape or not in float32, or the table's codec is not that of packed pages.
    """
    canary, weights = check_sample(table), model.get_input_embeddings().weight
    check_shape(table, model.config)
    if max(canary.ids) >= weights.shape[0]:
        raise InputRefused(
            f"the canary of the table of {table.model.name!r} has token {max(canary.ids)}, the model knows "
            f"{weights.shape[0]}",
            do="give the model that the table was made for",
        )
    if weights.dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"the model is in {weights.dtype}", do="load it in float32: the stored KL is of float32")
    sample = torch.tensor(canary.ids)
    parts, exact, _ = _run(model, sample, stored(table))
    found = summarise([parts])
    return Verdict(
        stored_kl=canary.kl,
        found_kl=found.mean_kl,
        tolerance=tolerance(canary.kl),
        stored_nll=canary.nll,
        found_nll=-float(exact.mean()),
        top1_agreement=found.top1_agreement,
        tokens=len(canary.ids),
    )


def _run(model: Any, ids: Tensor, formats: Stored) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """What `compare` says; log-probabilities [T - 1] of the next tokens, exactly and with the formats."""
    exact, changed = (log_probabilities(model, ids, forms) for forms in (None, formats))
    kl, same = compare(exact, changed)
    following = ids[1:, None].to(exact.device)
    likelihoods = [rows[:-1].gather(1, following)[:, 0].double().cpu() for rows in (exact, changed)]
    return (kl.cpu(), same.cpu()), *likelihoods
