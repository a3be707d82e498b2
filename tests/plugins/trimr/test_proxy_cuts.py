"""T6: cuts through the proxy: token-exact, sums that add up, limits carried over, streams let go of."""

import json

import pytest

from jettison.plugins.trimr.config import TrimROptions
from trimr_proxies import (
    ANSWER,
    BODIES,
    FAST,
    QUESTION,
    ROUND,
    THOUGHTS,
    chat,
    completion,
    count,
    direct,
    model,
    through,
)
from trimr_servers import END, START, Upstream, chunks_of, decode, encode, joined, template


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("reasoning", ["reasoning", "reasoning_content", None])
def test_t6_a_cut_chat_goes_on_token_exact(reasoning, opened):
    upstream = Upstream(model, reasoning=reasoning, opened=opened)
    path, asked = BODIES["chat with usage"]
    (status, body), proxy = through(upstream, path, {**asked, "skip_special_tokens": reasoning is not None})
    assert status == 200
    chunks = chunks_of(body)
    (_, first), (kind, second) = upstream.requests
    assert kind == "completions"
    prompt = encode(template(first["messages"], opened))
    sent = second["prompt"]
    assert sent[: len(prompt)] == prompt
    said = decode(sent[len(prompt) :])
    assert said.endswith("\n\n**Final Answer**\n"), said[-80:]
    assert ("" if opened else START) + THOUGHTS[:200] == said[: 200 + (0 if opened else len(START))]
    if reasoning is not None:
        assert joined(chunks, reasoning) == said.removeprefix(START) + "42"
        assert joined(chunks, "content") == "\n\n" + ANSWER
    else:
        assert joined(chunks, "content") == said + "42" + END + "\n\n" + ANSWER
    usage = chunks[-1]["usage"]
    assert usage["prompt_tokens"] == len(prompt)
    assert usage["completion_tokens"] == len(sent) - len(prompt) + len(encode("42" + END + "\n\n" + ANSWER))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert [cut["rule"] for cut in usage["trim"]["cuts"]] == ["overthinking"]
    assert usage["completion_tokens"] < len(THOUGHTS), "something was saved"
    assert {chunk["id"] for chunk in chunks} == {"chat-1"}, "one stream for the client"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert count(proxy, "jettison:thoughts_stopped_total", rule="overthinking", force="gentle", shadow="false") == 1


