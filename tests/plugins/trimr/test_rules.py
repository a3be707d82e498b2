import itertools

import pytest

from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.machine import Trimmer
from jettison.plugins.trimr.rules import Overthinking, Progress, Underthinking, rules_of
from jettison.plugins.trimr.types import Verdict

ASKING = {"mode": "endpoint", "url": "http://judge/v1"}


def scripted(answers, options, budget=None, tokens=100):
    """Thoughts whose answers only the verifier knows; returns (thought, rule, force) where thinking first ends."""
    trimmer = Trimmer(options, "What is it?", budget)
    for number, _ in enumerate([*answers, None]):
        text = ("Wait, " if number else "") + f"this is thought {number} and it goes on to its own end.\n\n"
        checks = trimmer.feed(text, tokens)
        while checks:
            check = checks[0]
            if check.kind == "exist":
                yes = answers[check.thought] is not None
            else:
                before = [answer for answer in answers[: check.thought] if answer is not None]
                yes = before[-1] == answers[check.thought] if options.count_mode == "consecutive" else None
                if yes is None:
                    named = int(check.first.split("thought ")[1].split()[0])
                    yes = answers[named] == answers[check.thought]
            checks = trimmer.answer(check, Verdict((5.0, 5.0) if yes else (-5.0, -5.0)))
        if trimmer.decision is not None:
            return number, trimmer.decision.rule, trimmer.decision.force
    return None


def options(**changes):
    base = {"poll_tokens": 1, "min_thought_tokens": 0, "min_think_tokens": 0, "verifier": ASKING, "n_thres": 100_000}
    return TrimROptions(**(base | changes))


@pytest.mark.parametrize("mode", ["consecutive", "windowed"])
@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_t2_agreement_fires_exactly_at_the_answer_after_m_agreements(m, mode):
    found = scripted(["E"] * 8, options(M=m, count_mode=mode))
    assert found == (m + 1, "overthinking", "gentle"), (
        f"M {m}, {mode}: the thought {m} ends when thought {m + 1} begins"
    )


def test_t2_a_mismatch_starts_again_unless_windowed():
    assert scripted("AABAA", options()) is None
    assert scripted("AABAA", options(count_mode="windowed")) == (4, "overthinking", "gentle")
    assert scripted("AABAAA", options()) == (6, "overthinking", "gentle")
    assert scripted("ABABABAB", options()) is None
    assert scripted("ABABABAB", options(count_mode="windowed")) is None


def test_t2_thoughts_without_an_answer_neither_count_nor_break():
    assert scripted(["A", None, "A", None, None, "A"], options()) == (6, "overthinking", "gentle")


def test_t2_no_answer_twenty_thoughts_and_half_the_budget_end_by_force_once():
    kept = options(n_thres=20, r_thres=0.5, under_mode="and")
    assert scripted([None] * 40, kept, budget=4_000) == (20, "underthinking", "forceful")
    assert scripted([None] * 40, kept, budget=6_000) == (29, "underthinking", "forceful"), "3,000 tokens are thought 30"
    trimmer = Trimmer(kept, "What is it?", 4_000)
    for number in range(60):
        for check in trimmer.feed(("Wait, " if number else "") + "one more thought without an end.\n\n", 100):
            trimmer.answer(check, Verdict((-5.0,)))
        if trimmer.decision is not None:
            trimmer.applied(trimmer.decision.text, 20)
            assert not trimmer.in_thinking
    assert trimmer.decision is None
    assert number == 59


@pytest.mark.parametrize(("thoughts", "budget"), [(19, 2_000), (40, 1_000_000), (40, None)])
def test_t2_one_condition_alone_is_not_enough_in_and_mode(thoughts, budget):
    kept = options(n_thres=20, r_thres=0.5, under_mode="and")
    assert scripted([None] * thoughts, kept, budget=budget) is None, f"{thoughts} thoughts of {budget} tokens"


def test_t2_one_condition_is_enough_in_or_mode():
    either = options(n_thres=20, r_thres=0.5, under_mode="or")
    assert scripted([None] * 40, either, budget=1_000) == (4, "underthinking", "forceful"), "500 of 1,000 tokens"
    assert scripted([None] * 40, either, budget=1_000_000) == (20, "underthinking", "forceful")
    assert scripted([None] * 40, either, budget=None) == (20, "underthinking", "forceful")


def test_t2_agreement_rules_out_underthinking():
    trimmer_options = options(n_thres=4, r_thres=0.1, under_mode="or", min_think_tokens=0)
    assert scripted("AAA" + "B" * 10, trimmer_options, budget=1_000_000) == (3, "overthinking", "gentle")
    progress = Progress(tokens=900, budget=1_000, thoughts=30, labels=[0, 0, 0, 1], agreed=True)
    assert not Underthinking(0.5, 20, "and").fires(progress)


def test_t2_nothing_fires_before_the_minimum():
    assert scripted("A" * 30, options(min_think_tokens=1_500)) == (14, "overthinking", "gentle")


def test_t2_every_sequence_of_up_to_six_answers_agrees_with_a_direct_count():
    for mode in ("consecutive", "windowed"):
        for m in (1, 2, 3):
            rule = Overthinking(m, mode)
            for size in range(7):
                for labels in itertools.product(range(3), repeat=size):
                    last = labels[-(m + (2 if mode == "windowed" else 1)) :]
                    wanted = size > m and last.count(labels[-1]) >= m + 1
                    assert rule.agrees(labels) is wanted, f"{labels}, M {m}, {mode}"


def test_open_ended_requests_have_no_overthinking_rule():
    assert "overthinking" in [rule.name for rule in rules_of(TrimROptions(), open_ended=False)]
    assert "overthinking" not in [rule.name for rule in rules_of(TrimROptions(), open_ended=True)]
    poem, value = "Write a poem.", "What is it?"
    for question, answer, fires in (
        (poem, "auto", False),
        (poem, "exact", True),
        (value, "auto", True),
        (value, "open", False),
    ):
        trimmer = Trimmer(options(verifier={}, answer=answer), question)
        for number in range(6):
            trimmer.feed(("Wait, " if number else "") + f"in way {number * 7919} the answer is 12.\n\n", 20)
        assert (trimmer.decision is not None) is fires, f"{question} {answer}"
