"""F-kill: run a writer in a child process, kill it with SIGKILL at a random instant, look at what it left."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable


def kill_repeatedly(
    program: str, arguments: list[str], inspect: Callable[[], None], *, times: int, rng: random.Random, longest: float
) -> None:
    """Start a Python `program` that writes for ever, kill it after at most `longest` seconds of writing, and inspect.

    The program must print a line when it starts to write. `inspect` asserts that what lies there is whole.
    """
    for _ in range(times):
        with subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline(), "the writer did not start"
            time.sleep(rng.uniform(0, longest))
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL, f"the writer ended by itself with {child.returncode}"
        inspect()