@pytest.mark.parametrize("ids", [True, False])
def test_t6_a_cut_completion_goes_on_exact_with_and_without_token_ids(ids):
    upstream = Upstream(model, ids=ids)
    body = completion(stream=True, stream_options={"include_usage": True}, skip_special_tokens=False)
    (_, answer), _ = through(upstream, "/v1/completions", body)
    chunks = chunks_of(answer)
    sent = upstream.requests[1][1]["prompt"]
    text = decode(sent) if ids else sent
    rest = "42" + END + "\n\n" + ANSWER
    assert isinstance(sent, list if ids else str)
    assert body["prompt"] + joined(chunks, "text") == text + rest
    usage = chunks[-1]["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == len(encode(text + rest)) == usage["total_tokens"]
    if ids:
        assert usage["prompt_tokens"] == len(encode(body["prompt"]))
    assert usage["trim"]["exact"] is ids


def test_t6_an_ignored_gentle_prompt_is_followed_by_a_forceful_one():
    def stubborn(prompt):
        if prompt.endswith("**Final Answer**\n"):
            return "\n\nWait, let me double-check once more. " + THOUGHTS
        return model(prompt)

    upstream = Upstream(stubborn)
    (_, body), _ = through(upstream, *BODIES["chat with usage"])
    chunks = chunks_of(body)
    assert len(upstream.requests) == 3
    _, second, third = (
        decode(request["prompt"]) if kind == "completions" else "" for kind, request in upstream.requests
    )
    assert third.startswith(second), "what was kept stays"
    said = third.removeprefix(template(upstream.requests[0][1]["messages"], True))
    assert joined(chunks, "reasoning") + END + joined(chunks, "content") == said + ANSWER
    cuts = chunks[-1]["usage"]["trim"]["cuts"]
    assert [(cut["rule"], cut["force"]) for cut in cuts] == [("overthinking", "gentle"), ("reopened", "forceful")]
    assert chunks[-1]["usage"]["completion_tokens"] == len(encode(said + ANSWER))


@pytest.mark.parametrize("name", ["chat, not streamed", "completion, not streamed"])
def test_t6_a_client_that_does_not_stream_gets_the_same_text(name):
    path, body = BODIES[name]
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    (_, events), _ = through(Upstream(model), path, streamed)
    (status, answer), _ = through(Upstream(model), path, body)
    whole, chunks = json.loads(answer), chunks_of(events)
    assert status == 200
    choice = whole["choices"][0]
    got = choice.get("message", choice)
    for part in ("text", "content", "reasoning"):
        assert (got.get(part) or "") == joined(chunks, part), part
    assert choice["finish_reason"] == "stop"
    assert whole["usage"] == chunks[-1]["usage"]


def test_t6_limits_seed_and_stop_are_carried_over():
    upstream = Upstream(model)
    own = {"max_tokens": 2000, "min_tokens": 700, "seed": 5, "stop": ["STOP"], "temperature": 0.6, "top_p": 0.9,
           "vllm_xargs": {"other": 1}, "logit_bias": {"7": 1}}  # fmt: skip
    through(upstream, "/v1/chat/completions", chat(stream=True, **own))
    first, second = (body for _, body in upstream.requests)
    used = len(second["prompt"]) - len(encode(template(first["messages"], True)))
    assert second["max_tokens"] == 2000 - used
    assert second["min_tokens"] == max(0, 700 - used)
    for name in ("seed", "stop", "temperature", "top_p", "vllm_xargs", "logit_bias"):
        assert second[name] == own[name], name
    assert second["skip_special_tokens"] is False, "the end of thinking must be seen"


def test_t6_no_cut_where_the_limit_leaves_no_room():
    upstream = Upstream(model)
    limit = len(THOUGHTS) // 2
    long = TrimROptions(**FAST, gentle="x" * limit)
    (_, body), proxy = through(upstream, "/v1/chat/completions", chat(stream=True, max_tokens=limit), long)
    assert len(upstream.requests) == 1
    assert chunks_of(body)[-1]["choices"][0]["finish_reason"] == "length"
    assert joined(chunks_of(body), "reasoning") == THOUGHTS[:limit]
    assert count(proxy, "jettison:continuation_failures_total", reason="room") == 1


def test_t6_each_of_several_choices_is_cut_alone():
    def varied(prompt):
        return "Just an easy one: 42." + END + ANSWER if varied.calls.pop(0) else model(prompt)

    varied.calls = [False, True, False, False]
    varied_model = lambda prompt: model(prompt) if "**Final" in prompt else varied(prompt)  # noqa: E731
    upstream = Upstream(varied_model)
    body = chat(stream=True, n=3, seed=10, stream_options={"include_usage": True})
    (_, answer), _ = through(upstream, "/v1/chat/completions", body)
    chunks = chunks_of(answer)
    assert [b["seed"] for kind, b in upstream.requests if kind == "chat"] == [10, 11, 12]
    assert joined(chunks, "reasoning", index=1) == "Just an easy one: 42."
    for index in (0, 2):
        assert joined(chunks, "reasoning", index=index).endswith("**Final Answer**\n42")
        assert joined(chunks, "content", index=index) == "\n\n" + ANSWER
    usage = chunks[-1]["usage"]
    assert usage["prompt_tokens"] == len(encode(template(body["messages"], True))), "the prompt counts once"
    assert [bool(trim) for trim in usage["trim"]] == [True, False, True]
    assert {chunk["id"] for chunk in chunks} == {"chat-1"}


def test_t6_a_cut_cancels_the_first_stream():
    upstream = Upstream(model, delay_s=0.002)
    (_, body), _ = through(upstream, *BODIES["chat"])
    assert joined(chunks_of(body), "content") == "\n\n" + ANSWER
    assert (upstream.cancelled, upstream.finished) == (1, 1)


def test_t6_a_refused_continuation_leaves_the_request_whole():
    path, body = BODIES["chat with usage"]
    upstream = Upstream(model, refuse_continuation=400)
    got, proxy = through(upstream, path, body)
    assert got == direct(Upstream(model), path, body)
    assert count(proxy, "jettison:continuation_failures_total", reason="status") == 1


def test_t6_without_token_ids_a_chat_is_cut_only_if_asked_to():
    path, body = BODIES["chat"]
    got, proxy = through(Upstream(model, ids=False), path, body)
    assert got == direct(Upstream(model, ids=False), path, body)
    assert count(proxy, "jettison:continuation_failures_total", reason="ids") == 1
    upstream = Upstream(model, ids=False)
    (_, answer), _ = through(upstream, path, body, chat_continuation=True)
    message = upstream.requests[1][1]["messages"][-1]
    assert message["role"] == "assistant"
    assert message["content"] == START + joined(chunks_of(answer), "reasoning").removesuffix("42")
    assert joined(chunks_of(answer), "content") == "\n\n" + ANSWER


@pytest.mark.parametrize("lag", [1, 3, 11])
@pytest.mark.parametrize("reasoning", ["reasoning", None])
def test_t6_text_that_the_server_held_back_is_not_lost_at_a_cut(lag, reasoning):
    upstream = Upstream(model, lag=lag, reasoning=reasoning)
    (_, body), _ = through(
        upstream,
        "/v1/chat/completions",
        chat(stream=True, stop=["x" * (lag + 1)], skip_special_tokens=reasoning is not None),
    )
    prompt = encode(template(upstream.requests[0][1]["messages"], True))
    said = decode(upstream.requests[1][1]["prompt"][len(prompt) :])
    got = joined(chunks_of(body), "reasoning", "content")
    assert got == said + "42" + (END if reasoning is None else "") + "\n\n" + ANSWER


def test_t6_metadata_of_ids_stays_with_a_client_that_wants_it():
    upstream = Upstream(model)
    body = completion(stream=True, return_token_ids=True)
    (_, answer), _ = through(upstream, "/v1/completions", body)
    choices = [choice for chunk in chunks_of(answer) for choice in chunk["choices"]]
    ids = [i for choice in choices for i in choice.get("token_ids") or ()]
    sent = upstream.requests[1][1]["prompt"]
    assert choices[0]["prompt_token_ids"] == encode(body["prompt"])
    assert choices[0]["prompt_token_ids"] + ids == sent + encode("42" + END + "\n\n" + ANSWER)


@pytest.mark.parametrize("name", ["chat", "completion"])
@pytest.mark.parametrize("opened", [True, False])
def test_t6_thinking_strings_that_the_server_hides_are_known_by_their_ids(name, opened):
    path, body = BODIES[name]
    if not opened:
        body = {**body, "prompt": f"[user]{QUESTION}[assistant]"} if name == "completion" else body
    upstream = Upstream(model, reasoning=None, opened=opened)
    (_, answer), _ = through(upstream, path, body)
    prompt = body.get("prompt") or template(body["messages"], opened)
    said = decode(upstream.requests[1][1]["prompt"][len(encode(prompt)) :]).removeprefix(START)
    got = joined(chunks_of(answer), "content", "text")
    assert got == said + "42" + "\n\n" + ANSWER
    quick = Upstream(lambda prompt: "Easy." + END + "\n\n" + ROUND * 12, reasoning=None, opened=True)
    got, _ = through(quick, *BODIES[name])
    assert got == direct(Upstream(quick.model, reasoning=None), *BODIES[name]), "an answer is never cut"


def test_t6_special_tokens_that_the_server_hides_inside_the_text_stay_in_the_prompt():
    def marked(prompt):
        return model(prompt) if "**Final" in prompt else model(prompt).replace("step by step", f"step{START} by step")

    upstream = Upstream(marked)
    (_, body), _ = through(upstream, "/v1/completions", completion(stream=True))
    said = decode(upstream.requests[1][1]["prompt"])[len(completion()["prompt"]) :]
    assert f"step{START} by step" in said
    assert joined(chunks_of(body), "text") == said.replace(START, "") + "42\n\n" + ANSWER
