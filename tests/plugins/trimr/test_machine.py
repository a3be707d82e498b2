import random
import time

import pytest

from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.machine import Trimmer
from jettison.plugins.trimr.types import Check, ThinkingStrings, Verdict

QUICK = {"poll_tokens": 1, "min_thought_tokens": 0, "min_think_tokens": 0}
ASKING = {"verifier": {"mode": "endpoint", "url": "http://judge/v1"}}
SETTLED = (
    "Three times four. The answer is 12.\n\nWait, by adding: 4 + 4 + 4, so the answer is 12.\n\n"
    "Hmm, in halves: 6 + 6. The answer is 12.\n\nBut is that right for sure? "
)


def feed_words(trimmer, text):
    """One token per word; stop where a decision stands. Returns how much was fed."""
    at = 0
    for word in text.split(" "):
        piece = text[at : at + len(word) + 1]
        trimmer.feed(piece, 1)
        at += len(piece)
        if trimmer.decision is not None:
            break
    return at


def test_gentle_then_forceful_then_nothing():
    trimmer = Trimmer(TrimROptions(**QUICK, cooldown_tokens=8), "What is 3 * 4?")
    feed_words(trimmer, SETTLED)
    gentle = trimmer.decision
    assert (gentle.rule, gentle.force, gentle.text) == ("overthinking", "gentle", "\n\n**Final Answer**\n")
    trimmer.applied(gentle.text, 4)
    assert trimmer.decision is None
    feed_words(trimmer, "Wait, let me look at the other way once more. ")
    forceful = trimmer.decision
    assert (forceful.rule, forceful.force) == ("reopened", "forceful")
    assert forceful.text.count("</think>") == 1
    trimmer.applied(forceful.text, 20)
    assert not trimmer.in_thinking
    feed_words(trimmer, "The answer is 12. " * 200)
    assert trimmer.decision is None, "an answer is never trimmed, however often it repeats"


def test_a_reopening_after_the_cool_down_does_not_escalate_by_itself():
    trimmer = Trimmer(TrimROptions(**QUICK, cooldown_tokens=8), "What is 3 * 4?")
    feed_words(trimmer, SETTLED)
    trimmer.applied(trimmer.decision.text, 4)
    feed_words(trimmer, "the result of it all is a number that I have found before and may state now.\n\nWait, no ")
    assert trimmer.decision is None
    feed_words(
        trimmer, "doubt is left at all here, so once more: the answer is 12.\n\nHmm, and one more time to be sure "
    )
    assert (trimmer.decision.rule, trimmer.decision.force) == ("overthinking", "forceful"), "gentle is given once"


def test_thinking_that_ends_by_itself_withdraws_the_decision():
    trimmer = Trimmer(TrimROptions(**QUICK), "What is 3 * 4?")
    feed_words(trimmer, SETTLED)
    assert trimmer.decision is not None
    trimmer.feed("</thi", 1)
    assert trimmer.decision is not None
    trimmer.feed("nk>\n\n12", 2)
    assert trimmer.decision is None
    with pytest.raises(ValueError, match="without a decision"):
        trimmer.applied("x", 1)


def test_each_thinking_block_has_its_own_state():
    trimmer = Trimmer(TrimROptions(**QUICK), "What is 3 * 4?", inside=False)
    trimmer.feed("The answer is 12.\n\nWait, the answer is 12.\n\nHmm, the answer is 12.\n\nBut is it really so? ", 30)
    assert trimmer.decision is None, "outside thinking nothing counts"
    trimmer.feed("<th", 1)
    trimmer.feed("ink>The answer is 12.\n\nWait, the answer is 12.\n\nHmm, no.</think> text <think>", 20)
    assert trimmer.in_thinking
    feed_words(trimmer, "Once more the answer is 12.\n\nBut is it really so, after all of this? ")
    assert trimmer.decision is None, "two answers of an earlier block do not count"
    for number in range(3):
        feed_words(trimmer, f"In way {number} the answer is 12.\n\nWait, is it really so, after all of this? ")
    assert trimmer.decision is not None
    assert trimmer.thinking_tokens < 80


def test_a_start_string_at_the_head_is_no_text():
    for head in ("<think>", "\n<think>\n", "<thi"):
        trimmer = Trimmer(TrimROptions(**QUICK), "What is 3 * 4?")
        for sign in head:
            trimmer.feed(sign, 1)
        feed_words(trimmer, SETTLED)
        assert trimmer.decision is not None, head
        assert trimmer.in_thinking


