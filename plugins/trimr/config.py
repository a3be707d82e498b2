"""Options of the section `trimr`, and what one request may override through `vllm_xargs`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from jettison.hooks.config import PluginOptions, SecretEnv, parse_section
from jettison.hooks.errors import ConfigError, InputRefused
from jettison.hooks.files import parse_document, read_document
from jettison.plugins.trimr.markers import families

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Score = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Answers = Annotated[int, Field(ge=1, le=64)]
Thoughts = Annotated[int, Field(ge=1, le=100_000)]
Guidance = Annotated[str, Field(min_length=1, max_length=2_000)]
Mode = Literal["and", "or"]
Counting = Literal["consecutive", "windowed"]
AnswerKind = Literal["auto", "exact", "open"]


END = "{end}"
_MAX_XARG = 200_000
_XARG = "trimr"
_MAX_MARKERS = 500
_MARKER = re.compile(r"\S(?:[^\r\n]{0,98}\S)?")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]|<\||\|>")


class Repeat(PluginOptions):
    """When thinking counts as a loop (section 2.5).

    Attributes:
        enabled: look for loops at all.
        window: tokens that must match before a period is tried, 4 to 1024; 16. Periods are then compared exactly, so
            one window finds every period.
        times: repetitions back to back that make a loop, 2 to 64; 4. A loop has at least `times` x `window` tokens.
        max_period: longest period, tokens; 1024.
        ngram, span, coverage: also a loop: at least `coverage` of the last `span` tokens lie in n-grams of `ngram`
            tokens seen before in that span; 32, 1024, 0.8 (lists of similar lines reach 0.64). Not before `span`
            tokens, and not where tokens are single bytes.
        structure_tokens: inside code and tables, and for text of fewer than three different letters and digits, a loop
            needs this many tokens; 512.
            needs this many tokens; 512.
    """

    enabled: bool = True
    window: Annotated[int, Field(ge=4, le=1024)] = 16
    times: Annotated[int, Field(ge=2, le=64)] = 4
    max_period: Annotated[int, Field(ge=1, le=4096)] = 1024
    ngram: Annotated[int, Field(ge=4, le=1024)] = 32
    span: Annotated[int, Field(ge=64, le=16384)] = 1024
    coverage: Share = 0.8
    structure_tokens: Annotated[int, Field(ge=1, le=65_536)] = 512

    @model_validator(mode="after")
    def _span_holds_ngrams(self) -> Repeat:
        if 2 * self.ngram > self.span:
            raise ValueError("'span' must be at least twice 'ngram'")
        return self


class Verifier(PluginOptions):
    """Who answers what the deterministic path cannot (section 5.2).

    Attributes:
        mode: `none`: nobody, an unclear pair counts as different; `endpoint`: an OpenAI-compatible server; `self`: the
            served model judges itself.
        url: base URL of the endpoint, for example http://127.0.0.1:8001/v1; required by `endpoint`.
        model: its model name; None asks the server for its first.
        api_key_env: environment variable with its key.
        deadline_s: a check without an answer after this time counts as unanswered, seconds; 2.
        batch_window_s: checks of several requests wait this long for one another, seconds; 0.02.
        max_batch, max_queue: most checks in one batch; most waiting before new ones count as unanswered.
        in_flight: checks at a time per request; 1.
        breaker_failures, breaker_rest_s: after this many failures in a row nothing is asked for this time, seconds.
    """

    mode: Literal["none", "endpoint", "self"] = "none"
    url: Annotated[str, Field(pattern=r"^https?://[^\s@?#]+$", max_length=2_000)] | None = None
    model: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    api_key_env: SecretEnv | None = None
    deadline_s: Annotated[float, Field(gt=0, le=600, allow_inf_nan=False)] = 2.0
    batch_window_s: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.02
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 32
    max_queue: Annotated[int, Field(ge=1, le=100_000)] = 1024
    in_flight: Literal[1] = 1
    breaker_failures: Annotated[int, Field(ge=1, le=1000)] = 5
    breaker_rest_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 30.0

    @model_validator(mode="after")
    def _has_a_url(self) -> Verifier:
        if (self.mode == "endpoint") != (self.url is not None):
            raise ValueError("'url' is needed by mode 'endpoint', and by no other")
        return self


class TrimROptions(PluginOptions):
    """When thinking ends.

    Attributes:
        M: overthinking fires when this many answers in a row agree with the one before; 2, i.e. three equal answers.
        count_mode: `consecutive` (Algorithm 1): any mismatch starts again; `windowed`: M + 1 of the last M + 2 kept
            answers equal the newest.
        r_thres, n_thres, under_mode: underthinking: used share of the token budget, number of thoughts; both or one.
        tau_exist, tau_equiv: verdict scores above these are Yes; 0 and 1.
        window_sentences, window_tokens: an excerpt is the end of a thought, at most this long; 6, 256.
        poll_tokens: the text is examined each time this many tokens have come; 50. 1 examines at every feed.
        min_thought_tokens, max_thought_tokens: a marker before the first joins the thought to the next; a thought is
            cut at the second; 64, 1024.
        min_think_tokens: no rule fires before; 256.
        max_think_tokens: thinking ends here whatever it says; None: never.
        cooldown_tokens: a marker this soon after gentle guidance escalates to forceful; 32.
        repeat: the loop rule.
        gentle, forceful: guidance. `{end}` is the end-of-thinking string: once in `forceful`, never in `gentle`.
        markers: a family of reflection markers (`auto`: English and Chinese ones that suit any model), or a list of
            one's own.
        answer: `exact`: requests have a definite result; `open`: they have none, and overthinking never fires; `auto`:
            judged by the question's words.
        verifier: who is asked.
        shadow: log what would be decided, and decide nothing.
        log_text: keep text in event logs (user data).
    """

    M: Answers = 2
    count_mode: Counting = "consecutive"
    r_thres: Share = 0.5
    n_thres: Thoughts = 20
    under_mode: Mode = "and"
    tau_exist: Score = 0.0
    tau_equiv: Score = 1.0
    window_sentences: Annotated[int, Field(ge=1, le=100)] = 6
    window_tokens: Annotated[int, Field(ge=8, le=4096)] = 256
    poll_tokens: Annotated[int, Field(ge=1, le=1024)] = 50
    min_thought_tokens: Annotated[int, Field(ge=0, le=100_000)] = 64
    max_thought_tokens: Annotated[int, Field(ge=16, le=1_000_000)] = 1024
    min_think_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = 256
    max_think_tokens: Count | None = None
    cooldown_tokens: Annotated[int, Field(ge=0, le=100_000)] = 32
    repeat: Repeat = Repeat()
    gentle: Guidance = "\n\n**Final Answer**\n"
    forceful: Guidance = "\n\nI have spent enough time on this; I will give the best answer I have.\n" + END + "\n\n"
    markers: str | list[str] = "auto"
    answer: AnswerKind = "auto"
    verifier: Verifier = Verifier()
    shadow: bool = False
    log_text: bool = False

    @field_validator("markers")
    @classmethod
    def _usable_markers(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, str):
            if value not in families():
                raise ValueError(f"known families of markers are {', '.join(families())}, or give a list")
        elif not 0 < len(value) <= _MAX_MARKERS or not all(_MARKER.fullmatch(marker) for marker in value):
            raise ValueError(
                f"a list of markers has 1 to {_MAX_MARKERS}, each 1 to 100 characters in one line, no space at its ends"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TrimROptions:
        _check_guidance("gentle", self.gentle, 0)
        _check_guidance("forceful", self.forceful, 1)
        if self.min_thought_tokens >= self.max_thought_tokens:
            raise ValueError("'min_thought_tokens' must be below 'max_thought_tokens'")
        if self.max_think_tokens is not None and self.min_think_tokens > self.max_think_tokens:
            raise ValueError("'min_think_tokens' is above 'max_think_tokens'")
        return self

    @classmethod
    def from_flag(cls, value: str) -> dict[str, Any]:
        """Turn VALUE of `--with trimr=VALUE` into the section: a YAML or JSON file of options.

        Raises:
            InputRefused: the file is missing or malformed, or holds no options.
        """
        content = read_document(value)
        if not isinstance(content, dict):
            raise InputRefused(
                f"{value} holds a {type(content).__name__}", allowed="allowed is an object of options", do="correct it"
            )
        return content


def _check_guidance(name: str, text: str, ends: int) -> None:
    if text.count(END) != ends:
        raise ValueError(f"{name!r} must contain {END} {'exactly once' if ends else 'nowhere'}")
    if _CONTROL.search(text):
        raise ValueError(f"{name!r} holds a control character or a control token")


class RequestOptions(PluginOptions):
    """What one request may say, as `vllm_xargs: {"trimr": "off"}` or a JSON object in that string.

    Attributes:
        enabled: false: the request is never trimmed.
        question: the user's question, where the engine sees only token ids; at most 100,000 characters.
        The others override the server's option of the same name.
    """

    enabled: bool = True
    question: Annotated[str, Field(max_length=100_000)] | None = None
    M: Answers | None = None
    count_mode: Counting | None = None
    r_thres: Share | None = None
    n_thres: Thoughts | None = None
    under_mode: Mode | None = None
    min_think_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    max_think_tokens: Count | None = None
    answer: AnswerKind | None = None
    shadow: bool | None = None

    @classmethod
    def from_xargs(cls, params: Mapping[str, Any]) -> RequestOptions:
        """Read a request's extra arguments; without the key `trimr`, the server's options hold.

        Raises:
            ConfigError: what is wrong, as one sentence.
        """
        value = params.get(_XARG)
        if value is None:
            return cls()
        if isinstance(value, Mapping):
            return parse_section(cls, _XARG, value)
        if not isinstance(value, str) or len(value) > _MAX_XARG:
            raise ConfigError(
                f"the request's {_XARG!r} is of type {type(value).__name__}"
                if not isinstance(value, str)
                else f"the request's {_XARG!r} has {len(value)} characters",
                allowed=f"allowed is 'on', 'off', or an object of options as JSON in at most {_MAX_XARG} characters",
                do='write for example "vllm_xargs": {"trimr": "{\\"M\\": 3}"}',
            )
        if value in ("on", "off"):
            return cls(enabled=value == "on")
        return parse_section(cls, _XARG, parse_document(value, f"the request's {_XARG!r}"))

    def applied_to(self, options: TrimROptions) -> TrimROptions:
        """The server's options with this request's in their place; None here leaves the server's.

        Raises:
            ConfigError: they contradict each other, for example a minimum above the server's maximum.
        """
        own = self.model_dump(exclude={"enabled", "question"}, exclude_none=True)
        return parse_section(TrimROptions, _XARG, options.model_dump(mode="json") | own) if own else options
