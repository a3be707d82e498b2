"""`jettison kvtuner check` and `drift` as their users run them, on a tiny checkpoint with its own tokenizer."""

import json
import random

import pytest
import torch

import tiny_models
from jettison.hooks.cli import main
from jettison.plugins.kvtuner import command_measure, sensitivity


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_models.llama(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def fragile(model, tmp_path_factory):
    """`model` with queries a hundred times as large: attention hangs on differences that 4 bits do not keep."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "fragile"
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for layer in loaded.model.layers:
            layer.self_attn.q_proj.weight.mul_(100)
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of 900 words of two vocabularies, and one that is too short."""
    folder = tmp_path_factory.mktemp("texts")
    for name, words, count in (("a", range(100), 900), ("b", range(100, 250), 900), ("short", range(10), 100)):
        source = random.Random(name)
        (folder / f"{name}.txt").write_text(" ".join(f"w{source.choice(words)}" for _ in range(count)))
    return {path.stem: str(path) for path in folder.iterdir()}


def run(capsys, *words):
    code = main(["kvtuner", *words])
    return code, capsys.readouterr()


def test_check_says_what_a_model_bears(model, files, tmp_path, capsys):
    output = tmp_path / "check.json"
    code, said = run(capsys, "check", model, "--text", files["a"], "--length", "128", "-o", str(output), "--json")
    assert code == 0, said.err
    content = json.loads(said.out)
    assert content == json.loads(output.read_text())
    assert content["model"] == "tiny"
    assert content["tokens"] == 128, "the half that the sensitivities did not see"
    assert len(content["losses"]["k4"]) == tiny_models.LAYERS
    assert content["sentence"].startswith("tiny ")
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check.json", "check.png"], "nothing else is left"
    again = tmp_path / "again.json"
    assert run(capsys, "check", model, "--text", files["a"], "--length", "128", "-o", str(again))[0] == 0
    assert json.loads(again.read_text()) == content, "the same seed, the same verdict"


def test_check_prints_a_table_and_its_advice(model, files, capsys):
    code, said = run(capsys, "check", model, "--text", files["a"], "--length", "64")
    assert code == 0, said.err
    for words in ("k4v4", "top-1 agreement", "uniform 4-bit keys and values", "kvtuner"):
        assert words in said.out, said.out


def test_check_is_a_gate(model, fragile, files, capsys):
    """With --require the code is that of the pair's level; what is printed as JSON is the same with and without."""
    for folder, pair, code in ((model, "k4v4", 0), (fragile, "k4v4", 1)):
        words = ("check", folder, "--text", files["a"], "--length", "64", "--json")
        plain, (found, said) = run(capsys, *words), run(capsys, *words, "--require", pair)
        content = json.loads(said.out)
        levels = {(own["pair"], own["codec"]): own["level"] for own in content["runs"]}
        assert (plain[0], plain[1].out) == (0, said.out), folder
        assert (found, levels[pair, "measured"] == "bears") == (code, code == 0), (folder, pair, levels, said.err)
        assert ("required is less than 1.05" in said.err) == (code == 1), (folder, said.err)
    assert run(capsys, "check", model, "--require", "k2v2")[0] == 2


def test_every_pair_that_check_runs_can_be_required():
    from jettison.plugins.kvtuner.detector import UNIFORM

    assert tuple(f"k{key}v{value}" for key, value in UNIFORM) == command_measure.REQUIRABLE


def test_drift_compares_two_domains(model, files, tmp_path, capsys):
    output = tmp_path / "drift.json"
    words = ("drift", model, "--first", files["a"], "--second", files["b"], "--length", "128", "--bits", "5")
    code, said = run(capsys, *words, "-o", str(output))
    assert code == 0, said.err
    content = json.loads(output.read_text())
    assert content["domains"] == ["first", "second"]
    assert content["real_bits"] <= 5
    assert len(content["rankings"]) == 18
    assert len(content["transfers"]) == 8
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert content["recommendation"] in said.out.replace("\n", " ")


def test_a_killed_drift_goes_on_where_it_was(model, files, tmp_path, capsys, monkeypatch):
    """Killed after two of four measurements: they are kept, not made again, and the result is that of a whole run."""
    words = ["drift", model, "--first", files["a"], "--second", files["b"], "--length", "64", "--bits", "5"]
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    assert run(capsys, *words, "-o", str(whole))[0] == 0
    from jettison.plugins.kvtuner import remember

    made = []

    def counted(*args, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(sensitivity.measure(*args, **options))
        return made[-1]

    monkeypatch.setattr(remember, "measure", counted)
    try:
        code = main(["kvtuner", *words, "-o", str(killed)])
    except KeyboardInterrupt:
        code = 130
    assert code != 0
    assert not killed.exists()
    assert len(list((tmp_path / "killed.parts").iterdir())) == 2
    made.clear()
    assert run(capsys, *words, "-o", str(killed))[0] == 0
    assert len(made) == 2
    assert killed.read_text() == whole.read_text()
    assert not (tmp_path / "killed.parts").exists()


def test_drift_runs_a_given_table(model, files, tmp_path, capsys):
    table = tmp_path / "t.json"
    made = ("sensitivity", model, "-o", str(table), "--text", files["a"], "--length", "128", "--ratio", "2.5")
    assert run(capsys, *made)[0] == 0
    words = ("drift", model, "--first", files["a"], "--second", files["b"], "--length", "64", "--table", str(table))
    code, said = run(capsys, *words, "--json")
    assert code == 0, said.err
    content = json.loads(said.out)
    assert [(run["table"], run["domain"]) for run in content["transfers"]] == [("t", "first"), ("t", "second")]
    assert content["penalty"] is None


def test_bad_input_is_one_sentence(model, files, tmp_path, capsys):
    other = str(tiny_models.gemma2(tmp_path / "other"))
    table = tmp_path / "t.json"
    assert run(capsys, "sensitivity", other, "-o", str(table), "--text", files["a"], "--ratio", "2")[0] == 0
    domains = ("--first", files["a"], "--second", files["b"], "--length", "64")
    cases = {
        ("check", model, "--text", files["short"]): "short.txt has 100 tokens; at least 128 are needed",
        ("check", str(tmp_path / "absent")): "does not open as a causal LM",
        ("drift", model, "--first", files["a"]): "one domain is given; allowed are both --first and --second, or none",
        ("drift", model, *domains, "--bits", "1"): "1 real bits are too few",
        (
            "drift",
            model,
            *domains,
            "--table",
            str(table),
        ): "is for 4 layers, 1 KV heads and head size 32, but the model has 4",
        ("check", model, "--text", files["a"], "-o", str(tmp_path / "no" / "a.json")): "cannot write",
    }
    for words, sentence in cases.items():
        code, said = run(capsys, *words)
        assert code in (2, 4), words
        assert sentence in said.err, (words, said.err)
        assert "Traceback" not in said.err, words
    assert not (tmp_path / "no").exists(), "nothing half-written"
