"""The log of what was seen and decided: JSON lines, one event each, appended while requests run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jettison.hooks.errors import InputRefused
from jettison.hooks.files import parse_document
from jettison.plugins.trimr.types import TraceEvent

MAX_LINE = 16 << 20


class Line(BaseModel):
    """One line: an event of one choice of one request. `run` tells the runs apart that appended to one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Annotated[str, Field(max_length=64)] = ""
    request: Annotated[str, Field(min_length=1, max_length=200)]
    choice: Annotated[int, Field(ge=0)] = 0
    expected: Annotated[str, Field(max_length=10_000)] | None = None
    event: TraceEvent


class TraceLog:
    """Appends to a file; lines are whole, also when the process dies between two.

    Args:
        path: the file; it is made if it is missing.

    Raises:
        InputRefused: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        from uuid import uuid4

        try:
            self._stream = path.open("ab", buffering=0)
        except OSError as error:
            raise InputRefused(f"cannot write {path} ({error.strerror})", do="give a writable place") from error
        self._run = uuid4().hex[:12]

    def write(self, request: str, choice: int, event: TraceEvent) -> None:
        """Append one event."""
        line = Line(run=self._run, request=request, choice=choice, event=event)
        self._stream.write(line.model_dump_json(exclude_none=True).encode("utf-8", "replace") + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


@dataclass(frozen=True)
class Trace:
    """All events of one choice of one request, in order; `expected` is the right answer where the log says it."""

    name: str
    events: tuple[TraceEvent, ...]
    expected: str | None = None


def read_traces(path: Path) -> list[Trace]:
    """Return the traces of a log, in order of their first events.

    A last line without its line end was cut off by a stop, and is left out; traces that did not end are left out too.

    Raises:
        InputRefused: missing, not JSON lines of this kind, or without a whole trace.
    """
    found: dict[str, list[TraceEvent]] = {}
    expected: dict[str, str] = {}
    for number, text in _lines(path):
        content: Any = parse_document(text, f"{path}, line {number}")
        try:
            line = Line.model_validate_json(json.dumps(content))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            place = ".".join(map(str, first["loc"])) or "the whole"
            raise InputRefused(
                f"{path}, line {number} is refused at {place}: {first['msg']}",
                allowed="allowed are lines of `jettison trimr proxy --log`",
                do="give the file as it was written",
            ) from error
        name = f"{line.run}/{line.request}/{line.choice}"
        found.setdefault(name, []).append(line.event)
        if line.expected is not None:
            expected[name] = line.expected
    whole = [Trace(name, tuple(events), expected.get(name)) for name, events in found.items() if _is_whole(events)]
    if not whole:
        raise InputRefused(f"{path} has no trace from start to finish", do="log requests that end")
    return whole


def _is_whole(events: Iterable[TraceEvent]) -> bool:
    kinds = [event.event for event in events]
    return kinds[0] == "start" and kinds[-1] == "finish"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE + 1), b""), 1):
                if len(line) > MAX_LINE:
                    raise InputRefused(f"{path}, line {number} is longer than {MAX_LINE} bytes")
                if line.endswith(b"\n") and line.strip():
                    yield number, line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputRefused(f"{path} is not UTF-8", do="give the file as it was written") from error
    except OSError as error:
        raise InputRefused(f"cannot read {str(path)!r} ({error.strerror})", do="check the path") from error
