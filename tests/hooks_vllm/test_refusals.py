"""Each thing that we do not support is refused with its one sentence, on real vLLM configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from jettison.hooks import JettisonError
from jettison.hooks.vllm import compat, refusals
from jettison.hooks.vllm.engine import engine_for

KV = {"kvtest": {}}


def refused(config: Any) -> str:
    with pytest.raises(JettisonError) as error:
        engine_for(config)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_plain_model_is_accepted_once(make_config: Callable[..., Any]) -> None:
    config = make_config(KV)
    engine = engine_for(config)
    assert engine is not None
    assert engine.packs_kv
    assert not engine.has_policies
    assert engine_for(config) is engine


def test_no_section_is_no_engine(make_config: Callable[..., Any]) -> None:
    assert engine_for(make_config()) is None


def test_a_misspelt_section_is_refused(make_config: Callable[..., Any]) -> None:
    config = make_config()
    config.additional_config["jetison"] = {}
    assert "'jettison'" in refused(config)


def test_an_unknown_plugin_is_refused(make_config: Callable[..., Any]) -> None:
    assert "kvtset" in refused(make_config({"kvtset": {}}))


def test_mla(make_config: Callable[..., Any]) -> None:
    assert "MLA" in refused(make_config(KV, "deepseek"))


def test_fp8_cache(make_config: Callable[..., Any]) -> None:
    config = make_config(KV)
    config.cache_config.cache_dtype = "fp8"
    assert "'fp8'" in refused(config)


def test_kv_transfer(make_config: Callable[..., Any]) -> None:
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    assert "--kv-transfer-config" in refused(make_config(KV, kv_transfer_config=transfer))


def test_speculation(make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def speculating(tokens: int, section: dict[str, Any], **more: Any) -> Any:
        speculation = {"method": "ngram", "num_speculative_tokens": tokens, "prompt_lookup_max": 2}
        return make_config(section, speculative_config=speculation, **more)

    assert "--speculative-config" in refused(speculating(2, {"poltest": {}}))
    assert engine_for(speculating(40, KV)) is not None, "the CPU kernel takes any number of queries"
    monkeypatch.setattr(refusals, "_is_cpu", lambda: False)
    slot = {"attention_backend": "CUSTOM"}
    assert engine_for(speculating(63, KV, **slot)) is not None
    assert "verifies 65 tokens" in refused(speculating(64, KV, **slot))


@pytest.mark.parametrize(
    ("place", "name", "value", "word"),
    [
        ("parallel_config", "decode_context_parallel_size", 2, "context parallelism"),
        ("parallel_config", "prefill_context_parallel_size", 2, "context parallelism"),
        ("parallel_config", "pipeline_parallel_size", 2, "pipeline"),
        ("cache_config", "kv_sharing_fast_prefill", True, "sharing"),
        ("attention_config", "use_non_causal", True, "non_causal"),
    ],
)
def test_settings(make_config: Callable[..., Any], place: str, name: str, value: Any, word: str) -> None:
    config = make_config(KV)
    setattr(getattr(config, place), name, value)
    assert word in refused(config)


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("is_encoder_decoder", True, "encoder-decoder"),
        ("is_attention_free", True, "no attention"),
        ("is_mm_prefix_lm", True, "image tokens"),
        ("rswa_window", 8, "reference sliding-window"),
        ("use_mla", True, "MLA"),
    ],
)
def test_models(
    make_config: Callable[..., Any], name: str, value: Any, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(KV)
    monkeypatch.setattr(type(config.model_config), name, property(lambda self: value))
    assert word in refused(config)


def test_a_policy_without_its_processor(make_config: Callable[..., Any]) -> None:
    assert "--logits-processors" in refused(make_config({"poltest": {}}, logits_processors=["other:Thing"]))
    assert engine_for(make_config({"poltest": {}})) is not None


@pytest.mark.parametrize("mode", ["NONE", "PIECEWISE", "FULL", "FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
def test_cuda_needs_its_slot_and_takes_every_graph_mode(
    make_config: Callable[..., Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(KV)
    monkeypatch.setattr(refusals, "_is_cpu", lambda: False)
    assert "--attention-backend CUSTOM" in refused(config)
    config.attention_config.backend = compat.AttentionBackendEnum.CUSTOM
    config.compilation_config.cudagraph_mode = compat.CUDAGraphMode[mode]
    assert engine_for(config) is not None


@pytest.mark.parametrize(("capability", "wrong"), [((9, 0), False), ((8, 0), True), ((10, 0), True), (None, False)])
def test_the_kernels_are_for_hopper(
    make_config: Callable[..., Any], capability: tuple[int, int] | None, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "_capability", lambda: capability)
    if wrong:
        assert "compute capability {}.{}".format(*capability or ()) in refused(make_config(KV))
    else:
        assert engine_for(make_config(KV)) is not None


def layer(**changes: Any) -> Any:
    found = compat.Attention.__new__(compat.Attention)
    plain = {"attn_type": "decoder", "kv_sharing_target_layer_name": None, "head_size": 64, "head_size_v": 64}
    for name, value in (plain | changes).items():
        object.__setattr__(found, name, value)
    return found


@pytest.mark.parametrize(
    ("changes", "dtype", "alibi", "word"),
    [
        ({"attn_type": "encoder_only"}, "auto", False, "encoder_only"),
        ({}, "auto", True, "ALiBi"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "auto", False, "shares the KV cache of layers.0"),
        ({}, "fp8", False, "'fp8'"),
        ({"head_size_v": 32}, "auto", False, "values of 32"),
    ],
)
def test_layers(changes: dict[str, Any], dtype: str, alibi: bool, word: str) -> None:
    with pytest.raises(JettisonError) as error:
        refusals.check_layer("layers.1", layer(**changes), dtype, alibi)
    assert word in str(error.value)
    assert "layers.1" in str(error.value)


def test_a_cross_attention_layer() -> None:
    from vllm.model_executor.layers.attention import CrossAttention

    with pytest.raises(JettisonError, match="CrossAttention"):
        refusals.check_layer("layers.1", CrossAttention.__new__(CrossAttention), "auto", False)
    refusals.check_layer("layers.1", layer(), "auto", False)


def test_every_rule_has_a_test_here() -> None:
    names = {rule.name for rule in (*refusals.KV_RULES, *refusals.POLICY_RULES)}
    assert names == {
        "mla", "encoder", "attention_free", "mm_prefix", "rswa", "non_causal", "kv_cache_dtype", "kv_transfer",
        "speculative", "context_parallel", "pipeline", "kv_sharing", "kernels", "cuda_backend",
        "policy_processor", "policy_speculative",
    }  # fmt: skip


def test_the_processor_may_be_given_as_a_class(make_config: Callable[..., Any]) -> None:
    from jettison.hooks.vllm.policies import PolicyProcessor

    assert engine_for(make_config({"poltest": {}}, logits_processors=[PolicyProcessor])) is not None
