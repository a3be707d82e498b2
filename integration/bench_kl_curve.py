"""KL against real bytes on SmolLM2: uniform pairs and selected tables, teacher-forced on held-out text.

    python integration/bench_kl_curve.py [--positions 1024] [--quick]

The model runs in float32 in Hugging Face transformers; every token attends to stored keys and values of all layers.
Writes JSON and, beside it, the curve as PNG and SVG. Bytes count scales, zeros and the sink area at blocks of 128
tokens. The control tables are the selected one with its layers shuffled, and tables chosen by the paper's e_o and by
its norm ratio instead of the predicted KL.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from jettison.csrc.layout import PageLayout
from jettison.hooks import assets
from jettison.hooks.console import print_table, progress
from jettison.hooks.quality import Quality
from jettison.hooks.results import Results
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner import calibration, quality, sensitivity
from jettison.plugins.kvtuner.detector import measured_formats
from jettison.plugins.kvtuner.table import ModelShape, Pair

HERE = Path(__file__).resolve().parent
BLOCK = 128
UNIFORM: tuple[Pair, ...] = ((8, 8), (8, 4), (4, 8), (4, 4), (8, 2), (4, 2), (2, 2))
RATIOS = (2.5, 2.75, 3.0, 3.25, 3.5, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=HERE.parent / "build")
    parser.add_argument("--positions", type=int, default=1024, help="tokens of each of the four held-out texts")
    parser.add_argument("--quick", action="store_true", help="K8V8, K4V4 and the 3x table only")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "kl_curve.json")
    options = parser.parse_args()
    results = Results.start()
    folder = str(assets.checkpoint(options.build))
    model, tokenizer = calibration.load_model(folder)
    settings = calibration.Settings()
    calibration_texts = calibration.token_texts(tokenizer, "calibration", settings.texts, settings.length)
    with progress() as bar:
        task = bar.add_task("sensitivity")
        measured = sensitivity.measure(model, calibration_texts, sink_tokens=settings.sink_tokens)
        texts = calibration.token_texts(tokenizer, "held-out", 4, options.positions)
        references = [quality.log_probabilities(model, ids) for ids in texts]
        shape = calibration.model_shape(folder, measured)
        cases = list(_cases(measured, shape, settings, quick=options.quick))
        for done, (case, system, formats) in enumerate(cases):
            bar.update(task, description=f"{case} {system}", completed=done, total=len(cases))
            _record(results, case, system, formats, quality.evaluate(model, texts, references, formats))
            results.write(options.output)
    metrics = ("capacity_ratio", "bytes_per_token_head", "mean_kl", "standard_error", "top1_agreement")
    rows = [(case, system, *(results.value(case, metric, system) for metric in metrics)) for case, system, _ in cases]
    print_table(("case", "system", *metrics), rows, title=f"{len(texts)} x {options.positions} positions")
    _picture(results, cases, options.output)


def _picture(results: Results, cases: Sequence[tuple[str, str, list[KVFormat]]], file: Path) -> None:
    """Mean KL (log scale, standard errors) against bytes per token and head, as PNG and SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    series = {
        "tables, one 16-bit sink token": ("o-", lambda case, system: case.startswith("table") and system == "jettison"),
        "uniform pairs, same codec": ("s", lambda case, system: case.startswith("k") and system == "jettison"),
        "uniform pairs, plain codec": ("x", lambda case, system: case.startswith("k") and system != "jettison"),
        "3x tables: controls": (".", lambda case, system: case.startswith("table") and system != "jettison"),
    }
    for label, (marker, belongs) in series.items():
        chosen = [(case, system) for case, system, _ in cases if belongs(case, system)]
        columns = [
            [results.value(case, metric, system) for case, system in chosen]
            for metric in ("bytes_per_token_head", "mean_kl", "standard_error")
        ]
        axes.errorbar(*columns, fmt=marker, label=label, capsize=2)
        if "pairs" in label:
            for (case, _), x, y in zip(chosen, *columns[:2], strict=True):
                axes.annotate(case, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.axhline(0.02, color="grey", linewidth=0.8, linestyle=":", label="limit, 0.02 nats")
    axes.set(yscale="log", xlabel="bytes per token and KV head (bf16: 256)", ylabel="mean KL, nats")
    axes.set_title(f"{results.command}", fontsize=8)
    axes.legend(fontsize=8)
    for suffix in (".png", ".svg"):
        figure.savefig(file.with_suffix(suffix), dpi=150)


def _cases(
    measured: sensitivity.Sensitivity, shape: ModelShape, settings: calibration.Settings, *, quick: bool
) -> Iterator[tuple[str, str, list[KVFormat]]]:
    sinks = settings.sink_tokens
    for pair in ((8, 8), (4, 4)) if quick else UNIFORM:
        formats = measured_formats([pair] * shape.num_layers, measured, sinks)
        yield f"k{pair[0]}v{pair[1]}", "jettison", formats
        if not quick:
            plain = [KVFormat(*pair) for _ in formats]
            yield f"k{pair[0]}v{pair[1]}", "no rotation, centre, equalisation, sink", plain
    for ratio in (3.0,) if quick else RATIOS:
        pairs, _ = calibration.choose_pairs(measured, shape, replace(settings, ratio=ratio))
        yield f"table {ratio:g}x", "jettison", measured_formats(pairs, measured, sinks)
    if quick:
        return
    for tokens in (0, 2, 4):
        other = replace(settings, sink_tokens=tokens)
        pairs, _ = calibration.choose_pairs(measured, shape, other)
        yield "table 3x", f"{tokens} sink tokens", measured_formats(pairs, measured, tokens)
    pairs, _ = calibration.choose_pairs(measured, shape, settings)
    shuffled = pairs.copy()
    random.Random(0).shuffle(shuffled)
    yield "table 3x", "layers shuffled", measured_formats(shuffled, measured, sinks)
    for name, errors in (("e_o", measured.output_error), ("norm ratio", measured.output_norm_ratio.square())):
        pairs, _ = calibration.choose_pairs(replace(measured, kl=errors), shape, settings)
        yield "table 3x", f"ranked by {name}", measured_formats(pairs, measured, sinks)


def _record(results: Results, case: str, system: str, formats: Sequence[KVFormat], found: Quality) -> None:
    size = 64
    layouts = [PageLayout(size, form.key_bits, form.value_bits, form.sink_tokens) for form in formats]
    mean = sum(layout.bytes_per_token(BLOCK) for layout in layouts) / len(layouts)
    results.add(case, system, "bytes_per_token_head", mean, "bytes")
    results.add(case, system, "capacity_ratio", 4 * size / mean, "ratio")
    results.add(case, system, "mean_kl", found.mean_kl, "nats")
    results.add(case, system, "standard_error", found.standard_error, "nats")
    results.add(case, system, "median_kl", found.median_kl, "nats")
    results.add(case, system, "p99_kl", found.p99_kl, "nats")
    results.add(case, system, "worst_percent_share", found.worst_percent_share, "ratio")
    results.add(case, system, "top1_agreement", found.top1_agreement, "ratio")
    results.add(case, system, "positions", found.positions, "tokens")


if __name__ == "__main__":
    main()
