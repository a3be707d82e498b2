import json

import pytest

from jettison.hooks.config import parse_section
from jettison.hooks.errors import ConfigError, InputRefused, JettisonError
from jettison.plugins.trimr.config import RequestOptions, TrimROptions
from jettison.plugins.trimr.markers import families, markers_of


def test_the_defaults_are_those_of_the_paper_and_the_issue():
    options = parse_section(TrimROptions, "trimr", {})
    assert (options.M, options.count_mode) == (2, "consecutive")
    assert (options.r_thres, options.n_thres, options.under_mode) == (0.5, 20, "and")
    assert (options.tau_exist, options.tau_equiv) == (0.0, 1.0)
    assert (options.window_sentences, options.window_tokens, options.poll_tokens) == (6, 256, 50)
    assert (options.min_think_tokens, options.cooldown_tokens) == (256, 32)
    assert options.verifier.mode == "none"
    assert not options.shadow
    assert not options.log_text, "text is user data"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"M": 0}, "greater than or equal to 1"),
        ({"M": 2.5}, "integer"),
        ({"M": 10**20}, "less than or equal"),
        ({"r_thres": 0.0}, "greater than 0"),
        ({"r_thres": 1.5}, "less than or equal to 1"),
        ({"tau_equiv": "high"}, "valid number"),
        ({"count_mode": "sometimes"}, "consecutive"),
        ({"thres": 3}, "unknown"),
        ({"r_tres": 0.5}, "did you mean 'r_thres'"),
        ({"markers": "klingon"}, "auto, english"),
        ({"markers": []}, "1 to 500"),
        ({"markers": ["\n"]}, "in one line"),
        ({"markers": ["a", "b "]}, "no space at its ends"),
        ({"markers": ["a"] * 501}, "1 to 500"),
        ({"gentle": "stop {end}"}, "nowhere"),
        ({"forceful": "stop"}, "exactly once"),
        ({"forceful": "{end}{end}"}, "exactly once"),
        ({"forceful": "a\u0000{end}"}, "control character"),
        ({"gentle": "<|im_end|>"}, "control token"),
        ({"gentle": "x" * 3_000}, "at most 2000"),
        ({"min_thought_tokens": 64, "max_thought_tokens": 64}, "below 'max_thought_tokens'"),
        ({"max_think_tokens": 100}, "'min_think_tokens' is above"),
        ({"verifier": {"mode": "endpoint"}}, "'url' is needed"),
        ({"verifier": {"url": "http://a/v1"}}, "by no other"),
        ({"verifier": {"mode": "endpoint", "url": "file:///x"}}, "pattern"),
        ({"verifier": {"mode": "endpoint", "url": "http://user:word@host"}}, "pattern"),
        ({"verifier": {"in_flight": 2}}, "1"),
        ({"verifier": {"deadline_s": 0}}, "greater than 0"),
        ({"repeat": {"span": 64, "ngram": 64}}, "at least twice"),
        ({"repeat": {"times": 1}}, "greater than or equal to 2"),
    ],
)
def test_a_bad_option_is_one_clear_refusal(content, message):
    with pytest.raises(ConfigError) as refusal:
        parse_section(TrimROptions, "trimr", content)
    assert message in str(refusal.value), content
    assert "\n" not in str(refusal.value)


def test_a_file_of_options_is_inlined(tmp_path):
    (tmp_path / "trimr.yaml").write_text("M: 3\nmarkers: [Stop, Again]\nverifier: {mode: self}\n")
    content = TrimROptions.from_flag(str(tmp_path / "trimr.yaml"))
    options = parse_section(TrimROptions, "trimr", content)
    assert (options.M, options.markers, options.verifier.mode) == (3, ["Stop", "Again"], "self")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputRefused, match="holds a list"):
        TrimROptions.from_flag(str(tmp_path / "list.json"))
    with pytest.raises(InputRefused, match="cannot read"):
        TrimROptions.from_flag(str(tmp_path / "none.json"))


def test_every_family_has_markers_of_its_languages():
    assert families()[0] == "auto"
    for family in families():
        markers = markers_of(family)
        assert len(markers) == len(set(markers)) >= 5
        assert all(isinstance(marker, str) and marker.strip() == marker for marker in markers)
    assert {"Wait", "But", "Alternatively", "Hmm", "等等", "但是"} <= set(markers_of("auto"))
    assert markers_of(["A", "B"]) == ("A", "B")


def test_a_request_may_say_off_on_or_some_options():
    assert RequestOptions.from_xargs({}) == RequestOptions()
    assert RequestOptions.from_xargs({"other": 3}) == RequestOptions()
    assert not RequestOptions.from_xargs({"trimr": "off"}).enabled
    assert RequestOptions.from_xargs({"trimr": "on"}).enabled
    text = json.dumps({"M": 3, "min_think_tokens": 0, "question": "What is 3 * 4?", "shadow": True})
    for value in (text, json.loads(text)):
        own = RequestOptions.from_xargs({"trimr": value})
        options = own.applied_to(TrimROptions(n_thres=7, verifier={"mode": "self"}))
        assert (options.M, options.min_think_tokens, options.shadow) == (3, 0, True)
        assert (options.n_thres, options.verifier.mode) == (7, "self"), "the rest is the server's"
        assert own.question == "What is 3 * 4?"
    server = TrimROptions()
    assert RequestOptions().applied_to(server) is server


@pytest.mark.parametrize(
    "value",
    [
        "", "yes", "{", "[]", "null", "3", '{"M": -1}', '{"M": 9223372036854775808}', '{"M": true}', '{"M": 1, "M": 2}',
        '{"markers": ["x"]}', '{"gentle": "x"}', '{"verifier": {"mode": "self"}}', '{"log_text": true}', '{"M": NaN}',
        '{"r_thres": 1e999}', "[" * 100_000, "x" * 300_000, 1, 1.5, None.__class__, ["off"], [1] * 1_000_000, b"off",
        {"M": 0}, {"m": 2}, {1: 2},
    ],
)  # fmt: skip
def test_a_bad_request_is_refused_in_one_sentence(value):
    with pytest.raises(JettisonError) as refusal:
        RequestOptions.from_xargs({"trimr": value})
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600


def test_a_request_that_contradicts_the_server_is_refused():
    own = RequestOptions.from_xargs({"trimr": '{"min_think_tokens": 5000}'})
    with pytest.raises(ConfigError, match="'min_think_tokens' is above"):
        own.applied_to(TrimROptions(max_think_tokens=1_000))
