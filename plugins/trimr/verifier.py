"""The verifier as a client: asks an OpenAI-compatible endpoint for one token's probabilities, never for text.

One prefill per prompt (paper, section 3.2); equivalence is asked in both orders. A pair that both orders call equal is
asked about again with each result turned into another one: a judge that still says Yes has been talked into it.
Whatever goes wrong (no connection, error status, wrong shape, deadline, full queue) is no verdict, so the request runs
on untrimmed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jettison.hooks.config import read_secret
from jettison.plugins.trimr import prompts
from jettison.plugins.trimr.batching import Batcher, QueueFullError
from jettison.plugins.trimr.breaker import Breaker
from jettison.plugins.trimr.endpoint import BadAnswerError, Endpoint, require_aiohttp
from jettison.plugins.trimr.prompts import Message
from jettison.plugins.trimr.scoring import NO, YES, NoAnswerError, YesNo
from jettison.plugins.trimr.types import Check, Verdict

if TYPE_CHECKING:
    import aiohttp

    from jettison.plugins.trimr.config import Verifier
    from jettison.plugins.trimr.metrics import Fault, Metrics


class VerifierClient:
    """Judges checks. Lives in one event loop.

    Args:
        settings: the section's `verifier`; its mode is `endpoint` or `self`.
        session: for all calls; the caller closes it.
        metrics: counts calls and errors.
        url: base URL in mode `self`, where the settings have none.
        headers: sent with every call, for example the key of the served model in mode `self`.
    """

    def __init__(
        self,
        settings: Verifier,
        session: aiohttp.ClientSession,
        metrics: Metrics,
        *,
        url: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        base = settings.url or url
        assert base is not None, "mode 'self' needs the served model's url"
        sent = dict(headers or {})
        if settings.api_key_env is not None:
            sent["Authorization"] = f"Bearer {read_secret(settings.api_key_env).get_secret_value()}"
        self.settings = settings
        self._metrics = metrics
        self._endpoint = Endpoint(session, base, settings.model, sent, settings.deadline_s)
        self._breaker = Breaker(settings.breaker_failures, settings.breaker_rest_s)
        self._batcher = Batcher(self._score, settings.batch_window_s, settings.max_batch, settings.max_queue)
        self._yes_no = YesNo.of_words()

    async def resolve(self) -> None:
        """Ask the endpoint how its tokenizer cuts Yes and No; one that does not say keeps whole words.

        Raises:
            EnvironmentRefused: the tokenizer does not tell the words apart in their first token.
        """
        pieces = await self._endpoint.pieces((*YES, *NO))
        if pieces:
            self._yes_no = YesNo.of_pieces(pieces)

    async def judge(self, check: Check) -> Verdict:
        """Return the scores of a check, in nats, or an empty verdict where there is no answer in time."""
        if not self._breaker.allow():
            return self._none("breaker")
        self._metrics.calls.labels(check.kind).inc()
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self.settings.deadline_s):
                scores = await self._scores(check)
        except QueueFullError:
            self._breaker.abandoned()
            return self._none("queue")
        except TimeoutError:
            return self._failed("timeout")
        except BadAnswerError as error:
            return self._failed(error.reason)
        except NoAnswerError:
            return self._failed("shape")
        except BaseException:
            self._breaker.abandoned()
            raise
        self._breaker.succeeded()
        self._metrics.latency.observe(time.perf_counter() - started)
        return Verdict(scores)

    async def close(self) -> None:
        """Let go of what is waiting."""
        await self._batcher.close()

    async def _scores(self, check: Check) -> tuple[float, ...]:
        question, first, second = check.question, check.first, check.second
        if check.kind == "exist":
            return tuple(await self._batcher.ask([prompts.existence(question, first)]))
        both = [prompts.equivalence(question, first, second), prompts.equivalence(question, second, first)]
        scores = await self._batcher.ask(both)
        if min(scores) <= 0:
            return tuple(scores)
        controls = [
            prompts.equivalence(question, first, prompts.contradicted(second)),
            prompts.equivalence(question, prompts.contradicted(first), second),
        ]
        fooled = max(await self._batcher.ask(controls))
        return tuple(min(score, -fooled) if fooled > 0 else score for score in scores)

    async def _score(self, asked: Sequence[list[Message]]) -> list[float | Exception]:
        """Score a batch; where the server refuses it as a whole, one at a time, so that one prompt spoils no other."""
        try:
            distributions = await self._endpoint.distributions(asked)
        except BadAnswerError as error:
            if len(asked) == 1 or error.reason != "status":
                raise
            alone = [self._endpoint.distributions([one]) for one in asked]
            outcomes = await asyncio.gather(*alone, return_exceptions=True)
            return [self._one(outcome) for outcome in outcomes]
        return [self._one([distribution]) for distribution in distributions]

    def _one(self, outcome: Any) -> float | Exception:
        if isinstance(outcome, Exception):
            return outcome
        try:
            return self._yes_no.score(outcome[0])
        except NoAnswerError as error:
            return error

    def _failed(self, reason: Fault) -> Verdict:
        self._breaker.failed()
        return self._none(reason)

    def _none(self, reason: Fault) -> Verdict:
        self._metrics.errors.labels(reason).inc()
        return Verdict()


def client_session() -> aiohttp.ClientSession:
    """Return a session without limits of its own: deadlines are set per call, and streams last as long as they last.

    Raises:
        EnvironmentRefused: aiohttp is not installed.
    """
    library = require_aiohttp()
    session: aiohttp.ClientSession = library.ClientSession(
        connector=library.TCPConnector(limit=0),
        timeout=library.ClientTimeout(total=None, sock_connect=10),
        auto_decompress=False,
    )
    return session
