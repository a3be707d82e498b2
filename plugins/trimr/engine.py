"""TrimR inside an engine: each request's thinking is read as it grows, and ended by forcing the guidance's tokens.

Only what can be decided without asking anybody is decided here (stated answers that compare exactly, the budget,
loops), so every rank of a tensor-parallel engine decides alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from jettison.hooks.errors import ConfigError, EnvironmentRefused
from jettison.hooks.specs import hookimpl
from jettison.hooks.types import Request, Serving, Text
from jettison.plugins.trimr.config import RequestOptions, TrimROptions
from jettison.plugins.trimr.machine import Trimmer
from jettison.plugins.trimr.types import ThinkingStrings

HELD_BACK = 8
"""Tokens after which text that still ends inside a character is given out as it is."""

QUESTION_TOKENS = 8_192
"""Tokens at the end of the prompt that are read as the question."""


class TrimR:
    """Carrier of the engine-level hooks for one engine."""

    def __init__(self, options: TrimROptions) -> None:
        if options.verifier.mode != "none":
            raise ConfigError(
                f"option 'trimr.verifier.mode' = {options.verifier.mode!r} is refused inside the engine",
                allowed="allowed there is 'none': what compares exactly needs no model",
                do="run `jettison trimr proxy` in front of the engine for a verifier",
            )
        self._options = options
        self._serving: Serving | None = None
        self._counts: Counter[str] = Counter()
        self._fires: Counter[str] = Counter()

    @hookimpl
    def serving(self, serving: Serving) -> None:
        """Take the engine's tokenizer and thinking strings.

        Raises:
            EnvironmentRefused: the engine has no tokenizer or no reasoning config.
        """
        if serving.text is None:
            raise EnvironmentRefused(
                "the engine runs without a tokenizer, and trimr reads text", do="remove --skip-tokenizer-init"
            )
        if serving.thinking is None:
            raise EnvironmentRefused(
                "the engine has no reasoning config, so trimr does not know where thinking ends",
                do="add --reasoning-parser NAME, or --reasoning-config with reasoning_start_str and reasoning_end_str",
            )
        self._serving = serving

    @hookimpl
    def request_policy(self, request: Request) -> ThinkingPolicy | None:
        """Return the policy that watches this request; None where the request wants none.

        Raises:
            ConfigError: the request's options are refused; it then runs untrimmed.
        """
        serving = self._serving
        if serving is None or serving.text is None or serving.thinking is None:
            raise AssertionError("the engine calls `serving` first")
        own = RequestOptions.from_xargs(request.params)
        if not own.enabled:
            self._counts["opted_out"] += 1
            return None
        self._counts["requests"] += 1
        start, end = serving.thinking
        prompt = serving.text.decode(request.prompt_token_ids[-QUESTION_TOKENS:])
        trimmer = Trimmer(
            own.applied_to(self._options),
            own.question if own.question is not None else prompt.removesuffix(start),
            request.max_tokens,
            ThinkingStrings(start, end),
            inside=prompt.rfind(start) > prompt.rfind(end),
        )
        return ThinkingPolicy(trimmer, serving.text, request.max_tokens, self._fires)

    @hookimpl
    def report(self) -> dict[str, Any]:
        """Return how many requests were watched or opted out, and how often each rule ended thinking."""
        return {**dict(sorted(self._counts.items())), "fires": dict(sorted(self._fires.items()))}


class ThinkingPolicy:
    """Feeds one request's output to its `Trimmer` and forces what that decides.

    Args:
        trimmer: of this request.
        text: the engine's tokenizer.
        max_tokens: most tokens that the request may generate, or None.
        fires: counted here, by rule.

    Attributes:
        wake_at: with fewer output tokens than this, `next_tokens` answers None.
    """

    def __init__(self, trimmer: Trimmer, text: Text, max_tokens: int | None, fires: Counter[str]) -> None:
        self._trimmer, self._text, self._fires = trimmer, text, fires
        self._max_tokens = max_tokens
        self._decoder = StreamDecoder(text)
        self._read = 0
        self.wake_at = trimmer.next_look
        self._shadowed = 0

    def next_tokens(self, output_token_ids: Sequence[int]) -> list[int] | None:
        """Return the guidance's ids when thinking should end here, else None.

        Between two looks of the trimmer this costs one comparison.
        """
        length = len(output_token_ids)
        if length < self.wake_at:
            return None
        trimmer = self._trimmer
        fresh = list(output_token_ids[self._read : length])
        self._read = length
        trimmer.feed(self._decoder.push(fresh), fresh)
        self.wake_at = max(length + 1, trimmer.next_look)
        self._count_shadowed()
        decision = trimmer.decision
        if decision is None:
            return None
        forced = self._text.encode(decision.text)
        if self._max_tokens is not None and length + len(forced) >= self._max_tokens:
            return None
        self._fires[decision.rule] += 1
        trimmer.applied(decision.text, forced)
        self._decoder.push(forced)
        self._read = length + len(forced)
        self.wake_at = max(self._read, trimmer.next_look)
        return forced

    def _count_shadowed(self) -> None:
        for decision in self._trimmer.shadowed[self._shadowed :]:
            self._fires[f"shadow_{decision.rule}"] += 1
        self._shadowed = len(self._trimmer.shadowed)


class StreamDecoder:
    """Text of token ids that come in parts, never half a character."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these ids complete."""
        self._pending += token_ids
        # NOTES: a tokenizer may write a token differently at the start of a text, so some tokens before it are decoded
        # along and their text is taken off.
        known = self._text.decode(self._context)
        for held in range(min(HELD_BACK, len(self._pending))):
            ready = self._pending[: len(self._pending) - held]
            whole = self._text.decode([*self._context, *ready])
            if not whole.endswith("\ufffd"):
                break
        else:
            if len(self._pending) < HELD_BACK:
                return ""
            ready = self._pending
            whole = self._text.decode([*self._context, *ready])
        self._context = [*self._context, *ready][-HELD_BACK:]
        self._pending = self._pending[len(ready) :]
        return whole[len(known) :]
