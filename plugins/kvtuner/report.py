"""A search as a picture and a page: sensitivity heat map, Pareto front with its baselines, and the chosen table.

The search writes its *record* beside the table, so a report can be drawn again without measuring anything.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from jettison.hooks.errors import EnvironmentRefused, InputRefused
from jettison.hooks.files import read_document, write_atomically
from jettison.plugins.kvtuner.artefact import SHA256, Name, Part, Positive, read_pairs, write_choice, write_pairs
from jettison.plugins.kvtuner.prepare import Prepared, real_bits
from jettison.plugins.kvtuner.search import Found
from jettison.plugins.kvtuner.sensitivity import PAIRS
from jettison.plugins.kvtuner.table import Table
from jettison.plugins.kvtuner.tune import Outcome

COLOURS = {16: "#7f7f7f", 8: "#1f77b4", 4: "#2ca02c", 2: "#d62728"}
FLOOR = 1e-9
"""Predicted KL below this is drawn as this: 16 bits err by nothing, and a logarithm needs something."""


class Row(Part):
    """A measured candidate: `pairs` as in `write_pairs`, KL with its standard error in nats."""

    pairs: Annotated[str, Field(min_length=4, max_length=16384)]
    sink_tokens: Annotated[int, Field(ge=0, le=16)]
    origin: Name
    bytes_per_token: Annotated[int, Field(ge=1)]
    nominal_bits: Positive
    real_bits: Positive
    kl: Positive
    standard_error: Positive


class Final(Row):
    """A finalist, in order of preference, with its KL on the validation text and right answers, if asked."""

    validation_kl: Positive
    validation_error: Positive
    correct: int | None = None


class Record(Part):
    """What a search measured.

    Attributes:
        payload_sha256: of the table that came of it.
        heat: [layers][options], predicted KL of each of `options` in one layer alone.
        options: as `write_choice` writes them; `PAIRS` where the record does not say.
        budget_bytes, budget_bits: the budget, per token and per element.
        searched, uniform: all candidates in order.
        finalists: best first; the first is the table.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")]
    kind: Literal["kvtuner.record"]
    payload_sha256: SHA256
    heat: list[list[Positive]]
    options: list[Name] = Field(default_factory=lambda: [write_choice(pair) for pair in PAIRS])
    budget_bytes: Annotated[int, Field(ge=1)]
    budget_bits: Positive
    searched: list[Row]
    uniform: list[Row]
    finalists: Annotated[list[Final], Field(min_length=1)]

    @model_validator(mode="after")
    def _complete(self) -> Record:
        if any(len(row) != len(self.options) for row in self.heat):
            raise ValueError(f"the heat map has not {len(self.options)} columns")
        for row in (*self.searched, *self.uniform, *self.finalists):
            if len(read_pairs(row.pairs)) != len(self.heat):
                raise ValueError(f"a candidate has {len(read_pairs(row.pairs))} layers, the heat map {len(self.heat)}")
        return self


def make_record(prepared: Prepared, outcome: Outcome, budget: int) -> Record:
    """Wrap what `tune` returned."""

    def row(found: Found) -> dict[str, Any]:
        return {
            "pairs": write_pairs(found.candidate.pairs),
            "sink_tokens": found.candidate.sink_tokens,
            "origin": found.origin,
            "bytes_per_token": found.cost,
            "nominal_bits": found.candidate.nominal_bits,
            "real_bits": real_bits(prepared.shape, found.cost),
            "kl": max(0.0, found.quality.mean_kl),
            "standard_error": found.quality.standard_error,
        }

    content = {
        "schema": 1,
        "kind": "kvtuner.record",
        "payload_sha256": outcome.table.payload_sha256,
        "heat": prepared.measured[prepared.space.sinks[-1]].kl.clamp_min(0).tolist(),
        "options": [write_choice(option) for option in prepared.space.options],
        "budget_bytes": budget,
        "budget_bits": real_bits(prepared.shape, budget),
        "searched": [row(found) for found in outcome.searched],
        "uniform": [row(found) for found in outcome.uniform],
        "finalists": [
            {
                **row(final.found),
                "validation_kl": max(0.0, final.quality.mean_kl),
                "validation_error": final.quality.standard_error,
                "correct": None if final.answers is None else sum(final.answers),
            }
            for final in outcome.finalists
        ],
    }
    return Record.model_validate(content)


def save_record(record: Record, path: Path) -> None:
    """Write the record as JSON, atomically."""
    write_atomically(path, record.model_dump_json(by_alias=True, indent=1) + "\n")


