"""Accuracy against thinking tokens, one point per setting."""

from __future__ import annotations

import io
from collections.abc import Mapping

from jettison.hooks.errors import EnvironmentRefused
from jettison.plugins.trimr.replay_choose import Figures, Setting


def draw(found: Mapping[Setting, Figures], chosen: Setting | None, measure: str) -> bytes:
    """Draw the settings of at least one as PNG; `measure` names the upright axis."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EnvironmentRefused("package 'matplotlib' is not installed", do="pip install 'jettison[think]'") from error
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    first = next(iter(found.values()))
    axes.scatter([first.whole_tokens], [first.whole_accuracy], marker="s", color="#7f7f7f", label="no control")
    for mode, colour in (("consecutive", "#1f77b4"), ("windowed", "#2ca02c")):
        points = [(s, f) for s, f in found.items() if dict(s.values).get("count_mode", "consecutive") == mode]
        if not points:
            continue
        x, y = [f.tokens for _, f in points], [f.accuracy for _, f in points]
        spread = [[f.loss_interval[1] - f.loss for _, f in points], [f.loss - f.loss_interval[0] for _, f in points]]
        low_high = [[max(0.0, value) for value in row] for row in spread]
        axes.errorbar(x, y, yerr=low_high, fmt="o", color=colour, capsize=3, alpha=0.8, label=mode)
        for setting, point in points:
            axes.annotate(f"M={dict(setting.values).get('M', '')}", (point.tokens, point.accuracy), fontsize=7)
    if chosen is not None:
        point = found[chosen]
        label = f"chosen: {chosen.name}"
        axes.scatter([point.tokens], [point.accuracy], s=180, facecolors="none", edgecolors="#d62728", label=label)
    axes.set_xlabel("mean thinking tokens")
    axes.set_ylabel(f"{measure} (bars: 95 % interval of the loss)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()
