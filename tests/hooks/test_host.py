import logging

import pytest

from faults.plugins import ForcedPlugin, RichOptions, RichPlugin, host, install, sample_host
from jettison.hooks import (
    AttentionLayer,
    ConfigError,
    EnvironmentRefused,
    Host,
    JettisonError,
    KVFormat,
    Request,
    hookimpl,
)
from jettison.hooks.host import inspect_plugin

GROUP = "jettison.test_plugins"
LAYER = AttentionLayer(0, "model.layers.0", 8, 2, 64, None, 4)
GOOD = """
from jettison.hooks import PluginOptions, hookimpl
class Options(PluginOptions):
    size: int = 1
@hookimpl
def options():
    return Options
@hookimpl
def activate(options):
    return object()
"""
BROKEN = {
    "raises at import": "raise RuntimeError('no licence')",
    "missing dependency": "import a_module_that_does_not_exist",
    "syntax": "def",
    "exits at import": "raise SystemExit(0)",
    "bad signature": GOOD + "\n@hookimpl\ndef commands(cli, extra):\n    pass\n",
    "unknown hook": GOOD + "\n@hookimpl\ndef comands(cli):\n    pass\n",
    "engine hook on the module": GOOD + "\n@hookimpl\ndef kv_cache_format(layer):\n    return None\n",
    "options are no class of ours": GOOD.replace("PluginOptions, hookimpl", "hookimpl").replace("(PluginOptions)", ""),
    "options() raises": GOOD.replace("return Options", "raise KeyError('x')"),
    "no activate": GOOD.split("@hookimpl\ndef activate", maxsplit=1)[0],
    "secret option": GOOD.replace("size: int", "api_key: str"),
}


def _discover(tmp_path, monkeypatch, strict=False, **sources):
    for name, source in sources.items():
        install(tmp_path / name, f"dist-{name}", points=f"[{GROUP}]\n{name} = mod_{name}\n", **{f"mod_{name}": source})
        monkeypatch.syspath_prepend(tmp_path / name)
    return Host.discover(strict=strict, group=GROUP)


def test_our_own_plugins_are_found_as_a_strangers_are():
    info = Host.discover().plugins["kvtuner"]
    assert (info.distribution, info.error) == ("jettison", None)


def test_plugin_is_found_through_its_entry_point(tmp_path, monkeypatch):
    found = _discover(tmp_path, monkeypatch, good_one=GOOD)
    info = found.plugins["good_one"]
    assert (info.distribution, info.version, info.error) == ("dist-good_one", "1.0", None)
    assert found.parse({"good_one": {"size": 3}}).good_one.size == 3


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_plugin_is_isolated(fault, tmp_path, monkeypatch, caplog):
    name = "broken_" + "".join(c if c.isalpha() else "_" for c in fault)
    sources = {name: BROKEN[fault], f"{name}_good": GOOD}
    with caplog.at_level(logging.WARNING, "jettison"):
        found = _discover(tmp_path, monkeypatch, **sources)
    assert len(caplog.messages) == 1, f"{fault}: {caplog.messages}"
    assert repr(name) in caplog.messages[0]
    assert found.parse({f"{name}_good": {}}).sections().keys() == {f"{name}_good"}
    with pytest.raises(EnvironmentRefused, match=f"plugin '{name}' .* cannot be used"):
        found.parse({name: {}})
    with pytest.raises(EnvironmentRefused, match=name):
        found.parse({f"{name}_good": {}, "strict": True})
    with pytest.raises(EnvironmentRefused, match=name):
        Host.discover(strict=True, group=GROUP)


def test_warning_says_which_hook_was_meant(tmp_path, monkeypatch):
    found = _discover(tmp_path, monkeypatch, typo=BROKEN["unknown hook"], level=BROKEN["engine hook on the module"])
    assert "did you mean 'commands'?" in found.plugins["typo"].error
    assert "put 'kv_cache_format' on the object that activate() returns" in found.plugins["level"].error


def test_two_distributions_with_one_name(tmp_path, monkeypatch):
    for distribution in ("first", "second"):
        points = f"[{GROUP}]\ntwin = mod_{distribution}\n"
        install(tmp_path / distribution, distribution, points=points, **{f"mod_{distribution}": GOOD})
        monkeypatch.syspath_prepend(tmp_path / distribution)
    error = Host.discover(group=GROUP).plugins["twin"].error
    assert "claimed by mod_first of first 1.0 and mod_second of second 1.0" in error


