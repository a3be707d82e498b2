import json

import pytest
from pydantic import SecretStr

from faults.plugins import RichOptions, sample_host
from jettison.hooks import ConfigError, PluginOptions
from jettison.hooks.config import options_sha256, parse_section, read_secret, section_from


@pytest.mark.parametrize("config", [None, {}, {"other": 1}, object(), {"j": {}}])
def test_no_section_is_stock(config):
    assert section_from(config) is None


def test_section_is_returned():
    assert section_from({"jettison": {"a": {}}, "other": 1}) == {"a": {}}


@pytest.mark.parametrize("key", ["jetison", "Jettison", "JETTISON", "jettison "])
def test_misspelt_section_is_refused(key):
    with pytest.raises(ConfigError, match="write 'jettison'"):
        section_from({key: {}})


@pytest.mark.parametrize("section", [None, [], "kvtuner", 1])
def test_section_must_be_an_object(section):
    with pytest.raises(ConfigError, match="is of type"):
        section_from({"jettison": section})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "section 'rich' is of type NoneType.*write {}"),
        ({"layer": []}, r"option 'rich.layer' is unknown; known are api_key_env, .*; did you mean 'layers'\?"),
        ({"zzz": 1}, "option 'rich.zzz' is unknown; .*remove it"),
        ({"rules": [{"nam": "x"}]}, "rich.rules.0.name.* is refused .1 more|rich.rules.0.nam' is unknown"),
        (
            {"rules": [{"name": "x", "wieght": 1}]},
            r"'rich.rules.0.wieght' is unknown; known are name, weight; did you .*'weight'",
        ),
        ({"rules": [{}]}, "rich.rules.0.name' is refused; field required"),
        ({"layers": [128]}, "rich.layers.0' = 128 is refused; input should be less than or equal to 127"),
        ({"layers": ["1"]}, "rich.layers.0' = '1' is refused"),
        ({"layers": [1.0]}, "rich.layers.0'"),
        ({"layers": [True]}, "rich.layers.0' = True"),
        ({"layers": 5}, "rich.layers' = 5 is refused"),
        ({"enabled": 1}, "rich.enabled' = 1"),
        ({"enabled": "yes"}, "rich.enabled' = 'yes'"),
        ({"mode": "slow"}, "rich.mode' = 'slow' is refused; input should be 'fast' or 'exact'"),
        ({"ratio": float("nan")}, "rich.ratio is not a finite number"),
        ({"ratio": 10**400}, "rich.ratio"),
        ({"note": "\ud800"}, "rich.note holds a lone surrogate"),
        ({"table": {1: [1]}}, "rich.table has the key 1"),
        ({"note": b"x"}, "rich.note is of type bytes"),
        ({"api_key_env": "sk-live-123"}, "rich.api_key_env' is refused; string should match pattern"),
    ],
)
def test_bad_section_gives_one_sentence(content, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        parse_section(RichOptions, "rich", content)
    assert "\n" not in str(caught.value)


def test_json_types_are_enough():
    content = {"layers": [1, 2], "rules": [{"name": "a", "weight": 1}], "mode": "exact", "table": {"x": [1]}}
    options = parse_section(RichOptions, "rich", content)
    assert parse_section(RichOptions, "rich", json.loads(json.dumps(content))) == options
    assert (options.layers, options.rules[0].weight, options.table) == ((1, 2), 1.0, {"x": (1,)})


def test_options_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        RichOptions().note = "x"


def test_deep_content_is_refused_quickly():
    content = {}
    place = content
    for _ in range(100_000):
        place["note"] = {}
        place = place["note"]
    with pytest.raises(ConfigError, match="deeper than 64"):
        parse_section(RichOptions, "rich", content)


@pytest.mark.parametrize("field", ["api_key", "password", "verifier_secret", "auth_token", "credentials"])
def test_no_option_may_hold_a_secret(field):
    with pytest.raises(ConfigError, match=f"would hold a secret.*declare `{field}_env"):
        type("Leaky", (PluginOptions,), {"__annotations__": {field: str}, field: ""})


def test_no_option_may_be_of_a_secret_type():
    with pytest.raises(ConfigError, match="would hold a secret"):
        type("Leaky", (PluginOptions,), {"__annotations__": {"key": SecretStr | None}, "key": None})


def test_names_that_only_sound_secret_are_fine():
    names = ("sink_tokens", "key_bits", "max_token", "key_scale", "token")
    type("Fine", (PluginOptions,), {"__annotations__": dict.fromkeys(names, int), **dict.fromkeys(names, 0)})


def test_secret_is_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("JETTISON_TEST_KEY", "hush")
    secret = read_secret("JETTISON_TEST_KEY")
    assert secret.get_secret_value() == "hush"
    assert "hush" not in f"{secret!r} {secret}"
    monkeypatch.delenv("JETTISON_TEST_KEY")
    with pytest.raises(ConfigError, match="JETTISON_TEST_KEY is not set"):
        read_secret("JETTISON_TEST_KEY")


def test_hash_is_of_meaning_not_of_spelling():
    host = sample_host()
    left = host.parse({"rich": {"ratio": 0.5, "layers": []}}).rich
    assert options_sha256(left) == options_sha256(host.parse({"rich": {}}).rich)
    assert options_sha256(left) != options_sha256(host.parse({"rich": {"ratio": 0.25}}).rich)


def test_json_schema_of_the_tree():
    schema = sample_host().options_type.model_json_schema()
    assert set(schema["properties"]) == {"strict", "rich", "forced"}
    assert schema["additionalProperties"] is False
