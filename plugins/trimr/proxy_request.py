"""A client's request: whether the proxy can watch it, what it asks of the upstream instead, and how it goes on.

A request is watched if cutting its thinking cannot change anything else about it. All others pass as they are, and why
is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jettison.hooks.errors import ConfigError
from jettison.plugins.trimr.config import RequestOptions, TrimROptions

Api = Literal["chat", "completions"]
PATHS: dict[str, Api] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}

SAMPLING = (
    "model", "stop", "stop_token_ids", "include_stop_str_in_output", "temperature", "top_p", "top_k", "min_p", "seed",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "bad_words", "allowed_token_ids",
    "ignore_eos", "min_tokens", "spaces_between_special_tokens", "priority", "user", "cache_salt", "session_id",
    "stream_interval", "vllm_xargs", "thinking_token_budget",
)  # fmt: skip
"""Fields that a continuation carries over, besides the token limit."""

_NOT_WATCHED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("tools", ("tools", "functions")),
    ("structured", ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")),
    ("logprobs", ("logprobs", "top_logprobs", "prompt_logprobs", "logprob_token_ids")),
    ("echo", ("echo", "suffix", "use_beam_search", "prompt_embeds", "continue_final_message")),
)
_DEFAULT_COMPLETION_TOKENS = 16
_MAX_CHOICES = 128


@dataclass(frozen=True)
class Watched:
    """A request that the proxy watches.

    Attributes:
        api: which of the two interfaces.
        body: as the client sent it.
        options: the server's, with the request's own in their place.
        question: the user's question, for the rules and the verifier.
        max_tokens: the client's limit on generated tokens, or None.
        stream, include_usage, wants_ids: what the client asked for.
        choices: n.
    """

    api: Api
    body: Mapping[str, Any]
    options: TrimROptions
    question: str
    max_tokens: int | None
    stream: bool
    include_usage: bool
    wants_ids: bool
    choices: int

    def first(self, choice: int) -> dict[str, Any]:
        """Return the upstream request of one choice: streamed, alone, with token ids, and with usage if it is told."""
        body = {**self.body, "stream": True, "n": 1, "return_token_ids": True, **_xargs(self.body)}
        if not self.stream:
            body["stream_options"] = {"include_usage": True}
        if self.choices > 1 and isinstance(self.body.get("seed"), int):
            # NOTES: vLLM gives the choices of one request the seeds seed, seed + 1, ...
            body["seed"] = self.body["seed"] + choice
        return body

    def continuation(self, choice: int, prompt: str | list[int], used: int, *, parsed: bool) -> dict[str, Any]:
        """Return the completion request that goes on after `prompt`.

        Args:
            choice: index among the choices.
            prompt: everything so far, guidance included.
            used: generated and forced tokens so far; the client's limits shrink by them.
            parsed: thinking came apart from the content. The end-of-thinking string may be a special token, and we
                must see it then to keep them apart.
        """
        first = self.first(choice)
        body = {name: first[name] for name in SAMPLING if first.get(name) is not None}
        body |= {"prompt": prompt, "add_special_tokens": False, "max_tokens": self.remaining(used)}
        body |= {"n": 1, "stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
        body["skip_special_tokens"] = False if parsed else self.body.get("skip_special_tokens", True)
        for name in ("min_tokens", "thinking_token_budget"):
            if isinstance(body.get(name), int) and body[name] > 0:
                body[name] = max(0, body[name] - used)
        return body

    def chat_continuation(self, choice: int, said: str, used: int) -> dict[str, Any]:
        """Return the chat request that goes on after the assistant's message `said`, for servers without token ids."""
        body = self.first(choice)
        body["messages"] = [*self.body["messages"], {"role": "assistant", "content": said}]
        body |= {"add_generation_prompt": False, "continue_final_message": True}
        body.pop("max_completion_tokens", None)
        limit = self.remaining(used)
        return {**body, "max_tokens": limit} if limit is not None else body

    def remaining(self, used: int) -> int | None:
        """Tokens left under the client's limit, None where it has none."""
        return None if self.max_tokens is None else max(0, self.max_tokens - used)


def watch(api: Api, body: Mapping[str, Any], options: TrimROptions) -> Watched | str:
    """Return the watched request, or in one word why it passes as it is.

    Raises:
        JettisonError: its own options (`vllm_xargs`) are not valid.
    """
    own = _own(body)
    if not own.enabled:
        return "off"
    for reason, names in _NOT_WATCHED:
        if any(body.get(name) for name in names):
            return reason
    if (body.get("response_format") or {"type": "text"}) != {"type": "text"}:
        return "structured"
    if body.get("include_reasoning") is False:
        return "hidden"
    question = own.question or (_asked(body.get("messages")) if api == "chat" else _prompt(body.get("prompt")))
    if question is None:
        return "prompt"
    limit = body.get("max_completion_tokens") if api == "chat" else None
    limit = body.get("max_tokens", None if api == "chat" else _DEFAULT_COMPLETION_TOKENS) if limit is None else limit
    choices = 1 if body.get("n") is None else body["n"]
    if not _is_count(choices, _MAX_CHOICES) or not (limit is None or _is_count(limit, 1 << 31)):
        return "invalid"
    stream = body.get("stream_options")
    return Watched(
        api=api,
        body=body,
        options=own.applied_to(options),
        question=question,
        max_tokens=limit,
        stream=body.get("stream") is True,
        include_usage=isinstance(stream, Mapping) and stream.get("include_usage") is True,
        wants_ids=body.get("return_token_ids") is True,
        choices=choices,
    )


def _own(body: Mapping[str, Any]) -> RequestOptions:
    xargs = body.get("vllm_xargs")
    if xargs is not None and not isinstance(xargs, Mapping):
        raise ConfigError("'vllm_xargs' is not an object", do='write {"trimr": "off"} or leave it out')
    return RequestOptions.from_xargs(xargs or {})


def _xargs(body: Mapping[str, Any]) -> dict[str, Any]:
    """The request's extra arguments without ours: an upstream that trims too must not do it twice."""
    given = body.get("vllm_xargs")
    if not isinstance(given, Mapping):
        return {}
    rest = {name: value for name, value in given.items() if name != "trimr"}
    return {"vllm_xargs": {**rest, "trimr": "off"} if "trimr" in given else rest}


def _asked(messages: object) -> str | None:
    """The text of the last user message; None where a message holds anything but text."""
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        return None
    texts = [_text(message.get("content")) for message in messages]
    if any(text is None for text in texts):
        return None
    asked = [text for message, text in zip(messages, texts, strict=True) if message.get("role") == "user"]
    return asked[-1] if asked else None


def _text(content: object) -> str | None:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        return None
    parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    return "\n".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]


def _prompt(prompt: object) -> str | None:
    """A completion's prompt, if it is one: its text, or "" for token ids."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        return prompt[0]
    return "" if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt) else None


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most
