"""The refusals of Jettison: one sentence that says what was found, what is allowed and what to do."""

from __future__ import annotations


class JettisonError(ValueError):
    """A refusal.

    `found`, `allowed` and `do` are clauses without a final full stop; the message joins those that are given.
    `exit_code` is what the command `jettison` returns for it.
    """

    exit_code = 2

    def __init__(self, found: str, *, allowed: str = "", do: str = "") -> None:
        self.found = found
        self.allowed = allowed
        self.do = do
        sentence = "; ".join(part.rstrip(".") for part in (found, allowed, do) if part)
        super().__init__(f"{sentence}.")


class ConfigError(JettisonError):
    """Bad usage or a bad option."""

    exit_code = 2


class EnvironmentRefused(JettisonError):
    """Engine, version, device, compiled library or installation is not one that we support."""

    exit_code = 3


class InputRefused(JettisonError):
    """A file given to us (table, ranking, result) is not what it should be."""

    exit_code = 4
