"""T-13: the plugin by a stranger, built and installed as a wheel and as an editable tree, acts in vLLM."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_engines
from vllm_engines import HERE, generate, running, status_of

MODULE = "jettison_edges"
BUILD = "from setuptools import build_meta; print(build_meta.build_{kind}({folder!r}))"


def install(kind: str, source: Path, folder: Path) -> Path:
    """Build a `wheel` or an `editable` wheel of `source` and install it into a folder of its own."""
    wheels, target = folder / "wheels", folder / "site"
    wheels.mkdir()
    build = [sys.executable, "-c", BUILD.format(kind=kind, folder=str(wheels))]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = wheels.glob("*.whl")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(pip, check=True, capture_output=True, timeout=120)
    return target


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny_models

    return tiny_models.llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HERE / "example_plugin", tmp_path / "source"))


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    path, hooks = list(sys.path), list(sys.meta_path)
    yield
    sys.path[:], sys.meta_path[:] = path, hooks
    forget()


def use(target: Path) -> None:
    forget()
    site.addsitedir(str(target))


def forget() -> None:
    for name in [name for name in sys.modules if MODULE in name]:  # the finder of an editable tree too
        del sys.modules[name]
    vllm_engines.forget_host()


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_it_acts_in_vllm(kind: str, source: Path, tmp_path: Path, model: Path) -> None:
    use(install(kind, source, tmp_path))
    with running(model, {"edges": {"middle_bits": 2}}) as llm:
        found = status_of(llm)
        answers = generate(llm, tokens=4)
    module = Path(str(sys.modules[MODULE].__file__))
    assert module.is_relative_to(source if kind == "editable" else tmp_path / "site"), "another copy was imported"
    assert [layer["key_bits"] for layer in found["layers"]] == [8, 2, 2, 8]
    assert found["plugins"]["edges"] | {"options_sha256": None} == {
        "active": True, "version": "1.0", "error": None, "options_sha256": None, "report": None,
    }  # fmt: skip
    assert all(len(answer.tokens) == 4 for answer in answers)


def test_a_broken_hook_signature_is_refused(source: Path, tmp_path: Path, model: Path) -> None:
    from jettison.hooks import JettisonError

    use(install("editable", source, tmp_path))
    module = source / f"{MODULE}.py"
    module.write_text(
        module.read_text().replace("def kv_cache_format(self, layer:", "def kv_cache_format(self, layers:")
    )
    with pytest.raises(JettisonError, match="'edges' has a hook with a bad signature"), running(model, {"edges": {}}):
        pass


def test_an_unknown_option_is_refused(source: Path, tmp_path: Path, model: Path) -> None:
    from jettison.hooks import JettisonError

    use(install("wheel", source, tmp_path))
    with pytest.raises(JettisonError, match="middle_bits"), running(model, {"edges": {"midle_bits": 2}}):
        pass
