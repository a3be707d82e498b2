"""Real vLLM configurations without an engine, and plugins made of plain objects."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jettison.hooks import Host, KVFormat, PluginOptions, Request, hookimpl

pytest.importorskip("vllm", reason="the vLLM room needs vLLM")

from jettison.hooks.host import inspect_plugin
from jettison.hooks.vllm import engine, entry, kv_format
from jettison.hooks.vllm.refusals import POLICY_PROCESSOR
from policy_states import Script

entry.register()  # as vLLM does, before it imports anything else of ours

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
DEEPSEEK = LLAMA | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 2,
}


class Options(PluginOptions):
    bits: int = 8


def plugin(name: str, activate: Callable[[Options], object]) -> Any:
    module = types.SimpleNamespace(options=hookimpl(lambda: Options), activate=hookimpl(activate))
    return inspect_plugin(name, module)


def kv_plugin(options: Options) -> object:
    return types.SimpleNamespace(kv_cache_format=hookimpl(lambda layer: KVFormat(options.bits, options.bits)))


def policy_plugin(options: Options) -> object:
    return types.SimpleNamespace(request_policy=hookimpl(lambda request: None))


@pytest.fixture
def make_plugin() -> Callable[[str, Callable[[Options], object]], Any]:
    """The record of an installed plugin with this name and `activate`."""
    return plugin


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The room as in a vLLM process: registered, with two plugins installed."""
    entry.register()
    host = Host.of([plugin("kvtest", kv_plugin), plugin("poltest", policy_plugin)])
    monkeypatch.setattr(engine, "host", lambda: host)
    yield
    kv_format.pending.clear()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("configs")
    for name, content in (("llama", LLAMA), ("deepseek", DEEPSEEK)):
        (base / name).mkdir()
        (base / name / "config.json").write_text(json.dumps(content))
    return base


@pytest.fixture
def make_config(folder: Path) -> Callable[..., Any]:
    """Build a real VllmConfig; `section` is the `jettison` section."""
    from vllm.engine.arg_utils import EngineArgs

    def make(section: dict[str, Any] | None = None, model: str = "llama", **options: Any) -> Any:
        if section and "poltest" in section:
            options.setdefault("logits_processors", [POLICY_PROCESSOR])
        arguments = {"skip_tokenizer_init": True, "max_model_len": 256, "kv_cache_memory_bytes": 1 << 26, **options}
        extra = {} if section is None else {"jettison": section}
        return EngineArgs(model=str(folder / model), additional_config=extra, **arguments).create_engine_config()

    return make


@pytest.fixture
def policies(make_plugin: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Replace the installed plugins by one whose policies come from the request: {"table": {...}}."""
    requests: list[Request] = []

    def choose(request: Request) -> Any:
        requests.append(request)
        if request.params.get("fail"):
            raise RuntimeError("at admission")
        return request.params.get("policy") or (Script(request.params["table"]) if "table" in request.params else None)

    host = Host.of([make_plugin("poltest", lambda options: types.SimpleNamespace(request_policy=hookimpl(choose)))])
    monkeypatch.setattr(engine, "host", lambda: host)
    return requests
