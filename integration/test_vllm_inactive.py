"""T-7: installed but not asked for, Jettison is not there; and a section that asks for nothing packs nothing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from vllm_engines import generate, install_probe, layers_of, num_blocks, running, status_of

PROMPTS = [[(i * 11 + j * 17) % 250 for i in range(20 + 25 * j)] for j in range(8)]
TOKENS = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny_models

    install_probe(tmp_path_factory.mktemp("probe"))
    return tiny_models.llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def without_jettison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM as if the entry point had never run."""
    from jettison.hooks.vllm import entry

    registry = importlib.import_module("vllm.v1.attention.backends.registry")
    selector = importlib.import_module("vllm.v1.attention.selector")
    importlib.import_module("vllm.plugins").load_general_plugins()
    saved = dict(registry._ATTN_OVERRIDES)
    registry._ATTN_OVERRIDES.clear()
    selector._cached_get_attn_backend.cache_clear()
    yield entry
    registry._ATTN_OVERRIDES.update(saved)
    selector._cached_get_attn_backend.cache_clear()


def observe(model: Path, section: Any = None, **options: Any) -> dict[str, Any]:
    with running(model, section, **options) as llm:
        layers = [layer for name, layer in layers_of(llm).items() if "attn" in name]
        return {
            "answers": generate(llm, PROMPTS, tokens=TOKENS, logprobs=None),
            "implementations": {type(layer.impl).__qualname__ for layer in layers},
            "specs": {name: str(s) for name, s in llm.collective_rpc("get_kv_cache_spec")[0].items()},
            "blocks": num_blocks(llm),
            "compile_key": llm.llm_engine.vllm_config.compute_hash(),
        }


def test_without_a_section_everything_is_stock(model: Path, request: pytest.FixtureRequest) -> None:
    inactive = observe(model)
    request.getfixturevalue("without_jettison")
    stock = observe(model, worker_extension_cls="")
    assert stock["implementations"] == {"CPUAttentionBackendImpl"}
    for what, value in stock.items():
        assert inactive[what] == value, f"{what} differs"


@pytest.mark.parametrize("section", [{}, {"strict": False}, {"probe": {}}, {"probe": {"kv": [None]}}], ids=str)
def test_a_section_without_any_format_keeps_the_stock_cache(model: Path, section: dict[str, Any]) -> None:
    with running(model, section) as llm:
        layers = [layer for name, layer in layers_of(llm).items() if "attn" in name]
        assert {type(layer.impl).__qualname__ for layer in layers} == {"CPUAttentionBackendImpl"}
        assert {str(layer.kv_cache.dtype) for layer in layers} == {"torch.float32"}
        assert status_of(llm)["layers"] == []
        assert len(generate(llm, PROMPTS[:2], tokens=4)[0].tokens) == 4


def test_a_plugin_that_fails_on_a_layer_is_named(model: Path) -> None:
    from jettison.hooks import JettisonError

    with pytest.raises(JettisonError, match=r"probe failed on layer model.layers.2"):  # noqa: SIM117
        with running(model, {"probe": {"kv": [[8, 8]], "fail_on_layer": 2}}):
            pass


def test_a_refused_engine_leaves_the_process_usable(model: Path) -> None:
    from jettison.hooks import JettisonError

    with (
        pytest.raises(JettisonError, match="--kv-cache-dtype"),
        running(model, {"probe": {"kv": [[8, 8]]}}, kv_cache_dtype="fp8"),
    ):
        pass
    with running(model) as llm:
        assert len(generate(llm, PROMPTS[:1], tokens=4)[0].tokens) == 4
