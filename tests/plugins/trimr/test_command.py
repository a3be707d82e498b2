"""`jettison trimr proxy`: what it refuses, as one sentence and an exit code."""

import json
import socket

import pytest

from jettison.hooks.cli import main


def said_by(capsys, *words):
    code = main(["trimr", "proxy", "--upstream", "http://127.0.0.1:9", *words])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return code, said


def test_a_bad_upstream_is_refused(capsys):
    assert main(["trimr", "proxy", "--upstream", "localhost:8000"]) == 2
    assert "'localhost:8000' is not a URL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "code", "sentence"),
    [
        ({"M": 0}, 2, "option 'trimr.M' = 0 is refused"),
        ({"Verifier": {}}, 2, "did you mean 'verifier'?"),
        ({"verifier": {"mode": "endpoint"}}, 2, "'url' is needed"),
        ({"verifier": {"mode": "self", "api_key_env": "NO_SUCH_KEY"}}, 2, "NO_SUCH_KEY is not set"),
    ],
)
def test_bad_options_are_refused(tmp_path, capsys, content, code, sentence):
    file = tmp_path / "o.json"
    file.write_text(json.dumps(content))
    found, said = said_by(capsys, "--options", str(file), "--port", "0")
    assert (found, sentence in said) == (code, True), said


def test_missing_files_and_folders_are_refused(tmp_path, capsys):
    assert said_by(capsys, "--options", str(tmp_path / "absent.json"))[0] == 4
    code, said = said_by(capsys, "--log", str(tmp_path / "no" / "log.jsonl"))
    assert code == 4
    assert "cannot write" in said
    assert said_by(capsys, "--think-end", "")[0] == 2


def test_a_port_in_use_is_refused(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, said = said_by(capsys, "--port", str(taken.getsockname()[1]))
    assert code == 3
    assert "choose another --port" in said
