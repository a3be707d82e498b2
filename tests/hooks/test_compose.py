"""T-1: configurations through `flags` and back, and the rules by which flags are combined."""

import json
import random
import shlex
import subprocess
import sys
from collections import Counter

import pytest

from faults import mutate
from faults.plugins import sample_host
from jettison.hooks import ConfigError, InputRefused, JettisonError
from jettison.hooks.compose import MAX_ARGUMENT, MIDDLEWARE, POLICIES, WORKER, compose, read_back, runnable
from jettison.hooks.engine_args import EngineArgs

SEED = 1
CASES = 4000


def _random_section(rng):
    rich = {
        "layers": [rng.randrange(128) for _ in range(rng.randrange(6))],
        "rules": [{"name": _text(rng), "weight": rng.random()} for _ in range(rng.randrange(3))],
        "table": {_text(rng): [rng.randrange(-(2**40), 2**40)] for _ in range(rng.randrange(4))},
        "mode": rng.choice(("fast", "exact")),
        "ratio": rng.uniform(0.01, 0.99),
        "enabled": rng.random() < 0.5,
        "note": _text(rng) + "n" * rng.choice((0, 0, 0, 0, 0, 120_000)) + _text(rng),
        "api_key_env": rng.choice((None, "SOME_KEY")),
    }
    section = {"rich": {key: value for key, value in rich.items() if rng.random() < 0.6}}
    if rng.random() < 0.5:
        section["forced"] = {"token": rng.randrange(2**63)}
    return section


def _text(rng):
    alphabet = "abc .-'\"\\/{}[]:#&*!|>%@`=,\n\t\r\u00e9\u2028\U0001f600~0\x7f\x85"
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(9)))


def test_configurations_survive_flags(tmp_path):
    rng, host, counts = random.Random(SEED), sample_host(), Counter()
    for case in range(CASES):
        section, what = _random_section(rng), "valid"
        if case % 2:
            what, section = mutate.structural(section, rng)
        try:
            expected = host.parse(section)
        except JettisonError:
            expected = None
        where = f"seed {SEED}, case {case} ({what})"
        try:
            command = _composed(host, section, rng, tmp_path)
        except JettisonError:
            assert expected is None or what != "valid", where
            counts["refused"] += 1
            continue
        assert expected is not None, f"accepted although invalid: {where}"
        assert all(len(word) <= MAX_ARGUMENT for word in command.argv), where
        carried = read_back(shlex.split(shlex.join(command.argv)))
        assert host.parse(carried.get("jettison", {})) == expected or not expected.sections(), where
        counts["file" if command.config_file else "argument"] += 1
    assert counts["refused"] > CASES / 8, counts
    assert counts["file"] > CASES / 50, counts
    assert counts["argument"] > CASES / 4, counts


def _composed(host, section, rng, folder):
    """Give some plugins by --with and the others by --additional-config."""
    split = {name: rng.random() < 0.5 for name in section}
    by_with = [name for name, chosen in split.items() if chosen and isinstance(section[name], dict) and section[name]]
    rest = {name: content for name, content in section.items() if name not in by_with}
    selections = [f"{name}={json.dumps(section[name])}" for name in by_with]
    flags = ["--additional-config", json.dumps({"jettison": rest, "other": 1})] if rest else []
    return compose(host, selections, ["model", *flags], platform="cpu", folder=folder)


