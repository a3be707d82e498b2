"""`jettison kvtuner check` and `drift`: what a model bears, and whether that depends on the text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jettison.hooks.console import json_option, print_json, print_table, progress

if TYPE_CHECKING:
    from torch import Tensor

    from jettison.plugins.kvtuner.detector import Verdict
    from jettison.plugins.kvtuner.drift import Drift
    from jettison.plugins.kvtuner.sensitivity import Progress

REQUIRABLE = ("k8v8", "k8v4", "k4v8", "k4v4")
"""`detector.UNIFORM` written out: the detector imports torch, which `--help` does not need."""

_FILE = click.Path(dir_okay=False, path_type=Path)
_output = click.option(
    "-o",
    "--output",
    type=_FILE,
    help="JSON to write, with a picture (.png) beside it; measurements are kept in .parts, to resume.",
)


@click.command()
@click.argument("model")
@click.option("--text", "files", multiple=True, type=_FILE, help="Text file to use instead of the packaged data.")
@click.option("--texts", default=2, show_default=True, type=click.IntRange(1), help="Texts of the packaged data.")
@click.option("--length", default=512, show_default=True, type=click.IntRange(64), help="Tokens per text.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--require",
    type=click.Choice(REQUIRABLE),
    help="A gate: exit code 1 unless MODEL bears this pair, with rotation and key statistics.",
)
@_output
@json_option
def check(
    model: str,
    files: tuple[Path, ...],
    texts: int,
    length: int,
    seed: int,
    require: str | None,
    output: Path | None,
    as_json: bool,
) -> int:
    """Say whether MODEL (a checkpoint folder) bears a uniform 4-bit cache, and which layers break it.

    A model bears what makes its perplexity grow by less than 5 %. A minute for a 135M model on two cores.

    Exit code 0 whatever was found; with --require 1 if the model suffers from that pair or collapses with it.
    """
    from jettison.plugins.kvtuner import calibration, detector, remember

    measuring = remember.remembering(_work(output))
    with progress() as bar:
        show = _reporter(bar)
        show("load model", 0, 1)
        loaded, tokenizer = calibration.load_model(model)
        if files:
            halves = _file_parts(tokenizer, files, 2, length)
            seen, unseen = [part[0] for part in halves], [part[1] for part in halves]
        else:
            seen = calibration.token_texts(tokenizer, "calibration", texts, length)
            unseen = calibration.token_texts(tokenizer, "held-out", texts, length)
        measured = measuring(loaded, seen, sink_tokens=1, seed=seed, progress=show)
        verdict = detector.check(loaded, unseen, measured, name=_name(model), progress=show)
    content = {
        **verdict.as_json(),
        "warning": measured.warning,
        "losses": {"k4": _column(measured, (4, 16)), "v4": _column(measured, (16, 4))},
    }
    _finish(output, content, "check")
    if as_json:
        print_json(content)
    else:
        _print_check(verdict)
        if measured.warning:
            click.echo(f"jettison: {measured.warning}", err=True)
    return _gate(verdict, require)


@click.command()
@click.argument("model")
@click.option("--first", multiple=True, type=_FILE, help="Text files of one domain; default: packaged mathematics.")
@click.option("--second", multiple=True, type=_FILE, help="Text files of the other; default: packaged articles.")
@click.option("--table", "tables", multiple=True, type=_FILE, help="Table to run on both, instead of making some.")
@click.option("--bits", default=4.25, show_default=True, help="Real bits per element of the tables made.")
@click.option("--length", default=512, show_default=True, type=click.IntRange(64), help="Tokens per text.")
@click.option("--seed", default=0, show_default=True)
@_output
@json_option
def drift(
    model: str,
    first: tuple[Path, ...],
    second: tuple[Path, ...],
    tables: tuple[Path, ...],
    bits: float,
    length: int,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Compare the layers of MODEL (a checkpoint folder) on two kinds of text, and what the other's table costs.

    Two minutes for a 135M model on two cores.
    """
    from functools import partial

    from jettison.hooks.errors import ConfigError
    from jettison.plugins.kvtuner import calibration, remember
    from jettison.plugins.kvtuner import drift as library

    if bool(first) != bool(second):
        raise ConfigError("one domain is given", allowed="allowed are both --first and --second, or none")
    measuring = partial(remember.remembering(_work(output)), seed=seed)
    with progress() as bar:
        show = _reporter(bar)
        show("load model", 0, 1)
        loaded, tokenizer = calibration.load_model(model)
        texts, held_out = _domains(tokenizer, first, second, length)
        found = library.drift(
            loaded,
            texts,
            held_out=held_out,
            tables=_formats(tables, loaded) if tables else None,
            name=_name(model),
            real_bits=bits,
            measuring=measuring,
            progress=show,
        )
    _finish(output, found.as_json(), "drift")
    if as_json:
        print_json(found.as_json())
        return
    _print_drift(found)