def test_the_thinking_strings_are_those_given():
    strings = ThinkingStrings("[THINK]", "[/THINK]")
    trimmer = Trimmer(TrimROptions(**QUICK, max_think_tokens=5), "What?", thinking=strings)
    feed_words(trimmer, "one two </think> four five six seven")
    assert trimmer.decision.rule == "ceiling"
    assert "[/THINK]" in trimmer.decision.text
    assert "</think>" not in trimmer.decision.text
    assert trimmer.decision.at_token == 5


def test_nothing_is_decided_inside_a_tool_call_or_code():
    trimmer = Trimmer(TrimROptions(**QUICK, max_think_tokens=40), "What is 3 * 4?")
    feed_words(trimmer, "I look it up.\n\n<tool_call>\n" + '{"a": "b c"}, ' * 40)
    assert trimmer.thinking_tokens > 80
    assert trimmer.decision is None
    trimmer.feed("\n</tool_call>\nso ", 4)
    assert trimmer.decision.rule == "ceiling"
    trimmer = Trimmer(TrimROptions(**QUICK), "What is 3 * 4?")
    settled = SETTLED[: SETTLED.index("But")] + "But here is code:\n```\nx = 1\n"
    trimmer.feed(settled, 40)
    assert trimmer.decision is None, "gentle guidance would land in the code"
    trimmer.feed("```\n", 1)
    assert trimmer.decision.rule == "overthinking"


def test_text_is_looked_at_every_poll_tokens():
    trimmer = Trimmer(TrimROptions(**(QUICK | {"poll_tokens": 50})), "What is 3 * 4?")
    assert trimmer.next_look == 50
    trimmer.feed(SETTLED, 49)
    assert trimmer.decision is None
    assert trimmer.next_look == 50
    trimmer.feed("x ", 1)
    assert trimmer.decision is not None
    assert trimmer.next_look == 100


def test_a_phase_brings_the_looks_forward():
    options = TrimROptions(poll_tokens=50)
    looks = [Trimmer(options, "What?", phase=phase).next_look for phase in (0, 1, 20, 49, 500)]
    assert looks == [50, 49, 30, 1, 1]
    trimmer = Trimmer(options, "What?", phase=20)
    for _ in range(31):
        trimmer.feed("word ", 1)
    assert trimmer.next_look == 80


def test_a_question_that_plants_answers_does_not_end_thinking():
    planted = (
        "Say this. The answer is 7.\n\nWait, the answer is 7.\n\nHmm, the answer is 7.\n\nBut what is 3 * 4, really?"
    )
    trimmer = Trimmer(TrimROptions(**QUICK), planted)
    feed_words(trimmer, planted + "\n\nWait, now for the real work of it all. ")
    assert trimmer.decision is None
    feed_words(trimmer, SETTLED)
    assert trimmer.decision is not None, "real answers still count"


@pytest.mark.parametrize("seed", range(10))
def test_decisions_do_not_depend_on_pieces_between_two_looks(seed):
    """Engines hand over fifty tokens at once, proxies one; both must decide alike."""
    rng = random.Random(seed)
    words = []
    for number in range(30):
        words += (["Wait,"] if number else []) + [f"w{rng.randrange(1000)}" for _ in range(rng.randint(10, 120))]
        words += [f"The answer is {rng.choice((12, 12, 12, 13))}.\n\n"]
    pieces = [word if word.endswith("\n") else word + " " for word in words]
    options = TrimROptions(poll_tokens=50, min_think_tokens=0)

    def run(sizes):
        trimmer, at, decisions = Trimmer(options, "What is it?", 3_000), 0, []
        while at < len(pieces):
            size = min(sizes(), 50 - at % 50, len(pieces) - at)
            trimmer.feed("".join(pieces[at : at + size]), size)
            at += size
            if trimmer.decision is not None:
                decisions.append(trimmer.decision)
                trimmer.applied(trimmer.decision.text, 50 - at % 50 if at % 50 else 50)
                if not trimmer.in_thinking:
                    break
        return decisions

    one = run(lambda: 1)
    assert one
    assert one == run(lambda: 50) == run(lambda: rng.randint(1, 9))


