"""Streams cut at any byte: the same events, the same bytes, and thinking told apart from the answer."""

import asyncio
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jettison.plugins.trimr import sse
from jettison.plugins.trimr.proxy_shape import Splitter
from jettison.plugins.trimr.sse import DONE, StreamError, encode, events

MARKS = st.text("<>/think ab", max_size=20)
PLACES = st.lists(st.integers(0, 60), max_size=8)
TEXTS = st.lists(st.text(alphabet=st.characters(codec="utf-8"), max_size=12), max_size=6)
END = "</think>"


def cut(data, places):
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def read(parts):
    async def work():
        async def chunks():
            for part in parts:
                yield part

        return [event async for event in events(chunks())]

    return asyncio.run(work())


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 10_000), max_size=12), st.sampled_from([b"\n", b"\r\n"]))
def test_any_split_gives_the_same_events_and_bytes(texts, places, line_end):
    data = b": ping\n\n" + b"".join(encode({"text": text}) for text in texts) + DONE
    data = data.replace(b"\n\n", line_end * 2)
    found = read(cut(data, places))
    assert b"".join(event.raw for event in found) == data
    assert [event.data for event in found] == [None, *({"text": text} for text in texts), None]
    assert [event.done for event in found] == [False] * (len(texts) + 1) + [True]


def test_data_over_several_lines_is_one_object_and_rubbish_is_only_bytes():
    pretty = b'event: x\ndata: {\ndata:  "a": 1}\n\n'
    rubbish = [
        b'data: {"a": \n\n',
        b"data: [1]\n\n",
        b"id: 7\n\n",
        b"data: " + b"[" * 5000 + b"\n\n",
        b"data: \xff\n\n",
    ]
    found = read([pretty, *rubbish, b'data: {"b": 2}'])
    assert [event.data for event in found] == [{"a": 1}, None, None, None, None, None, {"b": 2}]


def test_an_endless_event_is_broken_off(monkeypatch):
    monkeypatch.setattr(sse, "MAX_EVENT", 1000)
    with pytest.raises(StreamError, match="longer than 1000 bytes"):
        read([b"data: " + b"x" * 600, b"x" * 600])


@settings(max_examples=300, deadline=None)
@given(MARKS, MARKS, PLACES)
def test_thinking_is_told_apart_in_any_split(before, after, places):
    whole = before + END + after
    at = whole.index(END)
    splitter, thought, answer = Splitter(END), "", ""
    for part in cut(whole, places):
        more = splitter.feed(part)
        thought, answer = thought + more[0], answer + more[1]
    last = splitter.feed("", last=True)
    assert (thought + last[0], answer + last[1]) == (whole[:at], whole[at + len(END) :])


@given(MARKS, PLACES)
def test_thinking_that_never_ends_is_all_thinking(text, places):
    if END in text:
        return
    splitter = Splitter(END)
    thought = "".join(splitter.feed(part)[0] for part in cut(text, places)) + splitter.feed("", last=True)[0]
    assert thought == text


def test_events_are_written_as_vllm_writes_them():
    assert encode({"a": ["é", None], "b": 1}) == 'data: {"a":["é",null],"b":1}\n\n'.encode()
    assert json.loads(encode({"a": "\ud800"})[6:])
