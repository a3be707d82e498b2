"""T-7, import part: what an installed but unused Jettison costs."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "vllm", "transformers", "pydantic", "pluggy", "click", "rich", "yaml")


def _run(program: str) -> dict:
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


def test_import_is_free():
    program = (
        "import json, sys, time; start = time.perf_counter(); import jettison.hooks; "
        "print(json.dumps({'s': time.perf_counter() - start, 'modules': sorted(sys.modules)}))"
    )
    runs = [_run(program) for _ in range(3)]
    assert not [name for name in HEAVY if name in runs[0]["modules"]]
    assert min(run["s"] for run in runs) < 0.05, f"import jettison.hooks took {[run['s'] for run in runs]} s"


def test_every_public_name_resolves():
    import jettison.hooks

    assert all(getattr(jettison.hooks, name) is not None for name in jettison.hooks.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = jettison.hooks.nonsense


@pytest.mark.parametrize("words", [["--help"], ["flags", "model", "--with", "kvtuner=k8v4", "--platform", "cpu"]])
def test_command_line_imports_no_engine(words):
    program = (
        "import json, sys; from jettison.hooks.cli import main; code = main(sys.argv[1:]); print(); "
        "heavy = [m for m in ('torch', 'vllm', 'numpy') if m in sys.modules]; "
        "print(json.dumps({'code': code, 'heavy': heavy}))"
    )
    command = [sys.executable, "-c", program, *words]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout.splitlines()[-1]) == {"code": 0, "heavy": []}, answer.stderr
