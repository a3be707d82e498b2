"""`jettison kvtuner search`, `report` and `compare`: find a table, see how it was found, hold tables side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jettison.hooks.console import json_option, print_json, print_table, progress
from jettison.hooks.errors import InputRefused
from jettison.plugins.kvtuner.summary import print_summary, summary
from jettison.plugins.kvtuner.table import load_table

if TYPE_CHECKING:
    from jettison.plugins.kvtuner.prepare import Prepared
    from jettison.plugins.kvtuner.sensitivity import Progress
    from jettison.plugins.kvtuner.tune import Outcome

_PATH = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("model")
@click.option("-o", "--output", type=_PATH, required=True, help="Table to write.")
@click.option("--bits", type=float, help="Budget in real bits per element, scales and zeros included.")
@click.option("--bytes", "size", type=int, help="Budget in bytes per token, all layers and KV heads.")
@click.option("--ratio", type=float, help="Budget as cache capacity, a multiple of a 16-bit cache.")
@click.option("--sampler", type=click.Choice(["nsga2", "moead", "dp"]), default="nsga2", show_default=True)
@click.option("--groups", default="singleton", show_default=True, help="auto, singleton, or a number of groups.")
@click.option("--metric", type=click.Choice(["kl", "e_o", "norm-ratio"]), default="kl", show_default=True)
@click.option(
    "--codecs", help="Names that keys and values choose from, with commas between; see jettison kvtuner codecs."
)
@click.option("--trials", default=64, show_default=True, help="Candidates to run through the model.")
@click.option("--population", default=16, show_default=True, help="Of the sampler; as many seeds come first.")
@click.option("--sink-tokens", "sinks", multiple=True, type=int, default=(0, 1), show_default=True)
@click.option("--block-size", default=128, show_default=True, help="Tokens per block of the engine.")
@click.option("--length", default=1024, show_default=True, help="Tokens per calibration text.")
@click.option("--search-length", default=320, show_default=True, help="Tokens of each text a candidate is run on.")
@click.option("--finalists", default=6, show_default=True, help="Candidates ranked again on another text.")
@click.option("--items", default=100, show_default=True, help="Task items for the finalists; 0 for none.")
@click.option("--task", "task_path", type=_PATH, help='JSON lines of {"context", "continuation"}; default LAMBADA.')
@click.option("--text", "files", multiple=True, type=click.Path(path_type=Path), help="Text file to calibrate on.")
@click.option("--seed", default=0, show_default=True)
@json_option
def search(model: str, output: Path, as_json: bool, **given: Any) -> None:
    """Search the table of least loss for MODEL within a budget.

    Exactly one of --bits, --bytes and --ratio is needed. The state lies in OUTPUT.search: a search that was stopped
    goes on when the same command is given again, and more --trials continue it. A report is written there at the end.

    Without --codecs layers choose among 16, 8, 4 and 2 bits with rotation, which engines serve.
    """
    from jettison.plugins.kvtuner.report import make_record, save_record, write_report

    started = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("load")

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        work = work_folder(output)
        prepared, budget, outcome = _run(model, work, given, show)
    _warn_of_ranks(prepared)
    record = make_record(prepared, outcome, budget)
    outcome.table.save(output)
    save_record(record, work / "record.json")
    page, picture = write_report(record, outcome.table, work / "report.html")
    facts = {
        **summary(outcome.table),
        "evaluations": outcome.evaluations,
        "seconds": round(time.perf_counter() - started, 1),
        "report": str(page),
        "picture": str(picture),
    }
    if as_json:
        print_json(facts)
        return
    print_table(FINAL_COLUMNS, [_final_row(row) for row in record.finalists], title="finalists, best first")
    print_summary(outcome.table)
    click.echo(f"{output} written in {facts['seconds']:.0f} s, report in {page}")


def _run(model: str, work: Path, given: dict[str, Any], show: Progress) -> tuple[Prepared, int, Outcome]:
    from jettison.plugins.kvtuner import tasks
    from jettison.plugins.kvtuner.group import parse_how
    from jettison.plugins.kvtuner.ledger import Ledger
    from jettison.plugins.kvtuner.prepare import TuneSettings, check_budget_flags, prepare, resolve_budget
    from jettison.plugins.kvtuner.search import SearchSettings
    from jettison.plugins.kvtuner.tune import tune

    budget_flags = {name: given[name] for name in ("bits", "size", "ratio")}
    check_budget_flags(**budget_flags)
    settings = TuneSettings(
        groups=parse_how(given["groups"]),
        search=SearchSettings(given["sampler"], given["trials"], given["population"], given["seed"]),
        **{
            name: given[name]
            for name in ("metric", "sinks", "block_size", "length", "search_length", "finalists", "items")
        },
        codecs=tuple(word.strip() for word in (given["codecs"] or "").split(",") if word.strip()),
    )
    make_folder(work)
    with Ledger(work / "journal.log") as ledger:
        prepared = prepare(model, settings, given["files"], work, progress=show)
        task = None
        if settings.items and given["task_path"] is not None:
            task = tasks.task_file(prepared.tokenizer, given["task_path"], settings.items)
        elif settings.items:
            task = tasks.lambada(prepared.tokenizer, "calibration", settings.items)
        budget = resolve_budget(prepared.shape, **budget_flags)
        return prepared, budget, tune(prepared, budget, settings, ledger, task, progress=show)


@click.command()
@click.argument("table", type=_PATH)
@click.option("-o", "--output", type=_PATH, help="HTML to write; default is in the folder of the search.")
@json_option
def report(table: Path, output: Path | None, as_json: bool) -> None:
    """Draw the report of a TABLE that `search` made, from the record beside it."""
    from jettison.plugins.kvtuner.report import load_record, write_report

    content = load_table(table)
    work = work_folder(table)
    page, picture = write_report(load_record(work / "record.json", content), content, output or work / "report.html")
    if as_json:
        print_json({"report": str(page), "picture": str(picture)})
    else:
        click.echo(f"written: {page} and {picture}")


@click.command()
@click.argument("tables", nargs=-1, required=True)
@click.option("--model", required=True, help="Checkpoint folder.")
@click.option("--texts", default=2, show_default=True, help="Held-out texts of the packaged data.")
@click.option("--length", default=1024, show_default=True, help="Tokens per text.")
@click.option("--text", "files", multiple=True, type=click.Path(path_type=Path), help="Text file to use instead.")
@click.option("--items", default=0, show_default=True, help="LAMBADA items for the last-word accuracy.")
@click.option("--sink-tokens", default=0, show_default=True, help="Of pairs and codecs; a table has its own.")
@click.option("--block-size", default=128, show_default=True, help="Tokens per block of the engine.")
@json_option
def compare(tables: tuple[str, ...], model: str, as_json: bool, **given: Any) -> None:
    """Run TABLES against each other on text that no search has seen.

    A table is a file, a pair such as k8v4 (rotated, as engines store it), or two codecs such as fp8/int4 (see jettison
    kvtuner codecs). Differences are to the first, on the same positions.
    """
    from jettison.plugins.kvtuner.compare import run_compare

    with progress() as bar:
        task = bar.add_task("load")
        rows = run_compare(
            tables, model, **given, progress=lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            )
        )  # fmt: skip
    if as_json:
        print_json(rows)
        return
    columns = tuple(rows[0])
    print_table(columns, [tuple(row.values()) for row in rows], title=f"{Path(model).name}, held-out text")


@click.command()
@click.option("--head-size", default=64, show_default=True, type=click.IntRange(32, 256), help="Of the model.")
@json_option
def codecs(head_size: int, as_json: bool) -> None:
    """List the codecs that search --codecs and compare take: built in, and of installed packages.

    Engines serve those on packed pages, all rotated (-hadamard) or none. The Hugging Face cache stores these, however
    mixed, and fp8; the others are measured and compared.
    """
    from jettison.plugins.kvtuner.codecs import get, names

    rows = []
    for codec in map(get, names()):
        size = codec.bytes_per_token(head_size)
        pages = codec.page_bits is not None
        rows.append({"codec": codec.name, "bits": codec.bits, "real_bits": 8 * size / head_size, "pages": pages})
    if as_json:
        print_json(rows)
        return
    shown = [(row["codec"], row["bits"], row["real_bits"], "yes" if row["pages"] else "no") for row in rows]
    print_table(("codec", "bits", "real bits", "packed pages"), shown, title=f"one side, head size {head_size}")


def _warn_of_ranks(prepared: Prepared) -> None:
    found = prepared.measured[prepared.space.sinks[0]].disagreements()
    if found:
        worst = min(found, key=lambda one: one.correlation)
        click.echo(
            f"warning: e_o and its norm ratio rank the layers differently for {len(found)} of "
            f"{len(prepared.space.options)} pairs (least Spearman correlation {worst.correlation:.2f}, {worst.option});"
            " the search goes by --metric",
            err=True,
        )


FINAL_COLUMNS = ("from", "real bits", "nominal bits", "bytes per token", "KL, search", "KL, validation", "±", "right")


def _final_row(row: Any) -> tuple[object, ...]:
    sizes = (row.real_bits, row.nominal_bits, row.bytes_per_token)
    return (row.origin, *sizes, row.kl, row.validation_kl, row.validation_error, row.correct)


def work_folder(table: Path) -> Path:
    """Folder of the state of the search for `table`: table.json -> table.search."""
    if table.suffix not in (".json", ".yaml", ".yml"):
        raise InputRefused(f"{table} ends in {table.suffix!r}", allowed="allowed is .json", do="name it table.json")
    return table.with_suffix(".search")


def make_folder(folder: Path) -> None:
    """Make `folder`; its parent must exist."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputRefused(f"cannot make {folder} ({error.strerror})", do="give a writable place") from error
