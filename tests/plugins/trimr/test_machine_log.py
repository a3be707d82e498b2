import json
import random

import pytest

from jettison.hooks.errors import InputRefused
from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.machine import Trimmer, replay
from jettison.plugins.trimr.types import TraceEvent, Verdict

QUICK = {"poll_tokens": 1, "min_thought_tokens": 0, "min_think_tokens": 0}
ASKING = {"verifier": {"mode": "endpoint", "url": "http://judge/v1"}}
SETTLED = (
    "Three times four. The answer is 12.\n\nWait, by adding: 4 + 4 + 4, so the answer is 12.\n\n"
    "Hmm, in halves: 6 + 6. The answer is 12.\n\nBut is that right for sure? "
)
PARTS = ["<think>", "</think>", "</th", "ink>", "\n\nWait, ", "\n\nHmm, ", " the answer is 12.", " the answer is 13."]
PARTS += [
    "```\ncode\n",
    "```\n",
    "等等，答案是12。\n\n",
    "loop and loop again. " * 9,
    " it may be so",
    " so we get ink",
]


def random_session(seed, shadow=False):
    """A request with everything in it: pieces of all sizes, verdicts late and lost, guidance, blocks."""
    rng = random.Random(seed)
    log = []
    options = TrimROptions(
        **(QUICK | {"poll_tokens": rng.choice((1, 7, 50)), "min_think_tokens": rng.choice((0, 100))}),
        **(ASKING if rng.random() < 0.6 else {}),
        n_thres=rng.choice((3, 20)),
        under_mode=rng.choice(("and", "or")),
        count_mode=rng.choice(("consecutive", "windowed")),
        max_think_tokens=rng.choice((None, 400)),
        log_text=True,
        shadow=shadow,
    )
    budget, inside = rng.choice((None, 500)), rng.random() < 0.5
    trimmer = Trimmer(options, "What is it?", budget, inside=inside, log=log.append)
    open_checks = []
    for _ in range(120):
        text = rng.choice(PARTS)
        tokens = [len(word) for word in text.split()] or 1
        open_checks += trimmer.feed(text, tokens if rng.random() < 0.5 else len(text.split()))
        if open_checks and rng.random() < 0.5:
            check = rng.choice(open_checks)
            open_checks += trimmer.answer(check, Verdict(rng.choice(((), (3.0, 3.0), (3.0, -3.0), (-3.0,)))))
        if trimmer.decision is not None and rng.random() < 0.7:
            trimmer.applied(trimmer.decision.text, 12)
    trimmer.finish()
    return trimmer, log


def test_t8_a_log_replays_to_itself_through_json():
    decided = 0
    for seed in range(150):
        _, log = random_session(seed)
        lines = [event.model_dump_json() for event in log]
        again = replay(TraceEvent.model_validate_json(line, strict=True) for line in lines)
        assert [event.model_dump_json() for event in again] == lines, f"seed {seed}"
        decided += any(event.event == "decision" for event in log)
    assert decided >= 50


def test_t8_shadow_decides_what_live_decides_first():
    decided = 0
    for seed in range(150):
        live, log = random_session(seed)
        first = next((number for number, event in enumerate(log) if event.event == "decision"), None)
        before = log if first is None else log[: first + 1]
        shadow = replay(before, live.options.model_copy(update={"shadow": True}))
        found = [event.data | {"shadow": False} for event in shadow if event.event == "decision"]
        wanted = [] if first is None else [log[first].data]
        assert found == wanted, f"seed {seed}"
        assert live.shadowed == []
        decided += bool(wanted)
    assert decided >= 50
    for seed in range(20):
        shadowed, log = random_session(seed, shadow=True)
        assert shadowed.decision is None
        assert [event.data["rule"] for event in log if event.event == "decision"] == [
            decision.rule for decision in shadowed.shadowed
        ]


def test_a_log_without_log_text_holds_no_text_and_is_refused_by_replay():
    log = []
    trimmer = Trimmer(TrimROptions(**QUICK), "my secret question", log=log.append)
    trimmer.feed(SETTLED, list(range(40)))
    trimmer.applied(trimmer.decision.text, 4)
    text = json.dumps([event.model_dump() for event in log])
    for secret in ("secret", "Three times", "answer is", "[0, 1", "Hmm"):
        assert secret not in text
    with pytest.raises(InputRefused, match="holds no text"):
        replay(log)
    with pytest.raises(InputRefused, match="begins with 'feed'"):
        replay(log[1:])
    with pytest.raises(ValueError, match="needs text, tokens"):
        TraceEvent(event="feed", at_token=0, data={})
