"""What the commands say about a table: both sizes, the mix of pairs, where it came from."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click

from jettison.plugins.kvtuner.artefact import write_choice
from jettison.plugins.kvtuner.table import Table


def summary(table: Table) -> dict[str, Any]:
    """Sizes and origin of a table, JSON-ready; bytes are per token, all layers and KV heads, at its block size."""
    shape, pairs, sizes = table.model, table.payload.choices, table.measure_sizes()
    facts: dict[str, Any] = {
        "model": shape.name,
        "codec": table.payload.codec,
        "pairs": dict(sorted(Counter(map(write_choice, pairs)).items())),
        "nominal_bits": round(sizes.nominal_bits, 4),
        "real_bits": round(sizes.real_bits, 4),
        "bytes_per_token": sizes.bytes_per_token,
        "bf16_bytes_per_token": 4 * shape.elements,
        "capacity_ratio": round(4 * shape.elements / sizes.bytes_per_token, 4),
        "payload_sha256": table.payload_sha256,
    }
    if table.source.predicted_kl is not None:
        facts["predicted_kl"] = table.source.predicted_kl
    if table.search is not None:
        found = table.search
        facts |= {"sampler": found.sampler, "budget_bytes": found.budget_bytes, "search_kl": found.objective.kl}
        if found.validation is not None:
            facts |= {"validation_kl": found.validation.kl, "validation_error": found.validation.standard_error}
        facts["accuracy"] = {row.task: row.model_dump(exclude={"task"}) for row in found.accuracy}
    return facts


def print_summary(table: Table) -> None:
    """Print two or three lines."""
    facts = summary(table)
    mix = ", ".join(f"{count} x {pair}" for pair, count in facts["pairs"].items())
    predicted = f", predicted KL {facts['predicted_kl']:.4f}" if "predicted_kl" in facts else ""
    click.echo(
        f"{facts['model']}: {mix}; {facts['real_bits']:.3f} real bits per element ({facts['nominal_bits']:.3f} "
        f"nominal), {facts['bytes_per_token']} bytes per token instead of {facts['bf16_bytes_per_token']} "
        f"({facts['capacity_ratio']:.2f}x){predicted}"
    )
    if table.payload.codec == "named":
        click.echo("Named codecs: for the Hugging Face cache (PackedCache.from_table); engines refuse it.")
    if table.search is None:
        return
    for row in table.search.accuracy:
        share = f"{row.correct} of {row.items} right"
        click.echo(f"{row.task}: {share} (95 % interval {100 * row.low:.1f} to {100 * row.high:.1f} %)")
