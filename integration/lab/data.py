"""Training traces as token ids, and batches of similar length. All of it follows from the seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.levels import Level
from lab.problems import Problem, draw
from lab.traces import END_THINK, FORCEFUL, GENTLE, ending, final, most_stated, stated_in, think
from lab.vocabulary import END, prompt, train

IGNORED = -100
CHUNK = 2_000


@dataclass(frozen=True)
class Traces:
    """Encoded traces, one after the other.

    Attributes:
        ids: uint16, [tokens].
        learned: bool, [tokens]: whether the token counts in the loss.
        starts: int64, [traces + 1].
    """

    ids: NDArray[np.uint16]
    learned: NDArray[np.bool_]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1


def make(level: Level, seed: int, workers: int = 1, note: Callable[[int, int], None] = lambda *_: None) -> Traces:
    """Write and encode `level.traces` traces; `note(done, all)` is told of progress."""
    firsts = range(0, level.traces, CHUNK)
    work = partial(_chunk, level, seed)
    parts = []
    if workers <= 1:
        for first in firsts:
            parts.append(work(first))
            note(len(parts), len(firsts))
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for part in pool.map(work, firsts):
                parts.append(part)
                note(len(parts), len(firsts))
    lengths = np.concatenate([lengths for _, _, lengths in parts])
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return Traces(np.concatenate([ids for ids, _, _ in parts]), np.concatenate([m for _, m, _ in parts]), starts)


def _chunk(level: Level, seed: int, first: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_], NDArray[np.int64]]:
    tokenizer = _tokenizer()
    rows = [encode(level, tokenizer, Random(f"{seed}/{n}")) for n in range(first, min(first + CHUNK, level.traces))]
    ids = np.concatenate([np.array(ids, np.uint16) for ids, _ in rows])
    learned = np.concatenate([np.array(learned, np.bool_) for _, learned in rows])
    return ids, learned, np.array([len(ids) for ids, _ in rows], np.int64)


@cache
def _tokenizer() -> Any:
    return train()


def encode(level: Level, tokenizer: Any, rng: Random) -> tuple[list[int], list[bool]]:
    """Return one trace's token ids and which of them are learned; at most `level.length` of them."""
    problem = draw(rng, level.difficulty, held_out=False)
    thinking = think(rng, problem, level.habits)
    body = _ids(tokenizer, thinking.text)
    parts = [(_ids(tokenizer, prompt(problem.question)), False)]
    if rng.random() < level.habits.steered:
        parts += _steered(rng, tokenizer, problem, body, level.length)
    else:
        parts.append((body, True))
        if not thinking.endless:
            answer = most_stated(thinking.stated)
            assert answer is not None
            parts.append((_ids(tokenizer, ending(rng, answer) + END), True))
    ids = [token for part, _ in parts for token in part]
    learned = [is_learned for part, is_learned in parts for _ in part]
    return ids[: level.length], learned[: level.length]


def _steered(
    rng: Random, tokenizer: Any, problem: Problem, body: list[int], length: int
) -> list[tuple[list[int], bool]]:
    """Cut the thinking, often just after a thought began, and go on as guidance asks.

    The answer is then the result stated most often so far; where there is none, the true one, as a guess to aim at.
    """
    limit = min(len(body), length // 2 if rng.random() < 0.7 else length - 100)
    at = rng.randint(1, limit)
    newline = _ids(tokenizer, "\n")[0]
    if rng.random() < 0.5:
        breaks = [i + 1 for i in range(1, limit) if body[i] == body[i - 1] == newline]
        at = min(limit, rng.choice(breaks) + rng.randint(0, 10)) if breaks else at
    kept = body[:at]
    stated = most_stated(stated_in(tokenizer.decode(kept)))
    answer = problem.answer if stated is None else stated
    if rng.random() < 0.5:
        rest = f"{answer}\n{END_THINK}{final(answer)}{END}"
        return [(kept, True), (_ids(tokenizer, GENTLE), False), (_ids(tokenizer, rest), True)]
    guidance = f"{FORCEFUL}{END_THINK}\n\n"
    return [(kept, True), (_ids(tokenizer, guidance), False), (_ids(tokenizer, final(answer).strip() + END), True)]


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def batches(traces: Traces, level: Level, seed: int, pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (input ids, labels), both int64 [rows, bucket], for ever; labels are shifted and -100 where not learned."""
    lengths = np.diff(traces.starts)
    bucket_of = np.searchsorted(np.array(level.buckets), lengths)
    epoch = 0
    while True:
        rng = np.random.default_rng((seed, epoch))
        plan = []
        for number, size in enumerate(level.buckets):
            members = rng.permutation(np.flatnonzero(bucket_of == number))
            rows = max(1, level.batch_tokens // size)
            # NOTES: only whole batches, so that a compiled step meets each shape once; the rest gets its turn in
            # another epoch.
            count = len(members) // rows
            plan += [(size, chunk) for chunk in members[: count * rows].reshape(count, rows)]
        for index in rng.permutation(len(plan)):
            yield _batch(traces, *plan[index], pad)
        epoch += 1


def _batch(traces: Traces, size: int, members: NDArray[np.int64], pad: int) -> tuple[Tensor, Tensor]:
    ids = np.full((len(members), size + 1), pad, np.int64)
    learned = np.zeros((len(members), size + 1), np.bool_)
    for row, member in enumerate(members):
        start, stop = traces.starts[member], traces.starts[member + 1]
        ids[row, : stop - start] = traces.ids[start:stop]
        learned[row, : stop - start] = traces.learned[start:stop]
    labels = np.where(learned, ids, IGNORED)[:, 1:]
    return torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(labels.copy())
