"""Token counts of one choice across its upstream streams: `usage` as if it had been one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jettison.plugins.trimr.types import Decision


@dataclass
class Usage:
    """What was counted.

    Attributes:
        prompt: tokens of the client's prompt, where the server gave their ids.
        generated, forced: tokens that the client got, from the model and from guidance.
        late: tokens that were under way at cuts and thrown away (events in the buffer; an estimate).
        exact: every chunk came with its token ids; else a chunk counts as one token.
        cuts: the decisions carried out.
    """

    prompt: int | None = None
    generated: int = 0
    forced: int = 0
    late: int = 0
    exact: bool = True
    cuts: list[Decision] = field(default_factory=list)
    _reported: dict[str, Any] | None = None
    _generated_before: int = 0

    def see(self, data: dict[str, Any]) -> None:
        """Take note of what a chunk says of usage; the last one of a stream holds."""
        if isinstance(data.get("usage"), dict):
            self._reported = data["usage"]

    def count(self, ids: Sequence[int] | None, text: str) -> int:
        """Count a chunk and return its tokens."""
        tokens = len(ids) if ids is not None else int(bool(text))
        self.exact = self.exact and (ids is not None or not text)
        self.generated += tokens
        return tokens

    def cut(self, decision: Decision, forced: int) -> None:
        """Count guidance that was appended."""
        self.cuts.append(decision)
        self.forced += forced
        self._generated_before = self.generated
        self._reported = None

    def total(self) -> dict[str, Any]:
        """Return the `usage` object; after a cut it has `trim`, what was done."""
        if not self.cuts:
            return self._reported or _usage(self.prompt or 0, self.generated)
        if self.exact and self.prompt is not None:
            usage = _usage(self.prompt, self.generated + self.forced)
        elif self._reported is not None:
            # NOTES: the continuation's prompt is the client's, what was kept and the guidance.
            kept = int(self._reported.get("prompt_tokens") or 0)
            usage = _usage(max(0, kept - self._generated_before - self.forced), 0)
            usage["total_tokens"] = kept + int(self._reported.get("completion_tokens") or 0)
            usage["completion_tokens"] = usage["total_tokens"] - usage["prompt_tokens"]
        else:
            usage = _usage(self.prompt or 0, self.generated + self.forced)
        return {**usage, "trim": self.trim()}

    def trim(self) -> dict[str, Any]:
        """Return what was done, JSON-ready."""
        cuts = [{"rule": cut.rule, "force": cut.force, "at_token": cut.at_token} for cut in self.cuts]
        return {"cuts": cuts, "forced_tokens": self.forced, "late_tokens": self.late, "exact": self.exact}


def merged(usages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the usage of a request with several choices: its prompt counts once."""
    if len(usages) == 1:
        return usages[0]
    prompt = max(int(usage.get("prompt_tokens") or 0) for usage in usages)
    total = _usage(prompt, sum(int(usage.get("completion_tokens") or 0) for usage in usages))
    trims = [usage.get("trim") for usage in usages]
    return {**total, "trim": trims} if any(trims) else total


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
