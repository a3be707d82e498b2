"""What a search has measured so far, on disk: kill it, start it again, and it goes on where it was.

One journal file of Optuna holds two kinds of studies: the *measurements*, one trial per candidate ever evaluated with
one model and text, and one study per search, which takes its values from there. Names are hashes of all that the
numbers depend on, so a changed setting starts a new study in the same file instead of continuing a wrong one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.hooks.errors import EnvironmentRefused, InputRefused

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study


class Ledger:
    """Open journal. Use it as a context manager; while it is open no other process may open it.

    Args:
        path: journal file, made if it is missing; None keeps everything in memory.

    Raises:
        InputRefused: the file cannot be opened, is no journal, or another search holds it.
    """

    def __init__(self, path: Path | None) -> None:
        optuna = _optuna()
        self._closed = contextlib.ExitStack()
        if path is None:
            self._storage: Any = optuna.storages.InMemoryStorage()
            return
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        try:
            _hold(path, self._closed)
            self._storage = JournalStorage(JournalFileBackend(str(path), lock_obj=_held(path)))
        except (KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
            self.close()
            if isinstance(error, InputRefused):
                raise
            raise InputRefused(
                f"{path} is not a journal of a search ({type(error).__name__})", do="remove it, or give another -o"
            ) from error

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes open the journal."""
        self._closed.close()

    def study(self, kind: str, facts: Mapping[str, Any], sampler: BaseSampler | None = None) -> Study:
        """Return the study of two minimised objectives (KL, bytes per token) that depends on `facts`."""
        optuna = _optuna()
        name = f"{kind}-{digest(facts)[:32]}"
        study = optuna.create_study(
            storage=self._storage,
            sampler=sampler or optuna.samplers.RandomSampler(0),
            study_name=name,
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        found: Study = study
        return found


def _held(path: Path) -> Any:
    """Stands in for Optuna's own lock, which outlives a killed process: the journal is already ours."""
    from optuna.storages.journal import JournalFileOpenLock

    class Held(JournalFileOpenLock):
        def acquire(self) -> bool:
            return True

        def release(self) -> None:
            return None

    return Held(str(path))


def digest(facts: Mapping[str, Any]) -> str:
    """SHA-256 of JSON-like data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _hold(path: Path, closed: contextlib.ExitStack) -> None:
    """Lock the journal and cut off a last line that a killed process left incomplete."""
    try:
        stream = closed.enter_context(path.open("a+b"))
    except OSError as error:
        raise InputRefused(f"cannot open {path} ({error.strerror})", do="give a writable place") from error
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputRefused(f"{path} is held by another search", do="wait for it, or give another -o") from error
    stream.seek(0)
    whole = 0
    for line in stream:
        if not line.endswith(b"\n"):
            stream.truncate(whole)
            return
        whole += len(line)
        if "op_code" not in json.loads(line):
            raise ValueError("not a line of a journal")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise EnvironmentRefused("package 'optuna' is not installed", do="pip install 'jettison[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna
