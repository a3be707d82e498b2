"""The lab: problems with exact answers, traces that are right where they claim to be, training that can be taken up."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jettison.plugins.trimr.config import TrimROptions
from lab import data, measure, systems, traces, train_reasoner, vocabulary
from lab.levels import LEVELS, Level
from lab.problems import FAMILIES, Difficulty, Problem, draw

STEP = re.compile(r"(-?\d+)([-+*])(\d+)=(-?\d+)")
CAREFUL = traces.Habits(slip=0.0, misreads=0.0, loops=0.0, wanders=0.0)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return vocabulary.train()


def problems(family: str, count: int = 100, held_out: bool = False) -> list[Problem]:
    rng = random.Random(f"{family} {held_out}")
    return [draw(rng, Difficulty(families=(family,)), held_out=held_out) for _ in range(count)]


def by_reading(question: str) -> int:
    """The answer from the question's text alone, by another way than the generator's."""
    if found := re.fullmatch(r"Let (.*)\. Find (.*)\.", question):
        values = dict(pair.split("=") for pair in found[1].split(", "))
        return int(eval(re.sub(r"(\d*)([a-j])", lambda m: f"{m[1] or 1}*{values[m[2]]}", found[2])))
    if found := re.fullmatch(r"Add up (.*) modulo (\d+)\.", question):
        return sum(int(part[1:]) for part in found[1].split(", ")) % int(found[2])
    first, *changes, asked = re.split(r"\. ", question)
    assert asked.startswith("How many")
    losses = ("loses", "sells", "gives away")
    numbers = [
        int(re.findall(r"\d+", change)[0]) * (-1 if any(w in change for w in losses) else 1) for change in changes
    ]
    return int(re.findall(r"\d+", first)[0]) + sum(numbers)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_what_its_question_says(family: str) -> None:
    for problem in problems(family, 300):
        assert problem.answer == by_reading(problem.question), problem.question


@pytest.mark.parametrize("family", FAMILIES)
def test_no_training_problem_is_held_out(family: str) -> None:
    training = {problem.question for problem in problems(family, 400)}
    kept = {problem.question for problem in problems(family, 400, held_out=True)}
    assert not training & kept


@pytest.mark.parametrize("family", FAMILIES)
def test_a_careful_trace_has_no_wrong_step_and_ends_at_the_answer(family: str) -> None:
    for number, problem in enumerate(problems(family)):
        thinking = traces.think(random.Random(number), problem, CAREFUL)
        for left, sign, right, result in STEP.findall(thinking.text):
            exact = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
            assert int(result) == problem.reduce(exact), f"{problem.question}: {left}{sign}{right}={result}"
        assert set(thinking.stated) == {problem.answer}, problem.question
        assert traces.stated_in(thinking.text) == thinking.stated


def test_every_phenomenon_occurs_and_the_first_answer_is_worse_than_the_last() -> None:
    rng = random.Random(5)
    first = last = misread = endless = long = 0
    count = 1_000
    for _ in range(count):
        problem = draw(rng, Difficulty(), held_out=False)
        thinking = traces.think(rng, problem, traces.Habits())
        results = traces.stated_in(thinking.text)
        assert results == thinking.stated or thinking.endless
        misread += "I misread" in thinking.text
        endless += thinking.endless
        long += len(thinking.thoughts) > 20
        first += bool(results) and results[0] == problem.answer
        last += traces.most_stated(results) == problem.answer
    # Of 1,000 draws with these probabilities, each bound is at least four standard deviations off.
    assert last - first > 100, f"first {first}, last {last} right of {count}"
    assert misread > 5
    assert endless > 20
    assert long > 20


def test_the_guidance_of_the_lab_is_that_of_the_plugin() -> None:
    options = TrimROptions()
    assert options.gentle == traces.GENTLE
    assert options.forceful.replace("{end}", traces.END_THINK) == systems.GUIDANCE


def test_digits_are_single_tokens_and_all_text_survives(tokenizer: Any) -> None:
    ids = tokenizer.encode("-4095+17", add_special_tokens=False)
    assert [tokenizer.decode([token]) for token in ids] == list("-4095+17")
    for text in ("等等 — naïve 🙂\t\x07", traces.GENTLE, systems.GUIDANCE):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_chat_template_opens_thinking(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = again.apply_chat_template([{"role": "user", "content": "1+1?"}], add_generation_prompt=True, tokenize=False)
    assert text == vocabulary.prompt("1+1?")
    assert text.endswith("<think>\n")


def test_guidance_and_question_are_not_learned_and_the_rest_is(tokenizer: Any) -> None:
    level = replace(LEVELS["full"], habits=replace(traces.Habits(), steered=1.0))
    seen = 0
    for number in range(60):
        ids, learned = data.encode(level, tokenizer, random.Random(number))
        spans = re.findall(r"0+|1+", "".join(str(int(flag)) for flag in learned))
        assert len(spans) == 4, "question, thinking, guidance, answer"
        at = len(spans[0]) + len(spans[1])
        guidance = tokenizer.decode(ids[at : at + len(spans[2])])
        assert guidance in (traces.GENTLE, systems.GUIDANCE)
        answer = re.fullmatch(r"(?s).*The answer is (-?\d+)\.<\|end\|>", tokenizer.decode(ids))
        stated = traces.stated_in(tokenizer.decode(ids[:at]))
        if stated:
            assert answer is not None
            assert int(answer[1]) == traces.most_stated(stated)
            seen += 1
    assert seen > 20


def tiny(**changes: Any) -> Level:
    small = replace(LEVELS["mini"], hidden=64, heads=2, layers=2, feed_forward=96, traces=60, steps=6)
    return replace(small, batch_tokens=512, **changes)


def test_traces_and_batches_follow_from_the_seed_and_cover_everything_once(tokenizer: Any) -> None:
    level = tiny()
    one, two = data.make(level, 3), data.make(level, 3)
    assert np.array_equal(one.ids, two.ids)
    assert not np.array_equal(one.ids, data.make(level, 4).ids)
    whole = replace(level, batch_tokens=max(level.buckets))  # one row in the widest bucket
    stream = data.batches(one, replace(whole, buckets=(max(level.buckets),)), 0, tokenizer.pad_token_id)
    rows = [next(stream) for _ in range(len(one))]
    found = sorted(tuple(ids[0].tolist()) for ids, _ in rows)
    expected = []
    for n in range(len(one)):
        trace = one.ids[one.starts[n] : one.starts[n + 1]].tolist()
        expected.append(tuple((trace + [tokenizer.pad_token_id] * max(level.buckets))[: max(level.buckets)]))
    assert found == sorted(expected)


def test_an_interrupted_training_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    level = tiny()
    train_reasoner.train(level, tmp_path / "whole")
    for stop in (2, 5):
        train_reasoner.train(level, tmp_path / "parts", stop_after=stop)
        assert not (tmp_path / "parts" / "model.safetensors").exists()
    record = train_reasoner.train(level, tmp_path / "parts")
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert train_reasoner.train(level, tmp_path / "parts") == record, "a finished run does nothing"
    assert not (tmp_path / "parts" / train_reasoner.STATE).exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "parts").config.model_type == "llama"


def test_the_full_reasoner_is_of_the_size_that_is_asked_for(tokenizer: Any) -> None:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LEVELS["full"].config(tokenizer))
    size = sum(parameter.numel() for parameter in model.parameters())
    assert 5e6 <= size <= 40e6
    assert 2 * size <= 60 << 20, "bf16 checkpoint"


def test_a_response_is_judged_by_hand_worked_cases() -> None:
    problem = Problem("sum", "?", ())
    filler = "".join(f" x{n}" for n in range(40))
    text = f"So the answer is 5. Wait. So the answer is 0. Thus the answer is 0. So the answer is 0.{filler}"
    one = measure.outcome(problem, f"{text}\n</think>\n\nThe answer is 0.", 100, 10, 200)
    assert (one.thinking_tokens, one.answer, one.correct, one.truncated) == (90, 0, True, False)
    assert (one.first, one.first_correct) == (5, False)
    end = text.index(" x")
    assert one.redundant == pytest.approx(1 - end / (len(text) + 1))
    loop = measure.outcome(problem, "I add. " + "3+4=7. " * 60, 200, 0, 200)
    assert (loop.answer, loop.truncated, loop.loops, loop.wanders) == (None, True, True, True)
    assert not one.loops


def test_a_budget_is_matched_to_a_mean() -> None:
    lengths = np.array([10, 20, 30, 100])
    # 40 + 5 for the last alone: (10 + 20 + 30 + 45) / 4
    assert systems.matched_budget(lengths, 5, 26.25) == 40


def test_intervals_hold_their_mean_and_shrink_with_the_number_of_problems() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.random(400) < 0.8, rng.random(400) < 0.6
    mean, low, high = measure.paired_bootstrap(ours, theirs)
    assert low < mean < high
    assert mean == pytest.approx(ours.mean() - theirs.mean())
    # The normal interval of a paired mean, to a fifth of its width.
    half = 1.96 * (ours.astype(float) - theirs).std(ddof=1) / 20
    assert high - mean == pytest.approx(half, rel=0.2)
    assert mean - low == pytest.approx(half, rel=0.2)
    assert measure.saved_share([1.0] * 50, [4.0] * 50) == pytest.approx((0.75, 0.75, 0.75))