def test_two_metadata_of_one_distribution_are_no_conflict(tmp_path, monkeypatch):
    for place in ("a", "b"):
        install(tmp_path / place, "copy", points=f"[{GROUP}]\ncopied = mod_copied\n", mod_copied=GOOD)
        monkeypatch.syspath_prepend(tmp_path / place)
    assert Host.discover(group=GROUP).plugins["copied"].error is None


@pytest.mark.parametrize("name", ["Upper", "with-dash", "strict", "model_dump", "1st", "", "a.b"])
def test_name_must_fit_the_options_tree(name):
    with pytest.raises(ConfigError, match="cannot be named"):
        inspect_plugin(name, RichPlugin())


def test_unknown_section_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no plugin named 'ritch' .*did you mean 'rich'\?"):
        sample_host().parse({"ritch": {}})


@pytest.mark.parametrize("strict", [1, "true", None])
def test_strict_is_a_boolean(strict):
    with pytest.raises(ConfigError, match="'strict'"):
        sample_host().parse({"strict": strict})


def test_nothing_is_active_without_a_section():
    active = sample_host().activate({})
    assert active.names == ()
    assert active.hook.kv_cache_format(layer=LAYER) is None
    assert active.report() == {}


def test_active_plugins_answer():
    active = sample_host().activate({"forced": {"token": 5}, "rich": {}})
    assert active.names == ("forced", "rich")
    assert active.hook.kv_cache_format(layer=LAYER) == KVFormat(8, 4)
    policy = active.hook.request_policy(request=Request(None, (1, 2), {}, 100))
    assert policy.next_tokens([]) == [5]
    assert active.implementers("kv_cache_format") == ("rich",)
    assert active.report() == {"rich": {"layers": 1}}
    assert isinstance(active.options.rich, RichOptions)


def test_order_is_alphabetical_whatever_the_section_says():
    class Second(RichPlugin):
        @hookimpl
        def activate(self, options):
            return _Answers(KVFormat(2, 2))

    found = host(b=RichPlugin(), a=Second())
    for section in ({"a": {}, "b": {}}, {"b": {}, "a": {}}):
        assert found.activate(section).hook.kv_cache_format(layer=LAYER) == KVFormat(2, 2)


class _Answers:
    def __init__(self, answer):
        self.answer = answer

    @hookimpl
    def kv_cache_format(self, layer):
        return self.answer


class _BadSignature:
    @hookimpl
    def kv_cache_format(self, layers):
        return None


class _PluginLevel:
    @hookimpl
    def options(self):
        return RichOptions


class _BadReport(_Answers):
    @hookimpl
    def report(self):
        raise RuntimeError("secret text of a request")


def _activating(answer):
    class Plugin(RichPlugin):
        @hookimpl
        def activate(self, options):
            if isinstance(answer, Exception):
                raise answer
            return answer

    return host(rich=Plugin())


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (None, "activate.. of plugin 'rich' returned None"),
        (RuntimeError("no GPU"), r"plugin 'rich' failed to activate \(RuntimeError: no GPU\)"),
        (ConfigError("table has 3 layers"), "table has 3 layers"),
        (_BadSignature(), "plugin 'rich' has a hook with a bad signature .*layers"),
        (_PluginLevel(), "unknown hook 'options'.*put 'options' on the plugin itself"),
    ],
)
def test_activation_fails_closed(answer, sentence):
    with pytest.raises(JettisonError, match=sentence):
        _activating(answer).activate({"rich": {}})


def test_failing_report_is_contained_and_tells_nothing():
    active = _activating(_BadReport(None)).activate({"rich": {}})
    assert active.report() == {"rich": {"error": "RuntimeError in report()"}}


def test_two_engines_in_one_process_do_not_mix():
    found = host(forced=ForcedPlugin())
    actives = [found.activate({"forced": {"token": token}}) for token in (1, 2)]
    request = Request(None, (), {}, 10)
    assert [active.hook.request_policy(request=request).next_tokens([]) for active in actives] == [[1], [2]]
