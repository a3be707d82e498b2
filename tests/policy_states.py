"""Scripted policies, and the buffers and the step's layout of vLLM's runner V2 on the CPU."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jettison.hooks.vllm import compat

if TYPE_CHECKING:
    from jettison.hooks.vllm.policies import PolicyProcessor

VOCAB = 128


class Script:
    """Answers from a table {number of output tokens: answer}, and remembers when it was asked."""

    def __init__(self, table: dict[int, Any]) -> None:
        self.table, self.asked = table, []

    def next_tokens(self, output_token_ids: Sequence[int]) -> Any:
        self.asked.append(len(output_token_ids))
        answer = self.table.get(len(output_token_ids))
        return answer() if callable(answer) else answer


def params(**extra: Any) -> Any:
    return compat.SamplingParams(extra_args=extra or None)


def forced_rows(processor: PolicyProcessor, rows: int, *context: Any) -> dict[int, int]:
    logits = torch.randn(rows, VOCAB)
    before = logits.clone()
    after = processor.apply(logits, *context)
    forced = {}
    for row in range(rows):
        if torch.equal(after[row], before[row]):
            continue
        (token,) = torch.isfinite(after[row]).nonzero().flatten().tolist()
        forced[row] = token
    return forced


class FakeStates:
    """The buffers of runner V2 that a processor may read, on the CPU."""

    def __init__(self, slots: int) -> None:
        self.tokens = torch.zeros(slots, 256, dtype=torch.int32)
        self.total = torch.zeros(slots, dtype=torch.int32)
        self.prompts = torch.zeros(slots, dtype=torch.int32)

    def view(self) -> Any:
        return compat.LogitsProcRequestState(
            device=torch.device("cpu"), max_num_reqs=len(self.total), vocab_size=VOCAB,
            all_token_ids=types.SimpleNamespace(gpu=self.tokens),
            prompt_len=types.SimpleNamespace(np=self.prompts.numpy(), gpu=self.prompts),
            prefill_len=types.SimpleNamespace(np=self.prompts.numpy(), gpu=self.prompts),
            total_len=types.SimpleNamespace(gpu=self.total),
        )  # fmt: skip

    def add(self, slot: int, prompt: Sequence[int], output: Sequence[int] = ()) -> None:
        everything = [*prompt, *output]
        self.prompts[slot], self.total[slot] = len(prompt), len(everything)
        self.tokens[slot, : len(everything)] = torch.tensor(everything, dtype=torch.int32)

    def output(self, slot: int) -> list[int]:
        found: list[int] = self.tokens[slot, self.prompts[slot] : self.total[slot]].tolist()
        return found

    def sample(self, slot: int, token: int) -> None:
        self.tokens[slot, self.total[slot]] = token
        self.total[slot] += 1


def context(slots: Sequence[int], rows: Sequence[int] | None = None) -> Any:
    """A step of runner V2: the slots of its requests, and how many rows of the logits each has (default: one)."""
    counts = [1] * len(slots) if rows is None else rows
    places = [place for place, count in enumerate(counts) for _ in range(count)]
    nothing = torch.zeros(0)
    return compat.LogitsContext(
        expanded_idx_mapping=torch.tensor([slots[place] for place in places]), idx_mapping=torch.tensor(slots),
        idx_mapping_np=np.array(slots, dtype=np.int32),
        expanded_local_pos=torch.tensor([local for count in counts for local in range(count)]),
        input_ids=nothing, pos=nothing, seq_lens_upper_bound_np=np.zeros(len(slots)),
    )  # fmt: skip
