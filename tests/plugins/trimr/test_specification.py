import random
import re

from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.machine import Trimmer
from jettison.plugins.trimr.types import ThinkingStrings, Verdict
from trimr_specification import Chunk, Limits, expected

GENTLE = TrimROptions.model_fields["gentle"].default
FILLER = "we look at the numbers again and go on with them for a while until the line is done "


def random_limits(rng):
    return Limits(
        M=rng.randint(1, 4),
        windowed=rng.random() < 0.5,
        share=rng.choice((0.1, 0.25, 0.5, 0.75, 1.0)),
        thoughts=rng.choice((1, 3, 5, 8, 20)),
        both=rng.random() < 0.5,
        budget=rng.choice((None, 400, 1_000, 3_000, 30_000)),
        min_thought=rng.choice((0, 0, 64, 100, 200)),
        min_think=rng.choice((0, 0, 256, 600)),
        max_think=rng.choice((None, None, 700, 1_500)),
        cooldown=rng.choice((0, 32, 1_000)),
        asks=rng.random() < 0.4,
    )


def random_trace(rng):
    """Answers that change seldom or often, and sizes around the limits above."""
    steadiness, stated, current = rng.choice((0.5, 0.8, 0.95)), rng.choice((0.6, 0.95)), rng.randint(0, 3)
    chunks = []
    for _ in range(rng.randint(1, 16)):
        if rng.random() > steadiness:
            current = rng.randint(0, 3)
        answer = current if rng.random() < stated else None
        chunks.append(Chunk(rng.choice((90, 100, 128, 200, 256, 300)), answer, rng.random() < 0.85))
    return chunks


def text_of(chunk, asks):
    head = "Wait, " if chunk.opens else "And "
    if chunk.answer is None:
        tail = " nothing yet.\n\n"
    elif asks:
        tail = f" it lands on spot {chunk.answer}.\n\n"
    else:
        tail = f" The answer is {chunk.answer}.\n\n"
    room = chunk.tokens - len(head) - len(tail) - 1
    return head + (FILLER * 4)[:room] + "." + tail


def options_of(limits):
    return TrimROptions(
        M=limits.M,
        count_mode="windowed" if limits.windowed else "consecutive",
        r_thres=limits.share,
        n_thres=limits.thoughts,
        under_mode="and" if limits.both else "or",
        min_thought_tokens=limits.min_thought,
        max_thought_tokens=1_000_000,
        min_think_tokens=limits.min_think,
        max_think_tokens=limits.max_think,
        cooldown_tokens=limits.cooldown,
        window_sentences=100,
        window_tokens=4_096,
        poll_tokens=1,
        repeat={"enabled": False},
        verifier={"mode": "endpoint", "url": "http://judge/v1"} if limits.asks else {"mode": "none"},
    )


def judge(check):
    """A perfect verifier: it reads the last spot that an excerpt names."""
    first, second = (re.findall(r"spot (\d)", text)[-1:] for text in (check.first, check.second))
    yes = bool(first) if check.kind == "exist" else first == second
    return Verdict((3.0, 3.0) if yes else (-3.0, 3.0) if check.kind == "equiv" else (-3.0,))


def run(chunks, limits):
    trimmer = Trimmer(options_of(limits), "What is it?", limits.budget, ThinkingStrings())
    found = []
    for number, chunk in enumerate(chunks):
        checks = trimmer.feed(text_of(chunk, limits.asks), chunk.tokens)
        while checks:
            checks = trimmer.answer(checks[0], judge(checks[0]))
        decision = trimmer.decision
        if decision is not None:
            found.append((decision.rule, decision.force, number, decision.at_token))
            trimmer.applied(decision.text, len(decision.text))
            if not trimmer.in_thinking:
                break
    return found


def test_t2_the_machine_decides_as_the_specification(pytestconfig):
    traces = pytestconfig.getoption("--trimr-traces", default=4_000)
    fired: dict[str, int] = {}
    for seed in range(traces):
        rng = random.Random(seed)
        limits, chunks = random_limits(rng), random_trace(rng)
        want = expected(chunks, limits, len(GENTLE))
        assert run(chunks, limits) == want, f"seed {seed}: {limits} {chunks}"
        for rule, force, _, _ in want:
            fired[f"{rule} {force}"] = fired.get(f"{rule} {force}", 0) + 1
    for case in ("overthinking gentle", "overthinking forceful", "underthinking forceful", "ceiling forceful"):
        assert fired.get(case, 0) >= traces // 200, f"{case} fired in {fired.get(case, 0)} of {traces} traces: {fired}"
    assert fired.get("reopened forceful", 0) >= traces // 200, fired