def _domains(
    tokenizer: Any, first: Sequence[Path], second: Sequence[Path], length: int
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    from jettison.plugins.kvtuner import calibration

    if first:
        texts, held_out = {}, {}
        for name, files in (("first", first), ("second", second)):
            cut = _file_parts(tokenizer, files, 3, length)
            texts[name] = [half for part in cut for half in part[:2]]
            held_out[name] = [part[2] for part in cut]
        return texts, held_out
    whole = calibration.token_texts(tokenizer, "calibration", 4, length)
    unseen = calibration.token_texts(tokenizer, "held-out", 2, length)
    texts = {"mathematics": whole[:2], "articles": whole[2:]}
    return texts, {"mathematics": unseen[:1], "articles": unseen[1:]}


def _formats(tables: Sequence[Path], model: Any) -> dict[str, Any]:
    from jettison.plugins.kvtuner.quality import stored
    from jettison.plugins.kvtuner.stream import dimensions
    from jettison.plugins.kvtuner.table import load_table

    own, found = dimensions(model), {}
    for path in tables:
        table = load_table(path)
        table.check_model(own, table=str(path))
        found[path.stem] = stored(table)
    return found


def _file_parts(tokenizer: Any, files: Sequence[Path], count: int, length: int) -> list[list[Tensor]]:
    """Each file's first tokens in `count` consecutive parts of at most `length`."""
    from jettison.hooks.errors import InputRefused
    from jettison.plugins.kvtuner.calibration import MIN_TOKENS, file_texts

    found = []
    for file, ids in zip(files, file_texts(tokenizer, files, count * length), strict=True):
        size = len(ids) // count
        if size < MIN_TOKENS:
            raise InputRefused(f"{file} has {len(ids)} tokens", allowed=f"at least {count * MIN_TOKENS} are needed")
        found.append([ids[number * size : (number + 1) * size] for number in range(count)])
    return found


def _reporter(bar: Any) -> Progress:
    task = bar.add_task("load")

    def show(what: str, done: int, total: int) -> None:
        bar.update(task, description=what, completed=done, total=total)

    return show


def _name(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model


def _work(output: Path | None) -> Path | None:
    """Folder of the kept measurements; refuses, before anything is measured, an output that has no folder."""
    from jettison.hooks.errors import InputRefused

    if output is None:
        return None
    if not output.parent.is_dir():
        raise InputRefused(f"cannot write {output} (no such folder)", do="give a writable place")
    return output.with_suffix(".parts")


def _column(measured: Any, pair: tuple[int, int]) -> list[float]:
    from jettison.plugins.kvtuner.sensitivity import PAIRS

    return [float(value) for value in measured.kl[:, PAIRS.index(pair)]]


def _finish(output: Path | None, content: dict[str, Any], kind: str) -> None:
    if output is None:
        return
    import json

    from jettison.hooks.files import write_atomically
    from jettison.plugins.kvtuner import guard_pictures, remember

    write_atomically(output.with_suffix(".png"), getattr(guard_pictures, kind)(content))
    write_atomically(output, json.dumps(content, indent=1) + "\n")
    remember.forget(_work(output))


def _print_check(verdict: Verdict) -> None:
    rows = [(run.pair, run.codec, run.kl, run.growth, run.top1_agreement, run.level) for run in verdict.runs]
    columns = ("pair", "codec", "KL, nats", "perplexity x", "top-1 agreement", "the model")
    title = f"{verdict.model}, {verdict.tokens} tokens; real bits are {verdict.real_bits - 4:g} above the nominal ones"
    print_table(columns, rows, title=title)
    click.echo(f"{verdict.sentence}\n{verdict.recommendation}")


def _gate(verdict: Verdict, require: str | None) -> int:
    """The exit code of `check`: 1, with a sentence, unless the model bears the pair that is required."""
    from jettison.plugins.kvtuner.detector import SUFFERS

    if require is None:
        return 0
    run = verdict.run(require, "measured")
    if run.level == "bears":
        return 0
    click.echo(
        f"jettison: {verdict.model} {run.level} {require}: perplexity times {run.growth:.2f}, required is less than "
        f"{SUFFERS:g}",
        err=True,
    )
    return 1


def _print_drift(found: Drift) -> None:
    rankings = [
        (own.metric, own.pair, own.within, own.across, "drifts" if own.drifts else "same") for own in found.rankings
    ]
    columns: tuple[str, ...] = ("metric", "pair", "within a domain", "across", "ranking")
    print_table(columns, rankings, title="Spearman's correlation over layers")
    bits = "" if found.real_bits is None else f", {found.real_bits:.2f} real bits ({found.nominal_bits:.2f} nominal)"
    transfers = [
        (run.table, run.half, run.domain, run.kl, run.standard_error, run.top1_agreement) for run in found.transfers
    ]
    columns = ("table", "half", "text", "KL, nats", "standard error", "top-1 agreement")
    print_table(columns, transfers, title=f"tables{bits}")
    click.echo(f"{found.sentence}\n{found.recommendation}")
