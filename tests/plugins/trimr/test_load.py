"""T9, small: many streams at once, a verifier outage in the middle of them, and what the proxy's core costs a token."""

import asyncio
import time

import pytest

from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.metrics import Metrics
from jettison.plugins.trimr.proxy_watch import Watch
from jettison.plugins.trimr.types import ThinkingStrings
from trimr_judges import Judge
from trimr_proxies import ANSWER, before, chat, count, direct
from trimr_servers import END, Upstream, chunks_of, joined, post, run, serving

STREAMS = 64
THOUGHTS = "\n\nWait, ".join(f"I believe that house {n} fits every clue, as things are now." for n in range(6))
OPTIONS = {"min_think_tokens": 0, "min_thought_tokens": 8, "poll_tokens": 5, "answer": "exact", "n_thres": 100_000}


def model(prompt):
    return THOUGHTS + END + ANSWER


@pytest.mark.parametrize("outage", ["none", "from the start", "half-way"])
def test_t9_64_streams_and_a_verifier_outage_lose_nothing(outage):
    body = chat(stream=True, stream_options={"include_usage": True})
    expected = direct(Upstream(model), "/v1/chat/completions", body)

    async def work():
        judge = Judge(decide=lambda prompt: 0.3, mood="500" if outage == "from the start" else "right")
        async with serving(judge.app()) as url:
            judged = {"mode": "endpoint", "url": f"{url}/v1", "deadline_s": 2.0}
            upstream = Upstream(model, delay_s=0.001)
            async with before(upstream, TrimROptions(**OPTIONS, verifier=judged)) as (proxy, address):
                asked = asyncio.gather(*(post(f"{address}/v1/chat/completions", body) for _ in range(STREAMS)))
                if outage == "half-way":
                    await asyncio.sleep(1.0)
                    judge.mood = "reset"
                return await asked, proxy

    answers, proxy = run(work(), 120)
    assert answers == [expected] * STREAMS, "every stream is whole, byte for byte"
    assert joined(chunks_of(answers[0][1]), "content") == ANSWER
    assert count(proxy, "jettison:trim_requests_total", outcome="whole") == STREAMS
    failed = sum(count(proxy, "jettison:verifier_errors_total", reason=r) for r in ("status", "connection", "breaker"))
    assert (failed > 0) is (outage != "none")


@pytest.mark.parametrize("poll_tokens", [50, 1])
def test_t9_the_core_adds_less_than_two_milliseconds_to_a_token(poll_tokens):
    """CPU time of one token through the core, 64 requests in turn, answers compared exactly at each thought."""
    options = TrimROptions(
        poll_tokens=poll_tokens, M=64, n_thres=100_000, min_thought_tokens=0, repeat={"enabled": True}
    )
    thought = "Then x is ({0} + 3)^2 - {0}, which I expand with care. So the answer is \\boxed{{{0}/7}}.\n\nWait, "

    async def work():
        metrics, times = Metrics(), []
        watches = [
            Watch(
                options,
                "How much is x?",
                None,
                ThinkingStrings(),
                inside=True,
                verifier=None,
                metrics=metrics,
                log=None,
            )
            for _ in range(STREAMS)
        ]
        words = [word for n in range(12) for word in thought.format(n % 3).replace(" ", " \0").split("\0")]
        for at, word in enumerate(words):
            for watch in watches:
                started = time.process_time()
                watch.feed(word, [at])
                assert watch.decision is None
                times.append(time.process_time() - started)
        return sorted(times)

    times = run(work(), 100)
    p95 = times[int(0.95 * len(times))]
    assert p95 <= 0.002, f"p95 {1e3 * p95:.3f} ms over {len(times)} tokens, worst {1e3 * times[-1]:.1f} ms"
