"""A wheel gives the names of the source tree: `jettison.hooks`, `.plugins.*`, `.csrc`, typed, with entry points."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = """
import importlib, json, sys
from importlib.metadata import distribution
from importlib.resources import files
found = distribution("jettison")
modules = sys.argv[1:]
from jettison import csrc
csrc.load()
print(json.dumps({
    "modules": {name: importlib.import_module(name).__file__ for name in modules},
    "typed": [(files(f"jettison.{room}") / "py.typed").is_file() for room in ("hooks", "plugins", "csrc")],
    "points": {f"{p.group}: {p.name}": bool(p.load()) for p in found.entry_points},
    "isa": csrc.isa(),
}))
"""
PLUGINS = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/__init__.py"))
"""Every room of a system is a plugin."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the built wheel is installed."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    unwanted = shutil.ignore_patterns("*.so", "__pycache__")
    for room in ("hooks", "plugins", "csrc"):
        shutil.copytree(ROOT / room, source / room, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", wheels, source], check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    return wheel, target


@pytest.mark.slow
def test_wheel(installed, tmp_path):
    wheel, target = installed
    assert wheel.name.split("-", 2)[2].startswith("py3-none-"), "one wheel for every Python and torch"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    rooms = [f"jettison.plugins.{name}" for name in PLUGINS]
    command = [sys.executable, "-c", CHECK, "jettison.hooks", "jettison.hooks.vllm", "jettison.csrc", *rooms]
    answer = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(answer.stdout.splitlines()[-1])
    assert all(file.startswith(str(target)) for file in found["modules"].values()), found["modules"]
    assert found["typed"] == [True] * 3
    plugins = {f"jettison.plugins: {name}" for name in PLUGINS}
    assert found["points"].keys() == {"console_scripts: jettison", "vllm.general_plugins: jettison", *plugins}
    assert all(found["points"].values())
    there = {name.removeprefix("jettison/") for name in zipfile.ZipFile(wheel).namelist()}
    for room in ("hooks", "plugins"):
        paths = [path.relative_to(ROOT) for path in (ROOT / room).rglob("*") if path.is_file()]
        missing = {str(path) for path in paths if "__pycache__" not in path.parts} - there
        assert not missing, f"not in the wheel: {missing}"
    assert found["isa"] in ("portable", "avx2", "avx512")
