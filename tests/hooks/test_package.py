"""The distribution: what lies in the folders is what is installed, under the names of the architecture."""

import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest

import jettison.hooks

ROOT = Path(jettison.hooks.__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text()) if (ROOT / "pyproject.toml").exists() else {}

pytestmark = pytest.mark.skipif(not PROJECT, reason="installed from a wheel: the source tree is not here")


def test_every_folder_is_a_listed_package():
    found = {
        "jettison." + ".".join(file.parent.relative_to(ROOT).parts)
        for room in ("hooks", "plugins", "csrc")
        for file in (ROOT / room).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


@pytest.mark.parametrize("room", ["hooks", "plugins", "csrc"])
def test_rooms_are_typed(room):
    assert (ROOT / room / "py.typed").is_file()


def test_data_files_are_listed():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    listed = {
        file
        for package, globs in patterns.items()
        for glob in globs
        for file in (ROOT / Path(*package.split(".")[1:])).glob(glob)
    }
    data = {
        file
        for room in ("hooks", "plugins", "csrc")
        for file in (ROOT / room).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc", ".so") and "__pycache__" not in file.parts
    }
    assert data - listed == set(), "these would be missing from a wheel"


def test_entry_points_resolve():
    for point in distribution("jettison").entry_points:
        assert point.load() is not None, point


@pytest.mark.parametrize("name", ["hooks", "plugins", "csrc"])
def test_folders_are_no_top_level_imports(name, tmp_path):
    program = f"import importlib.util as u; spec = u.find_spec({name!r}); print(spec and spec.origin)"
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert str(ROOT) not in answer.stdout, f"{name} is importable as {answer.stdout}"


def test_there_is_no_root_package():
    import jettison

    assert getattr(jettison, "__file__", None) is None, "jettison is a namespace: it must not have an __init__"
