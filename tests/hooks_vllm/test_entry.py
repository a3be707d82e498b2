"""T-3, the part that needs no engine: registration, foreign plugins, filters, and the worker's self-check."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from jettison.hooks import JettisonError
from jettison.hooks.vllm import compat, entry, worker
from jettison.hooks.vllm.engine import engine_for


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "_registration", entry._Registration())


@pytest.fixture
def slots() -> Any:
    registry = importlib.import_module("vllm.v1.attention.backends.registry")
    saved = dict(registry._ATTN_OVERRIDES)
    yield registry._ATTN_OVERRIDES
    registry._ATTN_OVERRIDES.clear()
    registry._ATTN_OVERRIDES.update(saved)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(JettisonError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_register_is_idempotent() -> None:
    for _ in range(3):
        entry.register()
    entry.require_registered()
    for slot, path in entry.slots().items():
        assert compat.AttentionBackendEnum[slot].get_path() == path
        assert compat.AttentionBackendEnum[slot].get_class().__name__ == path.rsplit(".", 1)[1]


def test_import_loads_no_engine_and_no_plugin() -> None:
    script = (
        "import sys, jettison.hooks.vllm.entry as e, json;"
        "print(json.dumps([n for n in ('torch', 'vllm', 'pluggy', 'jettison.hooks.host', 'jettison.plugins')"
        " if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == []


def test_a_foreign_backend_is_named(slots: Any, unregistered: None, caplog: pytest.LogCaptureFixture) -> None:
    slots[compat.AttentionBackendEnum.CPU_ATTN] = "foreign.pack.Backend"
    entry.register()
    assert "foreign.pack.Backend" in caplog.text
    assert "foreign.pack.Backend" in refusal(entry.require_registered)
    assert slots[compat.AttentionBackendEnum.CPU_ATTN] == "foreign.pack.Backend", "a foreign claim was overwritten"


def test_a_foreign_backend_that_comes_later_is_named(slots: Any, make_config: Callable[..., Any]) -> None:
    slots[compat.AttentionBackendEnum.CPU_ATTN] = "late.pack.Backend"
    assert "late.pack.Backend" in refusal(lambda: engine_for(make_config({"kvtest": {}})))
    assert engine_for(make_config()) is None, "an engine without our options is none of our business"


def test_another_version_leaves_vllm_alone(
    slots: Any, unregistered: None, monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., Any]
) -> None:
    slots.clear()
    monkeypatch.setattr(compat, "version", lambda: "0.33.0")
    entry.register()
    assert slots == {}
    assert "0.33.0" in refusal(entry.require_registered)
    assert "0.33.0" in refusal(lambda: engine_for(make_config({"kvtest": {}})))


def test_vllm_plugins_filter_is_named(unregistered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other, more")
    assert "VLLM_PLUGINS=other, more" in refusal(lambda: importlib.reload(worker))


def test_a_missing_entry_point_is_named(unregistered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(entry, "entry_points", lambda group: ())
    assert "no installed distribution" in refusal(lambda: importlib.reload(worker))


def test_a_swallowed_import_error_is_named(unregistered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    point = EntryPoint(entry.NAME, "jettison.hooks.vllm.entry:register", entry.GROUP)
    monkeypatch.setattr(entry, "entry_points", lambda group: (point,))
    assert "Failed to load plugin" in refusal(lambda: importlib.reload(worker))


def test_the_worker_extension_clashes_with_no_worker() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    names = {name for name in dir(worker.JettisonWorker) if not name.startswith("__")}
    assert names == {"jettison_status"}
    assert not any(hasattr(CPUWorker, name) for name in names)


def test_the_worker_extension_refuses_before_the_worker_is_built(make_config: Callable[..., Any]) -> None:
    class Worker:
        built = False

        def __init__(self, vllm_config: Any, rank: int) -> None:
            type(self).built = True

    extended = type("Worker", (Worker, worker.JettisonWorker), {})
    assert "unknown_plugin" in refusal(lambda: extended(vllm_config=make_config({"unknown_plugin": {}}), rank=0))
    assert not extended.built
    extended(vllm_config=make_config({"kvtest": {}}), rank=0)
    assert extended.built


def test_the_status_is_json(make_config: Callable[..., Any]) -> None:
    config = make_config({"kvtest": {"bits": 4}})
    built = worker.JettisonWorker.__new__(worker.JettisonWorker, vllm_config=config)
    built.rank = 3  # type: ignore[attr-defined]
    found = json.loads(json.dumps(built.jettison_status()))
    assert found["process"]["rank"] == 3
    assert found["engine"] == {"name": "vllm", "version": compat.version(), "device": "cpu"}
    assert {name: plugin["active"] for name, plugin in found["plugins"].items()} == {"kvtest": True, "poltest": False}
    assert found["faults"] == {}
