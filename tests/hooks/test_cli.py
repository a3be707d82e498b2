"""The command line as its users see it: exit codes, stdout for results, stderr for notes, JSON on request."""

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from faults.plugins import install
from jettison.hooks.cli import BUILT_IN, main
from jettison.hooks.compose import runnable
from jettison.hooks.results import Results

COMMAND = """
import click
from jettison.hooks import hookimpl
@hookimpl
def commands(cli):
    {body}
"""


def _json(capsys):
    return json.loads(capsys.readouterr().out)


def test_flags_prints_a_command_for_the_shell(capsys):
    assert main(["flags", "a model", "--port", "80", "--with", "kvtuner=k8v4", "--platform", "cpu"]) == 0
    words = shlex.split(capsys.readouterr().out)
    program = runnable(("vllm", "serve"), "cpu")
    assert words[: len(program) + 3] == [*program, "a model", "--port", "80"]
    assert json.loads(words[-1]) == {"jettison": {"kvtuner": {"pair": "k8v4"}}}


def test_flags_as_json(capsys):
    assert main(["flags", "m", "--with", "kvtuner=k8v4", "--platform", "cuda", "--json"]) == 0
    found = _json(capsys)
    assert found["active"] == ["kvtuner"]
    assert found["config_file"] is None
    assert found["argv"][2:5] == ["m", "--attention-backend", "CUSTOM"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 2),
        (["nonsense"], 2),
        (["flags"], 2),
        (["flags", "m", "--with", "kvtunr"], 2),
        (["flags", "m", "--with", "kvtuner=missing.json"], 4),
        (["flags", "m", "--platform", "tpu"], 2),
        (["bench", "report"], 2),
        (["bench", "report", "missing.json"], 4),
        (["plugins", "--schema", "nobody"], 2),
        (["plugins"], 0),
        (["--version"], 0),
        (["--help"], 0),
    ],
)
def test_exit_codes(words, code, capsys):
    assert main(words) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if code:
        assert captured.err


@pytest.mark.parametrize(("words", "code"), [(["flags", "m", "--with", "x"], 2), (["bench", "report", "x.json"], 4)])
def test_refusals_as_json(words, code, capsys):
    assert main([*words, "--json"]) == code
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert error["exit_code"] == code
    assert captured.err == f"jettison: {error['message']}\n"


def test_interruption_is_130(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("jettison.hooks.cli_plugins.Host.discover", interrupted)
    assert main(["plugins"]) == 130


def test_every_built_in_command_has_help(capsys):
    for name in BUILT_IN:
        assert main([name, "--help"]) == 0
        assert f"Usage: jettison {name}" in capsys.readouterr().out


def test_plugins_lists_and_shows_schema(capsys):
    assert main(["plugins", "--json"]) == 0
    assert {plugin["name"]: plugin["error"] for plugin in _json(capsys)}["kvtuner"] is None
    assert main(["plugins", "--schema", "kvtuner"]) == 0
    assert _json(capsys)["additionalProperties"] is False


def test_bench_report(tmp_path, capsys):
    results = Results.start(command="bench_x", device="cpu")
    results.add("16x4096", "jettison", "[bold]ratio", 1.5, "ratio")
    file = str(results.write(tmp_path / "r.json"))
    assert main(["bench", "report", file, "--json"]) == 0
    assert _json(capsys)[file]["rows"][0]["value"] == 1.5
    assert main(["bench", "report", file]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("16x4096", "[bold]ratio", "1.5", "bench_x"))


def _run(folder, *words):
    """Run the command in a process that sees the distributions in `folder` as installed."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    program = [sys.executable, "-c", "import sys; from jettison.hooks.cli import main; sys.exit(main())", *words]
    return subprocess.run(program, capture_output=True, text=True, env=environment, check=False)


def test_plugins_add_commands(tmp_path):
    body = "cli.add_command(click.Command('hello_test', callback=lambda: click.echo('hi')))"
    install(tmp_path, "p1", points="[jettison.plugins]\ncmd_a = mod_a\n", mod_a=COMMAND.format(body=body))
    body = "cli.add_command(click.Command('serve', callback=lambda: None))"
    install(tmp_path, "p2", points="[jettison.plugins]\ncmd_b = mod_b\n", mod_b=COMMAND.format(body=body))
    body = "raise RuntimeError('broken')"
    install(tmp_path, "p3", points="[jettison.plugins]\ncmd_c = mod_c\n", mod_c=COMMAND.format(body=body))
    answer = _run(tmp_path, "hello_test")
    assert (answer.returncode, answer.stdout) == (0, "hi\n"), answer.stderr
    assert "Plugin 'cmd_b' cannot add the command 'serve'" in answer.stderr
    assert "Plugin 'cmd_c' adds no commands: RuntimeError: broken" in answer.stderr


def test_serve_becomes_the_engine(tmp_path):
    """`serve` replaces itself by the `vllm` beside the interpreter: here one that shows its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    script = folder / "vllm"
    script.write_text('#!/bin/sh\necho "$#" "$@"\nexit 7\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    program = (
        "import sys; from pathlib import Path; sys.executable = sys.argv.pop(1); "
        "from jettison.hooks.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["serve", "m", "--with", "kvtuner=k8v4", "--port", "80", "--platform", "cuda"]
    command = [sys.executable, "-c", program, str(folder / "python"), *words]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 7, answer.stderr
    assert answer.stdout.startswith("12 serve m --port 80 --attention-backend CUSTOM ")
    assert "jettison: kvtuner on" in answer.stderr


def test_serve_refuses_where_vllm_would_leave_us_out(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert main(["serve", "m", "--with", "kvtuner=k8v4", "--platform", "cpu"]) == 3
    assert "VLLM_PLUGINS=other filters jettison out; add jettison to it" in capsys.readouterr().err


def test_the_installed_script_is_this_command():
    script = Path(sys.executable).with_name("jettison")
    answer = subprocess.run([script, "plugins", "--json"], capture_output=True, text=True, check=True)
    assert "kvtuner" in [plugin["name"] for plugin in json.loads(answer.stdout)]