def test_verdicts_may_be_late_repeated_stale_or_missing():
    trimmer = Trimmer(TrimROptions(**QUICK, **ASKING), "What colour is it?")
    yes, no = Verdict((4.0, 4.0)), Verdict()
    first = trimmer.feed("It looks to be a kind of blue.\n\nWait, it is blue in the light too, I think.\n\n", 20)
    assert [check.kind for check in first] == ["exist"]
    assert first[0].first == "It looks to be a kind of blue."
    more = "Hmm, and blue in the dark, as far as I can tell here.\n\nBut what is blue to us all, then? "
    assert trimmer.feed(more, 20) == []
    later = trimmer.answer(first[0], yes)
    assert [(check.kind, check.thought) for check in later] == [("exist", 1)]
    assert trimmer.answer(first[0], yes) == [], "twice"
    assert trimmer.answer(Check(99, "exist", 0, "", ""), yes) == [], "never asked"
    pair = trimmer.answer(later[0], yes)
    assert [(check.kind, check.thought) for check in pair] == [("equiv", 1)]
    assert (pair[0].first, pair[0].second) == (first[0].first, later[0].first)
    third = trimmer.answer(pair[0], yes)
    assert [(check.kind, check.thought) for check in third] == [("exist", 2)]
    assert trimmer.answer(third[0], no) == [], "no answer counts as none stated"
    assert trimmer.decision is None
    trimmer.feed("</think>", 1)
    assert trimmer.answer(third[0], yes) == []
    assert trimmer.decision is None


def test_a_verdict_that_never_comes_does_not_block_for_ever():
    trimmer = Trimmer(TrimROptions(**QUICK, **ASKING), "What colour is it?")
    asked = []
    for number in range(40):
        asked += trimmer.feed(f"Wait, in view {number} it is a kind of {number * 7} blue.\n\n", 20)
    assert [check.thought for check in asked[:2]] == [0, 1], "a stale question makes room for a newer one"
    assert len(asked) > 10
    assert trimmer.answer(asked[0], Verdict((4.0,))) == []


@pytest.mark.parametrize(
    ("scores", "threshold", "accepted"),
    [
        ((0.1,), 0.0, True),
        ((0.0,), 0.0, False),
        ((), 0.0, False),
        ((2.0, 0.5), 1.0, False),
        ((2.0, 1.5), 1.0, True),
        ((float("nan"),), -100.0, False),
        ((float("inf"), float("nan")), 0.0, False),
        ((float("-inf"),), 0.0, False),
    ],
)
def test_verdicts_are_judged_by_all_their_scores(scores, threshold, accepted):
    assert Verdict(scores).accepts(threshold) is accepted


def test_hostile_streams_cost_no_time_and_never_raise():
    rng = random.Random(0)
    alphabet = [
        "<think>",
        "</think>",
        "<",
        "\n",
        "\n\n",
        "Wait",
        "`",
        "```\n",
        "$$",
        "\\boxed{",
        "{",
        "}",
        "答案是",
        "\ufffd",
    ]
    for unit in [*alphabet, "a", "\\begin{x}", "<tool_call>", "\x00", "\ud800", "the answer is 1\n\nWait, "]:
        trimmer = Trimmer(TrimROptions(**(QUICK | {"poll_tokens": 50}), **ASKING), unit * 1_000, 10**6)
        start = time.process_time()
        for _ in range(400):
            trimmer.feed((unit * 200)[:200], 50)
        assert time.process_time() - start < 4.0, (
            f"{unit!r}: 80,000 characters took {time.process_time() - start:.1f} s"
        )
    for _ in range(100):
        trimmer = Trimmer(TrimROptions(**QUICK), "".join(rng.choices(alphabet, k=20)), inside=rng.random() < 0.5)
        for _ in range(50):
            trimmer.feed("".join(rng.choices(alphabet, k=rng.randint(0, 6))), rng.randint(0, 9))
            if trimmer.decision is not None:
                trimmer.applied(trimmer.decision.text, 5)


def test_a_request_on_which_nothing_fires_costs_microseconds_per_token():
    rng = random.Random(1)
    options = TrimROptions()
    words = [f"{rng.choice(('we', 'take', 'the', 'sum', 'of', 'parts'))}{rng.randrange(500)} " for _ in range(20_000)]
    trimmer = Trimmer(options, "What is it?", 10**6)
    start = time.process_time()
    for at in range(0, len(words), 50):
        trimmer.feed("".join(words[at : at + 50]), [rng.randrange(50_000) for _ in range(50)])
    spent = (time.process_time() - start) / len(words)
    assert trimmer.decision is None
    assert spent < 30e-6, f"{spent * 1e6:.1f} microseconds per token"
