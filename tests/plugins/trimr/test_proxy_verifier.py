"""T5: the proxy with a verifier: its verdicts end thinking, and whatever ails it leaves requests whole."""

import pytest

from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.prompts import CORRECTION
from trimr_judges import MOODS, Judge
from trimr_proxies import ANSWER, BODIES, FAST, before, chat, count, direct
from trimr_servers import END, START, Upstream, chunks_of, joined, post, run, serving

ROUND = "The tall house by the river fits every clue that was given so far, I believe.\n\nWait, I should look again. "
THOUGHTS = "Who lives where?\n\n" + ROUND * 8
ONLY_OVERTHINKING = {**FAST, "n_thres": 100_000, "repeat": {"enabled": False}, "answer": "exact"}


def model(prompt):
    if END in prompt.rsplit("[assistant]", 1)[-1]:
        return ANSWER
    if prompt.endswith("**Final Answer**\n"):
        return "The tall house." + END + ANSWER
    return ("" if prompt.endswith(START) else START) + THOUGHTS + END + ANSWER


def agrees(prompt):
    return 0.05 if CORRECTION in prompt else 0.95


def judged(upstream, judge, body, **verifier):
    async def work():
        async with serving(judge.app()) as url:
            settings = {"mode": "endpoint", "url": f"{url}/v1", "deadline_s": 0.5, "batch_window_s": 0.0, **verifier}
            options = TrimROptions(**ONLY_OVERTHINKING, verifier=settings)
            async with before(upstream, options) as (proxy, address):
                return await post(address + "/v1/chat/completions", body), proxy

    return run(work())


def test_t5_agreeing_verdicts_end_thinking():
    upstream, judge = Upstream(model, delay_s=0.002), Judge(decide=agrees)
    (_, body), proxy = judged(upstream, judge, BODIES["chat with usage"][1])
    chunks = chunks_of(body)
    assert [cut["rule"] for cut in chunks[-1]["usage"]["trim"]["cuts"]] == ["overthinking"]
    assert joined(chunks, "reasoning").endswith("**Final Answer**\nThe tall house.")
    assert len(joined(chunks, "reasoning")) < len(THOUGHTS) / 2
    assert count(proxy, "jettison:verifier_calls_total", kind="equiv") >= 2
    asked = [prompt.rsplit("Question:", 1)[1] for prompt in judge.prompts]
    assert all("How much is 7 times 6?" in prompt for prompt in asked)


@pytest.mark.parametrize("mood", MOODS)
def test_t5_a_failing_verifier_leaves_the_request_whole(mood):
    expected = direct(Upstream(model), *BODIES["chat"])
    got, proxy = judged(Upstream(model, delay_s=0.0003), Judge(mood=mood), BODIES["chat"][1])
    assert got == expected, mood
    assert count(proxy, "jettison:verifier_calls_total", kind="exist") >= 1, "it was asked"


def test_t5_a_disagreeing_verifier_leaves_the_request_whole():
    got, _ = judged(Upstream(model, delay_s=0.0003), Judge(decide=lambda prompt: 0.3), BODIES["chat"][1])
    assert got == direct(Upstream(model), *BODIES["chat"])


def test_t5_the_served_model_can_judge_itself():
    judge = Judge(decide=agrees)
    upstream = Upstream(model, delay_s=0.002, judge=judge)

    async def work():
        options = TrimROptions(**ONLY_OVERTHINKING, verifier={"mode": "self", "batch_window_s": 0.0})
        async with before(upstream, options) as (_, address):
            return await post(address + "/v1/chat/completions", chat(stream=True))

    _, body = run(work())
    assert joined(chunks_of(body), "content") == ANSWER
    assert len(joined(chunks_of(body), "reasoning")) < len(THOUGHTS) / 2
    assert judge.bodies[0]["model"] == "m"
