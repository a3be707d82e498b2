"""The reasoner in real vLLM under four controls of its thinking, on the same problems, seeds and output limit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jettison.hooks.types import Request, Serving
from jettison.hooks.vllm.serving import EngineText
from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.engine import TrimR
from lab.measure import Outcome, outcome
from lab.problems import Problem
from lab.traces import END_THINK, FORCEFUL, THINK
from lab.vocabulary import prompt

PARSER = "deepseek_r1"
"""vLLM's parser of `<think>` and `</think>`."""

GUIDANCE = f"{FORCEFUL}{END_THINK}\n\n"
"""What ends thinking from outside, in every system alike."""

RESERVED = 32
"""Tokens of the output limit that guidance and answer need."""

_ANSWERED = re.compile(r"answer is -?[0-9]+\.")


@dataclass(frozen=True)
class Response:
    """One output: its token ids, and how many there were when something outside ended the thinking, or None."""

    ids: tuple[int, ...]
    stopped_at: int | None = None


@dataclass(frozen=True)
class Task:
    """The problems and how they are put.

    Attributes:
        problems: held out.
        tokenizer: of the reasoner.
        limit: most tokens of an output.
        temperature: of sampling; the seed of a request is `seed` plus its problem's number.
        seed: of the whole task.
    """

    problems: Sequence[Problem]
    tokenizer: Any
    limit: int
    temperature: float = 1.0
    seed: int = 0

    def ids(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def prompts(self) -> list[list[int]]:
        """Token ids of every prompt, thinking opened."""
        return [self.ids(prompt(problem.question)) for problem in self.problems]

    def generate(
        self,
        llm: Any,
        prefixes: Mapping[int, Sequence[int]],
        extra: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> dict[int, tuple[int, ...]]:
        """Go on from these outputs, by number of problem; return the whole outputs."""
        from vllm import SamplingParams

        prompts = self.prompts()
        rows = list(prefixes)
        params = [
            SamplingParams(
                temperature=self.temperature,
                seed=self.seed + row,
                max_tokens=self.limit - len(prefixes[row]),
                extra_args=dict(extra) if extra else None,
                **sampling,
            )
            for row in rows
        ]
        inputs = [{"prompt_token_ids": [*prompts[row], *prefixes[row]]} for row in rows]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return {row: (*prefixes[row], *out.outputs[0].token_ids) for row, out in zip(rows, outputs, strict=True)}

    def whole(self, llm: Any, **sampling: Any) -> list[tuple[int, ...]]:
        """The outputs to all problems from their start."""
        found = self.generate(llm, dict.fromkeys(range(len(self.problems)), ()), **sampling)
        return [found[row] for row in range(len(self.problems))]

    def judge(self, row: int, ids: Sequence[int]) -> Outcome:
        """What one output is worth."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return outcome(self.problems[row], text, len(ids), len(ids) - self.thinking(ids), self.limit)

    def thinking(self, ids: Sequence[int]) -> int:
        """Tokens up to and with the end of thinking; all where it never ended."""
        end = self.tokenizer.convert_tokens_to_ids(END_THINK)
        return ids.index(end) + 1 if end in ids else len(ids)


def settings(length: int, **options: Any) -> dict[str, Any]:
    """Options of a vLLM engine for the reasoner; the same for all systems."""
    from vllm.config import ReasoningConfig

    return {
        "max_model_len": length,
        "max_num_seqs": 64,
        "kv_cache_memory_bytes": 4 << 30,
        "reasoning_parser": PARSER,
        "reasoning_config": ReasoningConfig(reasoning_start_str=THINK, reasoning_end_str=GUIDANCE),
        **options,
    }


def jettison(task: Task, llm: Any, options: TrimROptions) -> list[Response]:
    """All outputs of an engine with `trimr` on; where each was stopped is found by reading it again.

    Raises:
        AssertionError: an output does not go on with the guidance that its second reading decides on.
    """
    text = EngineText(task.tokenizer)
    plugin = TrimR(options)
    plugin.serving(Serving(text, (THINK, END_THINK), len(task.tokenizer)))
    responses = []
    for row, (start, ids) in enumerate(zip(task.prompts(), task.whole(llm), strict=True)):
        policy = plugin.request_policy(Request(None, start, {}, len(task.tokenizer), task.limit))
        assert policy is not None
        stopped, forced_to = None, 0
        for length in range(len(ids)):
            forced = policy.next_tokens(ids[:length]) if length >= forced_to else None
            if forced:
                assert list(ids[length : length + len(forced)]) == forced[: len(ids) - length], f"problem {row}"
                stopped = length if stopped is None else stopped
                forced_to = length + len(forced)
        responses.append(Response(ids, stopped))
    return responses


def first_answer(task: Task, llm: Any, whole: Sequence[Sequence[int]]) -> list[Response]:
    """Stop every thinking in `whole` where it first states a result."""
    cuts = {row: at for row, ids in enumerate(whole) if (at := _first_stated(task, ids)) is not None}
    guidance = task.ids(GUIDANCE)
    stopped = task.generate(llm, {row: [*whole[row][:at], *guidance] for row, at in cuts.items()})
    return [Response(stopped.get(row, tuple(ids)), cuts.get(row)) for row, ids in enumerate(whole)]


def _first_stated(task: Task, ids: Sequence[int]) -> int | None:
    """The number of tokens with which the first result is stated, or None; it must leave room for guidance."""
    high = min(task.thinking(ids), task.limit - RESERVED - len(task.ids(GUIDANCE)))

    def is_stated(length: int) -> bool:
        return _ANSWERED.search(task.tokenizer.decode(list(ids[:length]))) is not None

    if not is_stated(high):
        return None
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_stated(middle) else (middle, high)
    return high


def budget(task: Task, llm: Any, whole: Sequence[Sequence[int]], mean: float) -> tuple[list[Response], int]:
    """vLLM's own `thinking_token_budget`, so large that the mean thinking has `mean` tokens; also that budget."""
    guidance = task.ids(GUIDANCE)
    lengths = np.array([task.thinking(ids) for ids in whole])
    tokens = matched_budget(lengths, len(guidance), mean)
    outputs: list[tuple[int, ...]] = []
    for _ in range(3):
        outputs = task.whole(llm, thinking_token_budget=tokens)
        found = float(np.mean([task.thinking(ids) for ids in outputs]))
        # NOTES: with the same seeds the outputs are those of `whole` up to the cut, but for rounding in another batch.
        if abs(found - mean) <= 0.01 * mean:
            break
        shifted = matched_budget(lengths, len(guidance), 2 * mean - found)
        if shifted == tokens:
            break
        tokens = shifted
    return [Response(ids, _position(ids, guidance)) for ids in outputs], tokens


def matched_budget(lengths: Any, guidance: int, mean: float) -> int:
    """The budget that brings thinkings of these lengths nearest to a mean, guidance included."""
    budgets = np.arange(1, int(lengths.max()) + 1)
    means = [np.where(lengths > tokens, tokens + guidance, lengths).mean() for tokens in budgets]
    return int(budgets[int(np.argmin(np.abs(np.array(means) - mean)))])


def _position(ids: Sequence[int], part: Sequence[int]) -> int | None:
    size = len(part)
    return next((at for at in range(len(ids) - size + 1) if list(ids[at : at + size]) == list(part)), None)


def false_stops(task: Task, llm: Any, responses: Sequence[Response]) -> tuple[int, int]:
    """Return (false stops, stops): one is false if its answer is wrong and going on untrimmed gives the right one."""
    cuts = {row: one.ids[: one.stopped_at] for row, one in enumerate(responses) if one.stopped_at is not None}
    if not cuts:
        return 0, 0
    gone_on = task.generate(llm, cuts)
    false = sum(
        task.judge(row, ids).correct and not task.judge(row, responses[row].ids).correct for row, ids in gone_on.items()
    )
    return false, len(cuts)