def test_vllm_reads_what_we_wrote(tmp_path):
    """The same through vLLM's own parser, in a child: argument and YAML file."""
    host = sample_host()
    notes = ["plain", 'it\'s "quoted" \\ \n\t \U0001f600 {x}: #', "1e5", "~", "y" * 150_000, "\u2028'" * 40_000]
    commands = [
        compose(
            host,
            [f"rich={json.dumps({'note': note})}", "forced"],
            ["m", "--port", "8001"],
            platform="cpu",
            folder=tmp_path,
        )
        for note in notes
    ]
    program = (
        "import json, sys; from vllm.utils.argparse_utils import FlexibleArgumentParser as P\n"
        "for line in sys.stdin:\n"
        "    p = P(); s = p.add_subparsers().add_parser('serve'); s.add_argument('model')\n"
        "    s.add_argument('--additional-config', type=json.loads); s.add_argument('--port')\n"
        "    s.add_argument('--worker-extension-cls'); s.add_argument('--logits-processors', nargs='+')\n"
        "    s.add_argument('--middleware', action='append')\n"
        "    print('OUT', json.dumps(vars(p.parse_args(json.loads(line)))))\n"
    )
    lines = "\n".join(json.dumps(command.argv[1:]) for command in commands)
    answer = subprocess.run([sys.executable, "-c", program], input=lines, capture_output=True, text=True, check=True)
    parsed = [json.loads(line[4:]) for line in answer.stdout.splitlines() if line.startswith("OUT ")]
    assert [found["additional_config"]["jettison"]["rich"]["note"] for found in parsed] == notes
    assert {(found["port"], found["worker_extension_cls"], *found["logits_processors"]) for found in parsed} == {
        ("8001", WORKER, POLICIES)
    }
    assert [command.config_file is not None for command in commands] == [False] * 4 + [True] * 2


def test_large_configuration_goes_to_a_private_file(tmp_path):
    note = "z" * (MAX_ARGUMENT + 1)
    selections = [f'rich={{"note": "{note}"}}']
    first, second = (compose(sample_host(), selections, ["m"], platform="cpu", folder=tmp_path) for _ in range(2))
    assert first == second, "the name depends on the content only"
    assert first.config_file.stat().st_mode & 0o777 == 0o600
    assert read_back(first.argv)["jettison"]["rich"]["note"] == note


