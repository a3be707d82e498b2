"""What is in force is told, and nothing that is private (T-6)."""

import json
import logging
import threading

import pytest
from click.testing import CliRunner

from faults.canary import canaries, leaks
from faults.plugins import host, install, sample_host
from jettison.hooks import ConfigError, PluginOptions, hookimpl
from jettison.hooks.cli import main
from jettison.hooks.compose import compose
from jettison.hooks.config import SecretEnv, read_secret
from jettison.hooks.status import Status


def test_status_of_an_idle_process():
    found = Status()()
    assert found["plugins"] == {}
    assert found["layers"] == []
    assert found["engine"] is None
    assert found["process"]["pid"] > 0


def test_status_says_what_is_in_force():
    status, plugins = Status(), sample_host()
    status.engine("vllm", "0.32.0", device="cpu")
    status.activated(plugins, plugins.activate({"rich": {}}))
    status.layers([{"name": "a", "key_bits": 8}])
    status.fact("blocks", 7)
    found = json.loads(json.dumps(status()))
    assert found["engine"] == {"name": "vllm", "version": "0.32.0", "device": "cpu"}
    assert {name: plugin["active"] for name, plugin in found["plugins"].items()} == {"forced": False, "rich": True}
    assert found["plugins"]["rich"]["report"] == {"layers": 1}
    assert len(found["plugins"]["rich"]["options_sha256"]) == 64
    assert found["plugins"]["forced"]["options_sha256"] is None
    assert (found["layers"], found["blocks"]) == ([{"name": "a", "key_bits": 8}], 7)
    status.reset()
    assert status()["plugins"] == {}


def test_faults_are_counted_and_logged_once(caplog):
    status = Status()
    threads = [
        threading.Thread(target=lambda: [status.fault("p", "policy failed", ValueError("quoted")) for _ in range(200)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert status()["faults"] == {"p: policy failed": 800}
    assert caplog.messages == ["Plugin 'p': policy failed (ValueError); further ones are counted in the status only."]


class _Options(PluginOptions):
    api_key_env: SecretEnv
    note: str = ""


class _Plugin:
    @hookimpl
    def options(self):
        return _Options

    @hookimpl
    def activate(self, options):
        secret = read_secret(options.api_key_env)
        logging.getLogger("jettison").debug("activated with %s and %r", secret, self)
        return _Active(secret)


class _Active:
    def __init__(self, secret):
        self.secret = secret

    @hookimpl
    def report(self):
        return {"secret": str(self.secret)}


def test_secrets_stay_in_the_environment(monkeypatch, tmp_path, caplog):
    """Secrets in the environment and in every wrong place: none shows in flags, status, logs, files or refusals."""
    words = canaries(200)
    plugins, outputs = host(keyed=_Plugin()), {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.DEBUG):
        for index, word in enumerate(words):
            monkeypatch.setenv("KEYED_SECRET", word)
            status = Status()
            active = plugins.activate({"keyed": {"api_key_env": "KEYED_SECRET"}})
            status.activated(plugins, active)
            status.fault("keyed", "failed", ValueError(word))
            given = ['keyed={"api_key_env": "KEYED_SECRET"}']
            outputs[f"flags {index}"] = " ".join(compose(plugins, given, ["m"], platform="cpu").argv)
            outputs[f"status {index}"] = json.dumps(status()) + repr(active.options) + repr(active.report())
            outputs |= {f"refusal {index} {n}": text for n, text in enumerate(_refusals(plugins, word))}
    outputs["log"] = caplog.text
    assert not leaks(words, outputs, [tmp_path])


def _refusals(plugins, word):
    wrong = (
        {"api_key_env": word},
        {"api_key_env": "X", "api_key": word},
        {"api_key_env": "X", "verifier": {"key": word}},
        {"api_key_env": [word]},
        {"api_key_env": "X", "note": {"nested": word}},
        word,
        [word],
    )
    for content in wrong:
        with pytest.raises(ConfigError) as caught:
            plugins.parse({"keyed": content})
        yield str(caught.value)


def test_secret_given_to_the_command_is_not_repeated(capsys):
    word = canaries(1)[0]
    for words in (["flags", "m", "--api-key", word], ["flags", "m", f"--hf-token={word}"]):
        assert main([*words, "--json"]) == 2
        captured = capsys.readouterr()
        assert not leaks([word], {"out": captured.out, "err": captured.err})


def test_plugin_that_prints_its_import_error_stays_on_one_line(tmp_path, monkeypatch):
    points = "[jettison.plugins]\nnoisy_test = mod_noisy\n"
    install(tmp_path, "noisy", points=points, mod_noisy="raise RuntimeError('first\\nsecond')")
    monkeypatch.syspath_prepend(tmp_path)
    answer = CliRunner().invoke(__import__("jettison.hooks.cli", fromlist=["cli"]).cli, ["plugins", "--json"])
    found = {plugin["name"]: plugin["error"] for plugin in json.loads(answer.stdout)}
    assert found["noisy_test"] == "RuntimeError: first second"
