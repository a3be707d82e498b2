"""TrimR's policy: what it forces into a request's output and when, and how it reads tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import pytest

from jettison.hooks import ConfigError, EnvironmentRefused, Request, Serving
from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.engine import HELD_BACK, StreamDecoder, TrimR

START, END = "<think>", "</think>"
SPECIAL = (START, END)
VOCAB = 256 + len(SPECIAL)


class Bytes:
    """A tokenizer of single bytes and two special tokens: every character beyond ASCII is split."""

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        while text:
            token = next((i for i, special in enumerate(SPECIAL) if text.startswith(special)), None)
            taken = text[0] if token is None else SPECIAL[token]
            ids += taken.encode() if token is None else [256 + token]
            text = text[len(taken) :]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        data = b"".join(SPECIAL[token - 256].encode() if token >= 256 else bytes([token]) for token in token_ids)
        return data.decode("utf-8", errors="replace")


TEXT = Bytes()
SMALL: dict[str, Any] = {"min_think_tokens": 0, "min_thought_tokens": 0, "poll_tokens": 1}
SETTLED = (
    "I add them: 3+4=7. So the answer is 7.\n\n"
    "Wait, let me check that. 4+3=7. So the answer is 7.\n\n"
    "Alternatively, count up from 4. So the answer is 7.\n\n"
    "Hmm, let me do it again. 3+4=7. So the answer is 7.\n\n"
    "Wait, once more. 3+4=7. So the answer is 7.\n"
)
UNSETTLED = SETTLED.replace("4+3=7. So the answer is 7", "4+3=8. So the answer is 8").replace(
    "again. 3+4=7. So the answer is 7", "again. 3+4=9. So the answer is 9"
)


def plugin(**options: Any) -> TrimR:
    made = TrimR(TrimROptions(**{**SMALL, **options}))
    made.serving(Serving(TEXT, (START, END), VOCAB))
    return made


def request(prompt: str = f"What is 3+4? {START}\n", max_tokens: int | None = 4_000, **params: Any) -> Request:
    return Request(None, TEXT.encode(prompt), params, VOCAB, max_tokens)


def run(policy: Any, text: str) -> tuple[str, int | None]:
    """Generate `text` byte by byte; return the output up to and with the first forced tokens, and where they began."""
    script, output = TEXT.encode(text), []
    for token in script:
        forced = policy.next_tokens(output)
        if forced:
            return TEXT.decode([*output, *forced]), len(output)
        output.append(token)
    return TEXT.decode(output), None


def test_three_equal_answers_end_thinking_gently() -> None:
    policy = plugin().request_policy(request())
    text, at = run(policy, SETTLED)
    assert at is not None
    stated = [match.end() for match in re.finditer("answer is 7.", SETTLED)]
    assert stated[2] <= at < stated[3], f"stopped at {at}, answers end at {stated}: {text!r}"
    assert text == SETTLED[:at] + "\n\n**Final Answer**\n"


def test_answers_that_never_agree_three_times_are_left_alone() -> None:
    made = plugin()
    text, at = run(made.request_policy(request()), UNSETTLED)
    assert (text, at) == (UNSETTLED, None)
    assert made.report() == {"requests": 1, "fires": {}}


@pytest.mark.parametrize("poll", [1, 3, 8, 50])
def test_what_is_forced_does_not_depend_on_how_often_text_is_read(poll: int) -> None:
    _, at = run(plugin(poll_tokens=poll).request_policy(request()), SETTLED)
    _, first = run(plugin().request_policy(request()), SETTLED)
    assert first is not None
    assert at is not None
    assert first <= at < first + poll, f"poll_tokens={poll}: stopped at {at}, with 1 at {first}"
    assert at % poll == 0


def test_after_gentle_guidance_a_new_thought_is_ended_by_force_once() -> None:
    policy = plugin().request_policy(request())
    output: list[int] = []
    _, at = run(policy, SETTLED)
    output = [*TEXT.encode(SETTLED[:at]), *TEXT.encode("\n\n**Final Answer**\n")]
    forced: list[list[int]] = []
    for token in TEXT.encode("\n\nWait, no. Let me see 3+4 again. So the answer is 7.\n\n" * 3):
        answer = policy.next_tokens(output) if not forced else None
        if answer:
            forced.append(answer)
            output += answer
        output.append(token)
    assert len(forced) == 1
    assert TEXT.decode(forced[0]).endswith(f"\n{END}\n\n")
    assert [policy.next_tokens(output[:n]) for n in range(len(output) - 30, len(output))] == [None] * 30


def test_an_answer_after_thinking_is_never_touched() -> None:
    loop = f"3+4=7.\n{END}" + "\n\nWait, so the answer is 7." * 200
    assert run(plugin().request_policy(request()), loop) == (loop, None)


def test_a_prompt_that_does_not_open_thinking_waits_for_its_start() -> None:
    plain = request(f"{START}old{END} What is 3+4?")
    assert run(plugin().request_policy(plain), SETTLED) == (SETTLED, None)
    text, at = run(plugin().request_policy(plain), START + SETTLED)
    assert at is not None
    assert text.endswith("\n\n**Final Answer**\n")


@pytest.mark.parametrize("room", [0, 1, 24, 25, 100])
def test_guidance_is_forced_only_where_the_output_limit_leaves_room(room: int) -> None:
    _, at = run(plugin().request_policy(request()), SETTLED)
    assert at is not None
    guidance = len(TEXT.encode("\n\n**Final Answer**\n"))
    # NOTES: the budget of tokens moves only the underthinking rule, which needs 20 thoughts.
    _, found = run(plugin().request_policy(request(max_tokens=at + room)), SETTLED[: at + 1])
    assert (found == at) == (room > guidance), f"room {room}, guidance {guidance}, stopped at {found}"


def test_a_request_opts_out_changes_options_or_is_refused() -> None:
    made = plugin()
    assert made.request_policy(request(trimr="off")) is None
    assert run(made.request_policy(request(trimr='{"M": 9}')), SETTLED)[1] is None
    with pytest.raises(ConfigError, match="M"):
        made.request_policy(request(trimr='{"M": 0}'))
    assert made.report() == {"opted_out": 1, "requests": 1, "fires": {}}


def test_shadow_counts_and_forces_nothing() -> None:
    made = plugin(shadow=True)
    assert run(made.request_policy(request()), SETTLED) == (SETTLED, None)
    assert made.report() == {"requests": 1, "fires": {"shadow_overthinking": 1}}


def test_an_engine_without_text_or_thinking_strings_is_refused() -> None:
    with pytest.raises(EnvironmentRefused, match="tokenizer"):
        TrimR(TrimROptions()).serving(Serving(None, None, VOCAB))
    with pytest.raises(EnvironmentRefused, match="--reasoning-parser"):
        TrimR(TrimROptions()).serving(Serving(TEXT, None, VOCAB))


def test_a_verifier_inside_the_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="jettison trimr proxy"):
        TrimR(TrimROptions.model_validate({"verifier": {"mode": "endpoint", "url": "http://localhost:1/v1"}}))


@pytest.mark.parametrize("seed", range(20))
def test_text_read_in_parts_is_the_text_read_at_once(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice(["a", " ", "é", "等", "🙂", "\n", END, "x²"]) for _ in range(200)) + "."
    ids = TEXT.encode(text)
    decoder, parts, at = StreamDecoder(TEXT), [], 0
    while at < len(ids):
        size = rng.randint(1, 7)
        parts.append(decoder.push(ids[at : at + size]))
        at += size
    assert "".join(parts) == text, f"seed {seed}"
    assert not any("\ufffd" in part for part in parts), f"seed {seed}: half a character was given out"


def test_bytes_that_are_no_text_are_not_held_back_for_ever() -> None:
    decoder = StreamDecoder(TEXT)
    given = [decoder.push([0xF0]) for _ in range(3 * HELD_BACK)]
    assert "".join(given).count("\ufffd") >= 2 * HELD_BACK
