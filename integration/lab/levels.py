"""The two sizes of the reasoner: `full` for a GPU, `mini` for a test on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lab.problems import Difficulty
from lab.traces import Habits


@dataclass(frozen=True)
class Level:
    """What one size is made of and how it is trained.

    Attributes:
        difficulty, habits: of the problems and of the traces.
        hidden, layers, heads, feed_forward: of the Llama model; a head has `hidden / heads` channels.
        length: longest sequence, tokens, in training and in use.
        traces, steps, batch_tokens: training traces, optimiser steps, tokens of a step with padding.
        rate: peak learning rate of the matrices (Muon); embeddings and norms (AdamW) have 3e-3.
        buckets: padded lengths of a batch; few, where each is compiled.
    """

    difficulty: Difficulty
    habits: Habits
    hidden: int
    layers: int
    heads: int
    feed_forward: int
    length: int
    traces: int
    steps: int
    batch_tokens: int
    rate: float
    buckets: tuple[int, ...]

    def config(self, tokenizer: Any) -> Any:
        """The model's configuration."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=self.hidden // self.heads,
            max_position_embeddings=self.length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            initializer_range=self.hidden**-0.5,
        )


LEVELS = {
    "full": Level(
        difficulty=Difficulty(),
        habits=Habits(),
        hidden=256,
        layers=8,
        heads=8,
        feed_forward=896,
        length=2048,
        traces=200_000,
        steps=2_000,
        batch_tokens=131_072,
        rate=4e-3,
        buckets=(256, 512, 1024, 2048),
    ),
    "mini": Level(
        difficulty=Difficulty(families=("modular",), terms=(2, 4), modulus=7),
        habits=Habits(redundant=2.5, starts=6.0, longest=900),
        hidden=128,
        layers=3,
        heads=4,
        feed_forward=320,
        length=512,
        traces=8_000,
        steps=1_200,
        batch_tokens=2_048,
        rate=1e-2,
        buckets=tuple(range(64, 513, 64)),
    ),
}
