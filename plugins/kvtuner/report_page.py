"""The page of a report: one HTML file without scripts, styles or pictures from elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jettison.hooks.errors import EnvironmentRefused
from jettison.plugins.kvtuner.artefact import read_pairs
from jettison.plugins.kvtuner.table import Table

if TYPE_CHECKING:
    from jettison.plugins.kvtuner.report import Record

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>KV cache of {{ table.model.name }}</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; color: #222; }
img { max-width: 100%; } table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd; } td.t, th.t { text-align: left; }
</style></head><body>
<h1>KV cache of {{ table.model.name }}</h1>
<p>{{ best.bytes_per_token }} bytes per token of at most {{ record.budget_bytes }}: {{ "%.3f"|format(best.real_bits) }}
real bits per element ({{ "%.3f"|format(best.nominal_bits) }} nominal), {{ best.sink_tokens }} sink tokens.
Mean KL {{ "%.4g"|format(best.kl) }} nats on the search text, {{ "%.4g"|format(best.validation_kl) }} &plusmn;
{{ "%.2g"|format(best.validation_error) }} on the validation text.
{% if uniform %}Best uniform pair of no greater size: {{ uniform.pairs.split("x")[-1] }}, {{ uniform.bytes_per_token }}
bytes per token, mean KL {{ "%.4g"|format(uniform.kl) }} on the search text.{% endif %}</p>
<img alt="heat map, front and table" src="data:image/png;base64,{{ picture }}">
{% if accuracy %}<h2>Task accuracy</h2><table><tr><th class="t">task</th><th>right</th><th>95 % interval</th></tr>
{% for row in accuracy %}<tr><td class="t">{{ row.task }}</td><td>{{ row.correct }} of {{ row.items }}</td>
<td>{{ "%.1f"|format(100 * row.low) }} to {{ "%.1f"|format(100 * row.high) }} %</td></tr>{% endfor %}</table>{% endif %}
<h2>Finalists, best first</h2>{{ rows(record.finalists, True) }}
<h2>Uniform pairs</h2>{{ rows(record.uniform, False) }}
<h2>Layers</h2><table><tr><th>layer</th><th>keys, bits</th><th>values, bits</th><th>group</th></tr>
{% for layer in layers %}<tr><td>{{ layer[0] }}</td><td>{{ layer[1] }}</td><td>{{ layer[2] }}</td>
<td>{{ layer[3] }}</td></tr>{% endfor %}</table>
<p>Table {{ table.payload_sha256 }}, {{ table.created }}, {{ table.source.method }}, seed {{ table.source.seed }},
{{ table.source.data }}; {% for name, found in table.versions.items() %}{{ name }} {{ found }} {% endfor %}</p>
</body></html>
"""

ROWS = """{% macro rows(found, final) %}<table><tr><th class="t">pairs</th><th class="t">from</th><th>sinks</th>
<th>bytes per token</th><th>real bits</th><th>nominal bits</th><th>KL, search</th>
{% if final %}<th>KL, validation</th><th>right</th>{% endif %}</tr>
{% for row in found %}<tr><td class="t">{{ row.pairs }}</td><td class="t">{{ row.origin }}</td>
<td>{{ row.sink_tokens }}</td><td>{{ row.bytes_per_token }}</td><td>{{ "%.3f"|format(row.real_bits) }}</td>
<td>{{ "%.3f"|format(row.nominal_bits) }}</td><td>{{ "%.4g"|format(row.kl) }}</td>
{% if final %}<td>{{ "%.4g"|format(row.validation_kl) }}</td>
<td>{{ "-" if row.correct is none else row.correct }}</td>{% endif %}</tr>{% endfor %}</table>{% endmacro %}"""


def render(record: Record, table: Table, picture: str) -> str:
    """Return the page as HTML; `picture` is base64 of a PNG. Names from the table are escaped."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise EnvironmentRefused("package 'jinja2' is not installed", do="pip install 'jettison[tune]'") from error
    best = record.finalists[0]
    smaller = [row for row in record.uniform if row.bytes_per_token <= best.bytes_per_token]
    groups = table.search.groups if table.search is not None else []
    number = {layer: index for index, layers in enumerate(groups) for layer in layers}
    pairs = read_pairs(best.pairs)
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(ROWS + PAGE)
    return template.render(
        record=record,
        table=table,
        best=best,
        uniform=min(smaller, key=lambda row: row.kl, default=None),
        accuracy=table.search.accuracy if table.search is not None else [],
        layers=[(layer, key, value, number.get(layer, "-")) for layer, (key, value) in enumerate(pairs)],
        picture=picture,
    )