def load_record(path: Path, table: Table) -> Record:
    """Read the record of `table`.

    Raises:
        InputRefused: missing, malformed, or of another table.
    """
    try:
        record = Record.model_validate(read_document(path), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise InputRefused(f"{path} is refused at {place}: {first['msg']}", do="search again") from error
    if record.payload_sha256 != table.payload_sha256:
        raise InputRefused(f"{path} belongs to another table", do="search again, or give the table that came of it")
    return record


def draw(record: Record, table: Table) -> bytes:
    """Draw the three panels as PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EnvironmentRefused("package 'matplotlib' is not installed", do="pip install 'jettison[tune]'") from error
    figure = Figure(figsize=(15, max(5.5, 0.17 * len(record.heat) + 1.5)), layout="constrained")
    heat, front, chosen = figure.subplots(1, 3, width_ratios=(4, 5, 2))
    _draw_heat(figure, heat, record, table)
    _draw_front(front, record)
    _draw_table(chosen, table)
    figure.suptitle(f"{table.model.name}: {_headline(record)}", fontsize=10)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()


def _headline(record: Record) -> str:
    best = record.finalists[0]
    return (
        f"{best.real_bits:.3f} real bits ({best.nominal_bits:.3f} nominal), {best.bytes_per_token} bytes per token, "
        f"KL {best.kl:.3g} on the search text, {best.validation_kl:.3g} on the validation text"
    )


def _draw_heat(figure: Any, axes: Any, record: Record, table: Table) -> None:
    values = [[math.log10(max(value, FLOOR)) for value in row] for row in record.heat]
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    for layer, pair in enumerate(table.payload.choices):
        at = record.options.index(write_choice(pair))
        axes.plot(at, layer, marker="s", color="none", markeredgecolor="white", markersize=6)
    axes.set_xticks(range(len(record.options)), record.options, rotation=90, fontsize=7)
    axes.set(ylabel="layer", title="predicted KL of one layer alone (squares: chosen)")
    figure.colorbar(image, ax=axes, label="log10 nats")


def _draw_front(axes: Any, record: Record) -> None:
    series = {
        "search": ([row for row in record.searched if row.origin != "dp"], ".", "#9467bd"),
        "dynamic programme": ([row for row in record.searched if row.origin == "dp"], "D", "#ff7f0e"),
        "uniform pairs": (record.uniform, "s", "#7f7f7f"),
    }
    for label, (rows, marker, colour) in series.items():
        shown = [row for row in rows if row.kl > 0]
        where = [row.real_bits for row in shown], [row.kl for row in shown], [row.standard_error for row in shown]
        axes.errorbar(where[0], where[1], where[2], fmt=marker, color=colour, label=label, capsize=2, alpha=0.8)
    for row in record.uniform:
        if row.kl > 0:
            at = {"fontsize": 7, "xytext": (4, 4), "textcoords": "offset points"}
            axes.annotate(write_choice(read_pairs(row.pairs)[0]), (row.real_bits, row.kl), **at)
    front = _front(record.searched)
    axes.step([row.real_bits for row in front], [row.kl for row in front], where="post", color="#9467bd", linewidth=0.8)
    best = record.finalists[0]
    axes.plot(best.real_bits, max(best.kl, FLOOR), marker="*", markersize=14, color="black", label="table")
    axes.axvline(record.budget_bits, color="black", linewidth=0.8, linestyle=":", label="budget")
    axes.set(yscale="log", xlabel="real bits per element", ylabel="mean KL, nats", title="search text")
    axes.legend(fontsize=8)


def _front(rows: Sequence[Row]) -> list[Row]:
    found: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.bytes_per_token, r.kl)):
        if row.kl > 0 and (not found or row.kl < found[-1].kl):
            found.append(row)
    return found


def _draw_table(axes: Any, table: Table) -> None:
    layers = range(len(table.payload.pairs))
    for side, sign in ((0, -1), (1, 1)):
        bits = [pair[side] for pair in table.payload.pairs]
        axes.barh(layers, [sign * b for b in bits], color=[COLOURS[b] for b in bits])
    axes.set_xticks((-16, -8, -4, 4, 8, 16), ("16", "8", "4", "4", "8", "16"))
    axes.set(title="key bits | value bits", ylabel="layer", ylim=(len(layers) - 0.5, -0.5))
    axes.axvline(0, color="black", linewidth=0.8)


def write_report(record: Record, table: Table, html: Path) -> tuple[Path, Path]:
    """Write the page, which needs no other file, and the picture as PNG beside it; return both paths.

    Raises:
        EnvironmentRefused: matplotlib or jinja2 is not installed.
        InputRefused: the place cannot be written.
    """
    from jettison.plugins.kvtuner.report_page import render

    picture = draw(record, table)
    page = render(record, table, base64.b64encode(picture).decode("ascii"))
    write_atomically(html.with_suffix(".png"), picture)
    write_atomically(html, page)
    return html, html.with_suffix(".png")
