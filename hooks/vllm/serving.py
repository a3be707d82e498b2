"""What plugins that decide on text learn of a vLLM engine: its tokenizer and the strings of its reasoning config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jettison.hooks.types import Serving
from jettison.hooks.vllm import compat


class EngineText:
    """vLLM's own tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Return token ids; special tokens in `text` become theirs, and none is added."""
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))


def describe(config: compat.VllmConfig) -> Serving:
    """Return what the engine of this configuration can tell; vLLM has already tokenized the reasoning strings."""
    tokenizer = compat.cached_tokenizer_from_config(config.model_config)
    text = EngineText(tokenizer) if tokenizer is not None else None
    reasoning = config.reasoning_config
    thinking = None
    if text is not None and reasoning is not None and reasoning.enabled:
        start, end = reasoning.reasoning_start_token_ids, reasoning.natural_reasoning_end_token_ids
        thinking = (text.decode(start), text.decode(end))
    return Serving(text, thinking, int(config.model_config.get_vocab_size()))
