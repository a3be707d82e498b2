"""Reading and writing files without surprises: bounded, strict JSON and YAML in; write-then-rename out."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from jettison.hooks.errors import InputRefused

MAX_BYTES = 64 << 20
MAX_DEPTH = 64


def read_document(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Any:
    """Return the content of a `.json`, `.yaml` or `.yml` file.

    Raises:
        InputRefused: missing, too large, not UTF-8, malformed, a duplicate key, NaN or infinity, nested too deeply.
    """
    where = Path(path)
    if where.suffix not in (".json", ".yaml", ".yml"):
        raise InputRefused(
            f"{where} ends in {where.suffix!r}", allowed="allowed are .json, .yaml and .yml", do="convert the file"
        )
    return parse_document(_read_text(where, max_bytes), str(where), yaml=where.suffix != ".json")


def _read_text(where: Path, max_bytes: int) -> str:
    try:
        with where.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputRefused(f"cannot read {str(where)!r} ({reason})", do="check the path") from error
    if len(data) > max_bytes:
        raise InputRefused(f"{where} is larger than {max_bytes} bytes", do="give the right file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputRefused(f"{where} is not UTF-8 (byte {error.start})", do="write it as UTF-8") from error


def parse_document(text: str, where: str, *, yaml: bool = False) -> Any:
    """Parse JSON (or plain YAML: no tags, no anchors) as strictly as `read_document`; `where` names it in errors."""
    try:
        content = _parse_yaml(text) if yaml else _parse_json(text)
        check_plain(content)
    except RecursionError as error:
        raise InputRefused(f"{where} is nested too deeply", allowed=f"allowed are {MAX_DEPTH} levels") from error
    except ValueError as error:
        raise InputRefused(f"{where} cannot be used: {error}", do="write it again") from error
    return content


def _parse_json(text: str) -> Any:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
        return content

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    return json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant)


def _parse_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain YAML: aliases (so no exponential growth) and duplicate keys are refused."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("YAML aliases are not allowed")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            content = super().construct_mapping(node, deep=deep)
            if len(content) != len(node.value):
                raise ValueError("a key occurs twice")
            return content

    try:
        return yaml.load(text, Loader=Loader)  # noqa: S506  a SafeLoader, stricter
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def check_plain(value: Any, place: str = "", depth: int = 0) -> None:
    """Raise ValueError unless `value` is made of JSON's types only, with finite numbers and valid text.

    The message names the place, e.g. `kvtuner.table.layers[3]`, never the value: it may be a secret.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"{place or 'the document'} is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{place or 'the document'} has the key {key!r}, which is not text")
            check_plain(key, f"a key of {place or 'the document'}", depth + 1)
            check_plain(item, f"{place}.{key}" if place else key, depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_plain(item, f"{place}[{index}]", depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{place or 'the document'} is not a finite number")
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place or 'the document'} holds a lone surrogate") from error
    elif value is not None and not isinstance(value, (bool, int)):
        raise ValueError(f"{place or 'the document'} is of type {type(value).__name__}, which JSON does not have")


def write_atomically(path: str | os.PathLike[str], data: str | bytes, *, mode: int = 0o644) -> Path:
    """Write a file beside its place, flush it to disk and rename it: readers see the old file or the new one.

    Raises:
        InputRefused: the folder is missing or not writable, or the disk is full. Nothing is left behind.
    """
    target = Path(path)
    content = data.encode("utf-8") if isinstance(data, str) else data
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except (OSError, ValueError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputRefused(f"cannot write {target} ({reason})", do="give a writable place") from error
    return target
