"""The core and the verifier over one choice: text in, decisions out; verdicts arrive while the text goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jettison.plugins.trimr.machine import Trimmer
from jettison.plugins.trimr.types import Check, Decision, TraceEvent, Verdict

if TYPE_CHECKING:
    from jettison.plugins.trimr.config import TrimROptions
    from jettison.plugins.trimr.metrics import Metrics
    from jettison.plugins.trimr.types import ThinkingStrings
    from jettison.plugins.trimr.verifier import VerifierClient


class Watch:
    """Args: the request's options and question, its token limit, the strings around thinking, whether the text begins
    inside it, who judges (None: nobody), the counters, and who gets the event log."""

    def __init__(
        self,
        options: TrimROptions,
        question: str,
        budget_tokens: int | None,
        thinking: ThinkingStrings,
        *,
        inside: bool,
        verifier: VerifierClient | None,
        metrics: Metrics,
        log: Callable[[TraceEvent], None] | None,
    ) -> None:
        self._trimmer = Trimmer(options, question, budget_tokens, thinking, inside=inside, log=log)
        self._verifier = verifier
        self._metrics = metrics
        self._judging: set[asyncio.Task[None]] = set()
        self._shadowed = 0
        self._stopped = False
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._count = self._fed = 0

    @property
    def decision(self) -> Decision | None:
        """What to do now, all text considered."""
        if self._trimmer.decision is None or self._stopped:
            return None
        self._flush()
        return self._trimmer.decision

    @property
    def thinking_tokens(self) -> int:
        """Tokens of the current or last thinking block."""
        return self._trimmer.thinking_tokens

    def feed(self, text: str, tokens: int | Sequence[int]) -> None:
        """Take text; checks that come of it are on their way to the verifier when this returns.

        What the core would not look at yet is kept until it does: a token then costs an append.
        """
        self._text.append(text)
        if isinstance(tokens, int):
            self._count += tokens
        else:
            self._tokens += tokens
        if self._fed + self._count + len(self._tokens) >= self._trimmer.next_look:
            self._flush()

    def _flush(self) -> None:
        if not (self._text or self._tokens or self._count):
            return
        text, tokens, count = "".join(self._text), self._tokens, self._count
        self._text, self._tokens, self._count = [], [], 0
        self._fed += count + len(tokens)
        # NOTES: ids and counts never mix within a stream; text that a server had held back comes as no tokens.
        self._send(self._trimmer.feed(text, count or tokens))
        for decision in self._trimmer.shadowed[self._shadowed :]:
            self._metrics.stopped.labels(decision.rule, decision.force, "true").inc()
            self._shadowed += 1

    def applied(self, text: str, tokens: int | Sequence[int]) -> None:
        """Say that the decision was carried out."""
        self._flush()
        self._trimmer.applied(text, tokens)
        self._fed += tokens if isinstance(tokens, int) else len(tokens)

    async def settled(self) -> None:
        """Wait until no check is on its way."""
        while self._judging:
            await asyncio.gather(*self._judging)

    def stop(self) -> None:
        """Decide nothing more; the log goes on."""
        self._stopped = True

    async def close(self) -> None:
        """The text has ended, or nobody wants it any more."""
        for task in self._judging:
            task.cancel()
        await asyncio.gather(*self._judging, return_exceptions=True)
        self._flush()
        for task in self._judging:
            task.cancel()
        self._trimmer.finish()

    def _send(self, checks: Sequence[Check]) -> None:
        for check in checks:
            if self._verifier is None:
                self._send(self._trimmer.answer(check, Verdict()))
                continue
            task = asyncio.get_running_loop().create_task(self._judge(check, self._verifier))
            self._judging.add(task)
            task.add_done_callback(self._judging.discard)

    async def _judge(self, check: Check, verifier: VerifierClient) -> None:
        verdict = await verifier.judge(check)
        self._send(self._trimmer.answer(check, verdict))
