"""Pictures of `check` and `drift`, as PNG bytes from their JSON."""

from __future__ import annotations

from io import BytesIO
from textwrap import fill
from typing import Any

from jettison.hooks.errors import EnvironmentRefused


def check(content: dict[str, Any]) -> bytes:
    """Perplexity of uniform pairs, and what each layer is predicted to lose."""
    figure = _figure()
    left, right = figure.subplots(1, 2)
    for codec, marker in (("plain", "x"), ("measured", "o")):
        runs = [run for run in content["runs"] if run["codec"] == codec]
        labels, factors = [run["pair"] for run in runs], [run["perplexity_factor"] for run in runs]
        left.plot(labels, factors, marker, label=f"{codec} codec")
    for factor, name in ((1.05, "suffers"), (1.5, "collapses")):
        left.axhline(factor, color="grey", linewidth=0.8, linestyle=":")
        left.annotate(name, (0, factor), fontsize=7, va="bottom")
    left.set(yscale="log", ylabel="perplexity, as a factor", title="uniform pairs")
    left.legend(fontsize=8)
    for side, losses in content["losses"].items():
        right.plot(losses, ".-", label=f"{'keys' if side == 'k4' else 'values'} at 4 bits")
    for layer in content["culprits"]:
        right.axvline(layer, color="grey", linewidth=0.6, linestyle=":")
    right.set(yscale="log", xlabel="layer", ylabel="predicted KL, nats", title="layers, each alone")
    right.legend(fontsize=8)
    figure.suptitle(fill(content["sentence"], 160), fontsize=8)
    return _png(figure)


def drift(content: dict[str, Any]) -> bytes:
    """Losses of the layers on one domain against the other, and what rankings have in common."""
    figure = _figure()
    left, right = figure.subplots(1, 2)
    first, second = content["losses"]
    left.plot(first, second, ".")
    for layer, at in enumerate(zip(first, second, strict=True)):
        left.annotate(str(layer), at, fontsize=6)
    ends = [min(*first, *second), max(*first, *second)]
    left.plot(ends, ends, color="grey", linewidth=0.6)
    names = content["domains"]
    left.set(xscale="log", yscale="log", xlabel=f"{names[0]}, nats", ylabel=f"{names[1]}, nats")
    left.set_title("predicted KL of each layer at 4 bits")
    labels = [f"{ranking['pair']}\n{ranking['metric']}" for ranking in content["rankings"]]
    for which, marker in (("within", "o"), ("across", "x")):
        right.plot(labels, [ranking[which] for ranking in content["rankings"]], marker, label=f"{which} domains")
    right.tick_params(axis="x", labelsize=5)
    right.set(ylim=(-1.05, 1.05), ylabel="Spearman's correlation over layers", title="rankings")
    right.legend(fontsize=8)
    figure.suptitle(fill(content["sentence"], 160), fontsize=8)
    return _png(figure)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EnvironmentRefused("matplotlib is not installed", do="pip install 'jettison[tune]'") from error
    return Figure(figsize=(11, 4.5), layout="constrained")


def _png(figure: Any) -> bytes:
    stream = BytesIO()
    figure.savefig(stream, dpi=130, format="png")
    return stream.getvalue()
