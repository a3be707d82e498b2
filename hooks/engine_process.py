"""Stock vLLM and vLLM with Jettison, each in its own process and under control: for the demo and the benchmarks."""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from jettison.hooks.compose import compose
from jettison.hooks.errors import EnvironmentRefused
from jettison.hooks.host import Host

TIMEOUT = 900.0
"""Seconds that one command may take."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class EngineProcess(AbstractContextManager["EngineProcess"]):
    """A running engine. `start` has what the engine said of itself: capacity in tokens, seconds, status.

    Args:
        name: of the engine in messages.
        arguments: the model and vLLM's own flags, as after `vllm serve`.
        selections: `--with` selections; none is stock vLLM, with all vLLM plugins left out.
        log: file that takes what the engine prints.
    """

    def __init__(self, name: str, arguments: Sequence[str], selections: Sequence[str], log: Path) -> None:
        self._name, self._log = name, log
        stock = {} if selections else {"VLLM_PLUGINS": ""}
        command = compose(Host.discover(), selections, arguments, folder=log.parent, server=False)
        model, *flags = command.argv[2:]
        with log.open("w", encoding="utf-8") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jettison.hooks.vllm.measure"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **ENVIRONMENT, **stock},
                start_new_session=True,
            )
        self._buffer = b""
        started = time.perf_counter()
        try:
            self.start = self._ask({"start": ["--model", model, *flags]})
        except BaseException:
            self.close()
            raise
        self.start["start_s"] = time.perf_counter() - started

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have the engine run a command of `jettison.hooks.vllm.measure.Engine` and return its answer.

        Raises:
            EnvironmentRefused: the engine failed, died or took too long; the message names its log.
        """
        return self._ask({"do": do, **arguments})

    def close(self) -> None:
        """End the engine and whatever it started."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        stdin = self._process.stdin
        try:
            if stdin is not None:
                stdin.write(json.dumps(command).encode() + b"\n")
                stdin.flush()
            answer: dict[str, Any] = json.loads(self._line())
        except (OSError, EOFError) as error:
            raise self._failed(str(error) or type(error).__name__) from error
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer

    def _line(self) -> bytes:
        stdout = self._process.stdout
        if stdout is None:
            raise AssertionError("stdout is a pipe")
        deadline = time.monotonic() + TIMEOUT
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise EOFError(f"no answer within {TIMEOUT:.0f} s")
            data = os.read(stdout.fileno(), 1 << 16)
            if not data:
                raise EOFError("the process ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _failed(self, reason: str) -> EnvironmentRefused:
        return EnvironmentRefused(f"the engine {self._name!r} failed ({reason})", do=f"read {self._log}")


def in_turn(
    engines: Mapping[str, EngineProcess],
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    repeats: int,
    prefills: int = 1,
    note: Callable[[str], None] = lambda _text: None,
) -> dict[str, dict[str, Any]]:
    """Speed of every engine, measured in turn so that each meets the same state of the machine.

    Args:
        engines: by name.
        prompts: token ids of the concurrent requests.
        tokens: decoded per request and sample.
        repeats, prefills: samples of each engine.
        note: told what is done next.

    Returns:
        per engine the median of `prefill_tokens_per_s`, `decode_tokens_per_s` and `decode_step_s`, and all samples.
    """
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    rounds: list[tuple[str, dict[str, Any]]] = [("prefill", {})] * prefills
    rounds += [("decode", {"tokens": tokens})] * repeats
    for number, (what, arguments) in enumerate(rounds):
        for name, engine in engines.items():
            note(f"{name}: {what}, round {number + 1} of {len(rounds)}")
            for key, value in engine.ask(what, prompts=prompts, **arguments).items():
                samples[name].setdefault(key, []).append(value)
    return {
        name: {**{key: statistics.median(values) for key, values in rows.items()}, "samples": rows}
        for name, rows in samples.items()
    }
