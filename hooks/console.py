"""How the command line prints: results on stdout, notes and progress on stderr, JSON on request."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.progress import Progress

Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(command: Command) -> Command:
    """Add the flag `--json`, passed as `as_json`."""
    decorated: Command = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)
    return decorated


def print_json(content: Any) -> None:
    """Print JSON on stdout."""
    click.echo(json.dumps(content, indent=1))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Print a table on stdout; columns of numbers are right-aligned. Text is printed as it is, not as markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [list(row) for row in rows]
    table = Table(title=title)
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(isinstance(row[index], (int, float)) for row in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(_text(cell)) for cell in row))
    Console().print(table)


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    return f"{cell:,.4g}" if isinstance(cell, float) else str(cell)


def progress() -> Progress:
    """Return a progress bar on stderr, silent where stderr is no terminal. For anything over two seconds."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, disable=not console.is_terminal, transient=True)
