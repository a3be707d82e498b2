"""T-2: the version window, and every symbol of vLLM that we touch deleted or changed in turn."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest

from jettison.hooks import JettisonError
from jettison.hooks.vllm import compat

SYMBOLS = {symbol.target: symbol for symbol in compat.SYMBOLS}


def holder(symbol: compat.Symbol) -> tuple[Any, str]:
    module, path = symbol.target.split(":")
    owner: Any = import_module(module)
    *outer, last = path.split(".")
    for name in outer:
        owner = getattr(owner, name)
    return owner, last


def test_the_installed_vllm_keeps_the_contract() -> None:
    compat.check_symbols()
    compat.check_version()


@pytest.mark.parametrize(
    "found", ["0.31.1", "0.33.0", "0.24.0", "1.32.0", "0.3", "0", "garbage", "", "0.33.0rc1", "33.0"]
)
def test_other_versions_are_refused_in_one_sentence(found: str) -> None:
    with pytest.raises(JettisonError) as error:
        compat.check_version(found)
    text = str(error.value)
    assert (found or "not installed") in text
    assert ">=0.32,<0.33" in text
    assert "\n" not in text


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.32.1.dev3"])
def test_the_window_is_accepted(found: str) -> None:
    compat.check_version(found)


@pytest.mark.parametrize("target", SYMBOLS)
def test_a_missing_symbol_is_refused(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    symbol = SYMBOLS[target]
    owner, name = holder(symbol)
    inherited = any(hasattr(base, name) for base in getattr(owner, "__mro__", ())[1:])
    if inherited:  # deleting it would only uncover the base class's
        monkeypatch.setattr(owner, name, None)
    else:
        monkeypatch.delattr(owner, name)
    with pytest.raises(JettisonError) as error:
        compat.check_symbols((symbol,))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", SYMBOLS)
def test_a_changed_symbol_is_refused(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    symbol = SYMBOLS[target]
    owner, name = holder(symbol)
    if symbol.parameters is not None:

        def changed(renamed: Any, added: Any) -> None: ...

        replacement: Any = changed
    else:
        replacement = type(name, (), {})
    if inspect.isclass(owner):
        monkeypatch.setattr(owner, name, replacement)
    else:
        monkeypatch.setitem(vars(owner), name, replacement)
    with pytest.raises(JettisonError) as error:
        compat.check_symbols((symbol,))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_every_member_of_a_class_is_checked() -> None:
    for symbol in compat.SYMBOLS:
        for member in symbol.members:
            smaller = compat.Symbol(symbol.target, members=(f"{member}_gone",))
            with pytest.raises(JettisonError, match=f"{member}_gone"):
                compat.check_symbols((smaller,))


def test_no_other_file_of_the_room_reaches_into_vllm() -> None:
    from pathlib import Path

    room = Path(compat.__file__).parent
    inside = ("vllm.v1", "vllm.model_executor", "vllm.distributed", "vllm.config", "vllm.compilation")
    for file in room.glob("*.py"):
        if file.name != "compat.py":
            imports = [line.split()[1] for line in file.read_text().splitlines() if "import" in line.split()[:3:2]]
            reached = [name for name in imports if name.startswith(inside)]
            assert reached == [], f"{file.name} imports vLLM's own modules past compat.py: {reached}"