def test_users_yaml_is_kept(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("port: 8001\nadditional-config: {other: {a: 1}, jettison: {forced: {token: 3}}}\n")
    small = compose(sample_host(), ["rich"], ["m", "--config", str(mine)], platform="cpu", folder=tmp_path)
    assert small.argv[2:5] == ("m", "--config", str(mine))
    expected = {"other": {"a": 1}, "jettison": {"rich": {}, "forced": {"token": 3}}}
    assert read_back(small.argv) == expected
    big = [f'rich={{"note": "{"z" * MAX_ARGUMENT}"}}']
    large = compose(sample_host(), big, ["m", f"--config={mine}"], platform="cpu", folder=tmp_path)
    assert EngineArgs.parse(large.argv[2:]).config["port"] == 8001
    assert read_back(large.argv)["other"] == {"a": 1}


def test_stock_command_is_passed_on_unchanged():
    words = ["m", "--port", "1", "--additional-config", '{"other": 1}', "-tp", "2"]
    assert compose(sample_host(), [], words).argv == ("vllm", "serve", *words)


def test_flags_follow_the_hooks_and_the_platform():
    def argv(selection, platform):
        return compose(sample_host(), [selection], ["m"], platform=platform).argv

    assert "CUSTOM" in argv("rich", "cuda")
    assert "CUSTOM" not in argv("rich", "cpu")
    assert "CUSTOM" not in argv("forced", "cuda")
    assert POLICIES in argv("forced", "cpu")
    assert POLICIES not in argv("rich", "cpu")
    assert WORKER in argv("rich", "cpu")


def test_graphs_are_vllms_own_default_on_every_platform():
    """Packed decode runs in full CUDA graphs, so nothing is taken away from vLLM's mode."""
    for platform in ("cuda", "cpu"):
        argv = compose(sample_host(), ["rich"], ["m"], platform=platform).argv
        assert not any("cudagraph" in word or "eager" in word for word in argv), platform


def test_only_servers_get_the_middleware_that_ends_open_requests():
    for selection in ("rich", "forced"):
        argv = compose(sample_host(), [selection], ["m", "--middleware", "a.B"], platform="cpu").argv
        assert [argv[i + 1] for i, word in enumerate(argv) if word == "--middleware"] == ["a.B", MIDDLEWARE]
        argv = compose(sample_host(), [selection], ["m"], platform="cpu", server=False).argv
        assert "--middleware" not in argv


def test_a_command_is_runnable_with_the_vllm_that_is_installed():
    words = ("vllm", "serve", "m", "--port", "1")
    assert runnable(words, "cuda") == words
    command = runnable(words, "cpu")
    assert command[-3:] == words[2:]
    assert read_back((*command, "--additional-config", '{"a": 1}')) == {"a": 1}


@pytest.mark.parametrize(
    "words",
    [
        ["--additional-config.jettison.rich.ratio", "0.25"],
        ["--additional_config.jettison.rich.ratio=0.25"],
        ["--additional-config", '{"jettison": {"rich": {"ratio": 0.25}}}'],
        ['--additional_config={"jettison": {"rich": {"ratio": 0.25}}}'],
        ["--additional-conf", '{"jettison": {"rich": {"ratio": 0.25}}}'],
    ],
)
def test_vllms_own_spellings_are_merged(words):
    command = compose(sample_host(), ["rich"], ["m", *words], platform="cpu")
    assert read_back(command.argv) == {"jettison": {"rich": {"ratio": 0.25}}}
    assert sum(word.startswith("--additional") for word in command.argv) == 1


def test_users_logits_processors_are_kept():
    words = ["m", "--logits-processors", "a:B", "c:D", "--port", "1"]
    argv = compose(sample_host(), ["forced"], words, platform="cpu").argv
    start = argv.index("--logits-processors")
    assert argv[start + 1 : start + 4] == ("a:B", "c:D", POLICIES)


@pytest.mark.parametrize(
    ("selections", "words", "sentence"),
    [
        (["ritch"], [], "did you mean 'rich'"),
        (["rich", "rich"], [], "--with rich is given twice"),
        (["rich={]"], [], "the value of --with cannot be used"),
        (["rich=[]"], [], "allowed are .json"),
        (["rich=missing.json"], [], "cannot read 'missing.json'"),
        (
            ['rich={"ratio": 0.5}'],
            ["--additional-config.jettison.rich.ratio", "0.25"],
            "jettison.rich.ratio is given twice",
        ),
        (["rich"], ["--additional-config", "{"], "--additional-config cannot be used"),
        (["rich"], ["--additional-config", "[]"], "--additional-config is a list"),
        (["rich"], ["--additional-config"], "--additional-config has no value"),
        (["rich"], ["--additional-config.jettison.rich.layers+", "1"], "give the whole list as JSON"),
        (["rich"], ["--additional-config", '{"jetison": {}}'], "write 'jettison'"),
        (["rich"], ["--worker-extension-cls", "a.B"], "--worker-extension-cls is a.B"),
        (["rich"], ["--attention-backend", "FLASH_ATTN"], "--attention-backend is FLASH_ATTN; allowed is CUSTOM"),
        (["rich"], ["--config", "a.yaml", "--config", "b.yaml"], "--config is given twice"),
        (["rich"], ["--config", "missing.yaml"], "cannot read 'missing.yaml'"),
        (["rich"], ["--api-key", "sk-1"], "export VLLM_API_KEY"),
        (["rich"], ["--api_key=sk-1"], "export VLLM_API_KEY"),
        (["rich"], ["--hf-token", "hf_1"], "export HF_TOKEN"),
    ],
)
def test_refused_combinations(selections, words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, InputRefused), match=sentence.replace("+", r"\+")) as caught:
        compose(sample_host(), selections, ["m", *words], platform="cuda", folder=tmp_path)
    assert "sk-1" not in str(caught.value)
    assert not list(tmp_path.iterdir())
