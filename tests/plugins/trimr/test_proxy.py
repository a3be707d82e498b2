"""T6: what the proxy leaves alone: nothing changes while it is off, nothing fires, or it cannot cut safely."""

import asyncio
import json

import pytest
from aiohttp import ClientSession

from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.proxy import METRICS_PATH, Proxy
from trimr_proxies import BODIES, ROUND, THOUGHTS, before, chat, count, direct, model, through
from trimr_servers import START, Upstream, post, run, serving


@pytest.mark.parametrize("name", BODIES)
def test_t6_trimming_off_leaves_every_byte_as_it_is(name):
    path, body = BODIES[name]
    expected = direct(Upstream(model), path, body)
    upstream = Upstream(model)
    got, _ = through(upstream, path, body, enabled=False)
    assert got == expected
    assert upstream.requests[0][1] == body


@pytest.mark.parametrize("name", BODIES)
def test_t6_a_request_that_opts_out_passes_as_it_is(name):
    path, body = BODIES[name]
    body = {**body, "vllm_xargs": {"trimr": "off"}}
    got, proxy = through(Upstream(model), path, body)
    assert got == direct(Upstream(model), path, body)
    assert count(proxy, "jettison:trim_passed_total", reason="off") == 1


@pytest.mark.parametrize("reasoning", ["reasoning", "reasoning_content", None])
@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("name", ["chat", "chat with usage", "completion"])
def test_t6_where_nothing_fires_the_stream_is_the_same(name, reasoning, opened):
    path, body = BODIES[name]
    calm = TrimROptions(M=64, n_thres=100_000, repeat={"enabled": False})
    expected = direct(Upstream(model, reasoning=reasoning, opened=opened), path, body)
    got, proxy = through(Upstream(model, reasoning=reasoning, opened=opened), path, body, calm)
    assert got == expected
    assert count(proxy, "jettison:trim_requests_total", outcome="whole") == 1


UNWATCHED = {
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "structured": {"response_format": {"type": "json_object"}},
    "logprobs": {"logprobs": True},
    "prompt": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]},
    "hidden": {"include_reasoning": False},
}


@pytest.mark.parametrize("reason", UNWATCHED)
def test_t6_what_cannot_be_cut_safely_passes_as_it_is(reason):
    body = {**chat(stream=True), **UNWATCHED[reason]}
    upstream = Upstream(model)
    got, proxy = through(upstream, "/v1/chat/completions", body)
    assert got == direct(Upstream(model), "/v1/chat/completions", body)
    assert upstream.requests[0][1] == body
    assert count(proxy, "jettison:trim_passed_total", reason=reason) == 1


def test_t6_other_paths_headers_and_statuses_pass():
    async def work():
        async with before(Upstream(model), url_end="/v1") as (_, address), ClientSession() as session:
            async with session.get(address + "/v1/models?x=%20y") as models:
                assert models.headers["X-From"] == "upstream"
                assert (await models.json())["data"][0]["id"] == "m"
            async with session.get(address + "/nowhere") as lost:
                assert lost.status == 404
            async with session.get(address + METRICS_PATH) as metrics:
                assert "jettison:trim_requests" in await metrics.text()

    run(work())


@pytest.mark.parametrize(
    "xargs", [{"trimr": 7}, {"trimr": '{"M": 0}'}, {"trimr": '{"unknown": 1}'}, {"trimr": "{"}, [1]]
)
def test_t6_options_that_are_not_valid_are_one_sentence_and_400(xargs):
    upstream = Upstream(model)
    (status, body), _ = through(upstream, "/v1/chat/completions", chat(vllm_xargs=xargs))
    assert status == 400
    message = json.loads(body)["error"]["message"]
    assert "trimr" in message or "vllm_xargs" in message
    assert upstream.requests == []


def test_t6_a_client_that_leaves_cancels_the_upstream():
    upstream = Upstream(model, delay_s=0.01)

    async def work():
        async with before(upstream) as (_, address), ClientSession() as session:
            async with session.post(address + "/v1/chat/completions", json=chat(stream=True)) as response:
                await response.content.readany()
                assert upstream.live == 1
            for _ in range(200):
                if upstream.cancelled:
                    return
                await asyncio.sleep(0.01)

    run(work())
    assert upstream.cancelled == 1
    assert upstream.sent < len(THOUGHTS) / 2


def test_t6_an_upstream_that_dies_is_said_to_have_died():
    (status, body), _ = through(Upstream(model, die_after=40), *BODIES["chat"])
    assert status == 200
    assert b'"error"' in body
    (status, body), _ = through(Upstream(model, die_after=40), *BODIES["chat, not streamed"])
    assert status == 502

    async def nobody():
        async with serving(Proxy(TrimROptions(), "http://127.0.0.1:9").app()) as address:
            return await post(address + "/v1/chat/completions", chat(stream=True))

    assert run(nobody())[0] == 502


def test_t6_a_thinking_string_in_the_question_opens_nothing():
    def plain(prompt):
        return ROUND * 12

    body = chat(stream=True, messages=[{"role": "user", "content": f"What does {START} mean? How many are there?"}])
    upstream = Upstream(plain, reasoning=None, opened=False)
    got, _ = through(upstream, "/v1/chat/completions", body)
    assert got == direct(Upstream(plain, reasoning=None, opened=False), "/v1/chat/completions", body)
    assert len(upstream.requests) == 1
