"""T8: what was logged in shadow, what was done live and what a replay says are the same decisions."""

import asyncio
import random

import pytest

from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.machine import replay
from jettison.plugins.trimr.prompts import CORRECTION
from jettison.plugins.trimr.replay import decisions
from jettison.plugins.trimr.shadow import TraceLog, read_traces
from trimr_judges import Judge
from trimr_proxies import before
from trimr_servers import END, Upstream, post, run, serving

SETTINGS = {"min_think_tokens": 40, "min_thought_tokens": 8, "poll_tokens": 7, "n_thres": 6, "log_text": True}
COUNT = 40


def thoughts(seed):
    """A random course of thinking: answers that settle, waver, loop or never come."""
    source = random.Random(seed)
    kind = source.choice(["settles", "wavers", "loops", "wanders"])
    if kind == "loops":
        return "Let me see. " + source.choice(["so it goes on and on, ", "42 then 43 then "]) * 40
    parts = []
    for turn in range(source.randint(3, 9)):
        answer = 42 if kind == "settles" else source.choice([7, 42, 43])
        stated = f"So the answer is {answer}." if kind != "wanders" else f"House {turn} looks fine to me now."
        parts.append(f"Looking at it from side {turn}, with care and patience. {stated}")
    return "\n\nWait, ".join(parts)


def model(prompt):
    if END in prompt.rsplit("[assistant]", 1)[-1] or prompt.endswith("**Final Answer**\n"):
        return f"42{END}42" if prompt.endswith("**Final Answer**\n") else "42"
    return thoughts(int(prompt.split("number ")[1].split("?")[0])) + END + "The answer is 42."


def logged(path, verifier=None, **more):
    """Send `COUNT` requests through a proxy that logs to `path`."""

    async def work():
        judge = Judge(decide=lambda prompt: 0.1 if CORRECTION in prompt else 0.9)
        log = TraceLog(path)
        async with serving(judge.app()) as url:
            judged = {"verifier": {"mode": "endpoint", "url": f"{url}/v1", "batch_window_s": 0.0}} if verifier else {}
            options = TrimROptions(**SETTINGS, **judged, **more)
            async with before(Upstream(model, delay_s=0.0005 if verifier else 0), options, log=log.write) as (
                _,
                address,
            ):
                for start in range(0, COUNT, 10):
                    await asyncio.gather(*(ask(address, seed) for seed in range(start, start + 10)))
        log.close()

    run(work(), 100)
    return {trace.events[0].data["question"]: list(trace.events) for trace in read_traces(path)}


async def ask(address, seed):
    body = {"model": "m", "messages": [{"role": "user", "content": f"What is number {seed}?"}], "max_tokens": 2000}
    status, _ = await post(address + "/v1/chat/completions", {**body, "stream": True})
    assert status == 200


@pytest.mark.parametrize("verifier", [False, True])
def test_t8_replay_of_live_logs_decides_alike(tmp_path, verifier):
    logs = logged(tmp_path / "live.jsonl", verifier)
    assert len(logs) == COUNT
    decided = [decisions(events) for events in logs.values()]
    assert 10 < sum(map(bool, decided)) < COUNT, "some are cut and some are not"
    assert len({found[0]["rule"] for found in decided if found}) > 1, "by more than one rule"
    for question, events in logs.items():
        assert replay(events) == events, question


def test_t8_shadow_live_and_replay_decide_alike(tmp_path):
    live = logged(tmp_path / "live.jsonl")
    shadow = logged(tmp_path / "shadow.jsonl", shadow=True)
    for question, events in live.items():
        did, would = decisions(events), decisions(shadow[question])
        assert did[:1] == would[:1], question
        assert decisions(replay(shadow[question])) == would, question
        own = TrimROptions(**SETTINGS)
        assert decisions(replay(shadow[question], own))[:1] == did[:1], question
    assert not any(event.event == "applied" for events in shadow.values() for event in events)
