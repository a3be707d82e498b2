"""What hooks are asked about and what they answer. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jettison.hooks.errors import ConfigError

BITS = (16, 8, 4, 2)

PerChannel = Sequence[Sequence[float]]
"""One float per KV head of the whole model and channel: [total KV heads][head_size]."""


@dataclass(frozen=True)
class KVFormat:
    """How one layer stores its keys and values.

    Attributes:
        key_bits, value_bits: 16 (stored raw), 8, 4 or 2 bits per element.
        rotate: rotate keys (with queries) and values by a Hadamard matrix before quantising.
        sink_tokens: number of first tokens of a sequence that are stored at 16 bits.
        key_center: subtracted from keys before quantising, [total KV heads][head_size], or None.
        key_scale: keys are divided by it and queries multiplied, positive, [total KV heads][head_size], or None.
    """

    key_bits: int
    value_bits: int
    rotate: bool = False
    sink_tokens: int = 0
    key_center: PerChannel | None = None
    key_scale: PerChannel | None = None

    def __post_init__(self) -> None:
        for side in ("key_bits", "value_bits"):
            bits = getattr(self, side)
            if type(bits) is not int or bits not in BITS:
                raise ConfigError(
                    f"KVFormat.{side} is {bits!r}",
                    allowed=f"allowed are {', '.join(map(str, BITS))}",
                    do="choose one of these",
                )
        if type(self.sink_tokens) is not int or self.sink_tokens < 0:
            raise ConfigError(
                f"KVFormat.sink_tokens is {self.sink_tokens!r}",
                allowed="allowed is a whole number of tokens, 0 or more",
                do="use 0 to store every token quantised",
            )
        object.__setattr__(self, "key_center", _per_channel("key_center", self.key_center, above=-math.inf))
        object.__setattr__(self, "key_scale", _per_channel("key_scale", self.key_scale, above=0.0))


def _per_channel(name: str, rows: PerChannel | None, *, above: float) -> tuple[tuple[float, ...], ...] | None:
    if rows is None:
        return None
    frozen = tuple(tuple(float(value) for value in row) for row in rows)
    if not frozen or not frozen[0] or any(len(row) != len(frozen[0]) for row in frozen):
        raise ConfigError(
            f"KVFormat.{name} has rows of lengths {[len(row) for row in frozen]}",
            allowed="allowed is one row of head_size numbers per KV head",
            do="make all rows equally long",
        )
    for head, row in enumerate(frozen):
        for channel, value in enumerate(row):
            if not (math.isfinite(value) and value > above):
                raise ConfigError(
                    f"KVFormat.{name}[{head}][{channel}] is {value}",
                    allowed="allowed are finite numbers" + ("" if above == -math.inf else f" above {above:g}"),
                    do="measure the table again",
                )
    return frozen


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of the model being built.

    Attributes:
        index: position among the model's attention layers, 0 to num_layers - 1.
        name: the engine's name of the layer, e.g. "model.layers.3.self_attn.attn".
        num_heads, num_kv_heads: totals of the model, before tensor parallelism.
        head_size: channels per head.
        sliding_window: visible tokens including the current one, or None.
        num_layers: number of attention layers in the model.
        config_sha256: SHA-256 of the model's `config.json`, or None where the engine does not have the file.
    """

    index: int
    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    sliding_window: int | None
    num_layers: int
    config_sha256: str | None = None


@dataclass(frozen=True)
class Request:
    """One request, when the engine admits it.

    Attributes:
        request_id: the engine's name of the request, None where the engine does not tell.
        prompt_token_ids: the prompt's token ids; do not mutate.
        params: the request's own extra arguments (`extra_args`, over HTTP `vllm_xargs`); do not mutate.
        vocab_size: width of the model's logits; every forced id must be below it.
        max_tokens: most tokens that the request may generate, None where the engine does not tell.
    """

    request_id: str | None
    prompt_token_ids: Sequence[int]
    params: Mapping[str, Any]
    vocab_size: int
    max_tokens: int | None = None


class Text(Protocol):
    """The engine's tokenizer, for plugins that decide on text."""

    def encode(self, text: str) -> list[int]:
        """Return token ids; special tokens in `text` become theirs, and none is added."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""


@dataclass(frozen=True)
class Serving:
    """What an engine can tell of the text it generates.

    Attributes:
        text: its tokenizer, or None where it serves token ids only.
        thinking: the strings that begin and, said by the model, end thinking; None without a reasoning config.
        vocab_size: width of the model's logits.
    """

    text: Text | None
    thinking: tuple[str, str] | None
    vocab_size: int


@runtime_checkable
class RequestPolicy(Protocol):
    """What a plugin decides for one request, asked before each token is sampled.

    A policy may have an attribute `wake_at`: with fewer output tokens than that it need not be asked. It is read after
    every call; an engine whose policies all sleep does no work for them.
    """

    def next_tokens(self, output_token_ids: Sequence[int]) -> Sequence[int] | None:
        """Return None to sample freely, or the token ids to force next, in order.

        `output_token_ids` are the tokens generated so far, forced ones included; do not mutate. An exception
        switches the policy off for this request only, and is counted.
        """
