"""What a vLLM engine must look like for Jettison: one rule and one sentence per thing that we do not support."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jettison.csrc.cuda.variants import MAX_DECODE_QUERIES
from jettison.hooks.errors import EnvironmentRefused
from jettison.hooks.vllm import compat

if TYPE_CHECKING:
    from jettison.hooks.host import Active

HOPPER = (9, 0)
"""Compute capability that the CUDA kernels are written for and tested on."""

POLICY_PROCESSOR = "jettison.hooks.vllm.policies:PolicyProcessor"


@dataclass(frozen=True)
class Rule:
    """One refusal.

    Attributes:
        name: short and stable, for tests and reports.
        found: returns what is wrong with an engine's configuration, or None.
        do: what the user can do.
        allowed: what is supported instead.
    """

    name: str
    found: Callable[[compat.VllmConfig], str | None]
    do: str
    allowed: str = ""

    def check(self, config: compat.VllmConfig) -> None:
        """Raise EnvironmentRefused if the rule applies."""
        found = self.found(config)
        if found is not None:
            raise EnvironmentRefused(found, allowed=self.allowed, do=self.do)


def _if(applies: bool, found: str) -> str | None:
    return found if applies else None


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _wrong_backend(config: compat.VllmConfig) -> str | None:
    backend = config.attention_config.backend
    wrong = not _is_cpu() and backend is not compat.AttentionBackendEnum.CUSTOM
    return _if(wrong, f"the attention backend is {getattr(backend, 'name', 'chosen by vLLM')}")


def _capability() -> tuple[int, int] | None:
    """The GPU's compute capability; None on other platforms. Asks the driver's management library, not CUDA."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    found = current_platform.get_device_capability()
    return (found.major, found.minor) if found is not None else (0, 0)


def _no_kernels(config: compat.VllmConfig) -> str | None:
    found = _capability()
    return _if(found not in (None, HOPPER), f"the GPU has compute capability {found and '{}.{}'.format(*found)}")


def _long_drafts(config: compat.VllmConfig) -> str | None:
    queries = compat.max_decode_query_len(config)
    return _if(
        not _is_cpu() and queries > MAX_DECODE_QUERIES, f"speculative decoding verifies {queries} tokens per request"
    )


def _context_parallel(config: compat.VllmConfig) -> str | None:
    dcp = config.parallel_config.decode_context_parallel_size
    pcp = config.parallel_config.prefill_context_parallel_size
    return _if(dcp > 1 or pcp > 1, f"context parallelism is on (decode {dcp}, prefill {pcp})")


KV_RULES: tuple[Rule, ...] = (
    Rule("mla", lambda c: _if(c.model_config.use_mla, "the model uses multi-head latent attention (MLA)"),
        "remove the KV-cache plugin for this model", "packed KV caches support plain attention"),
    Rule("encoder", lambda c: _if(c.model_config.is_encoder_decoder, "the model is an encoder-decoder model"),
        "remove the KV-cache plugin for this model", "packed KV caches support decoder self-attention"),
    Rule("attention_free", lambda c: _if(c.model_config.is_attention_free, "the model has no attention layers"),
        "remove the KV-cache plugin for this model"),
    Rule("mm_prefix", lambda c: _if(c.model_config.is_mm_prefix_lm, "the model attends to image tokens in both"
        " directions"), "remove the KV-cache plugin for this model", "packed KV caches support causal attention"),
    Rule("rswa", lambda c: _if(c.model_config.rswa_window is not None, "the model uses reference sliding-window"
        " attention"), "remove the KV-cache plugin for this model"),
    Rule("non_causal", lambda c: _if(c.attention_config.use_non_causal, "attention_config.use_non_causal is set"),
        "unset it", "packed KV caches support causal attention"),
    Rule("kv_cache_dtype", lambda c: _if(c.cache_config.cache_dtype != "auto", "the KV cache has the dtype"
        f" {c.cache_config.cache_dtype!r} (from --kv-cache-dtype or the checkpoint)"),
        "remove --kv-cache-dtype or use a checkpoint without a KV scheme", "allowed is 'auto'"),
    Rule("kv_transfer", lambda c: _if(c.kv_transfer_config is not None, "a KV connector or KV offloading is"
        " configured (--kv-transfer-config, --kv-offloading-size)"),
        "remove that option", "packed pages cannot be transferred yet"),
    Rule("speculative", _long_drafts, f"set num_speculative_tokens to {MAX_DECODE_QUERIES - 1} or less",
        f"on CUDA packed KV caches verify up to {MAX_DECODE_QUERIES} tokens"),
    Rule("context_parallel", _context_parallel, "set both sizes to 1", "packed KV caches support tensor parallelism"),
    Rule("pipeline", lambda c: _if(c.parallel_config.pipeline_parallel_size > 1, "pipeline parallelism is on"
        f" ({c.parallel_config.pipeline_parallel_size} stages)"),
        "use --tensor-parallel-size instead", "packed KV caches support tensor parallelism"),
    Rule("kv_sharing", lambda c: _if(c.cache_config.kv_sharing_fast_prefill, "KV sharing between layers"
        " (--kv-sharing-fast-prefill) is on"), "remove --kv-sharing-fast-prefill"),
    Rule("kernels", _no_kernels, "remove the KV-cache plugin or use a Hopper GPU (H100, H200)",
        "the CUDA kernels of packed pages are for compute capability 9.0"),
    Rule("cuda_backend", _wrong_backend, "add --attention-backend CUSTOM",
        "on CUDA packed KV caches live in the backend CUSTOM"),
)  # fmt: skip
"""Apply when an active plugin chooses KV formats."""

POLICY_RULES: tuple[Rule, ...] = (
    Rule("policy_processor", lambda c: _if(not _has_policy_processor(c), "an active plugin decides per request, but the"
        " engine has no processor for it"), f"add --logits-processors {POLICY_PROCESSOR}"),
    Rule("policy_speculative", lambda c: _if(c.speculative_config is not None and not c.use_v2_model_runner,
        "speculative decoding is configured, and vLLM uses its model runner V1"),
        "remove --speculative-config", "with speculative decoding, request policies need vLLM's model runner V2"),
)  # fmt: skip
"""Apply when an active plugin decides per request."""


def check_engine(config: compat.VllmConfig, active: Active) -> None:
    """Refuse an engine that the active plugins cannot work in.

    Raises:
        EnvironmentRefused: the sentence of the first rule that applies.
    """
    if active.implementers("kv_cache_format"):
        for rule in KV_RULES:
            rule.check(config)
    if active.implementers("request_policy"):
        for rule in POLICY_RULES:
            rule.check(config)


def _has_policy_processor(config: compat.VllmConfig) -> bool:
    processors = config.model_config.logits_processors or ()
    names = [p if isinstance(p, str) else f"{p.__module__}:{p.__qualname__}" for p in processors]
    return POLICY_PROCESSOR in names


def check_layer(name: str, layer: compat.Attention, kv_cache_dtype: str, alibi: bool) -> None:
    """Refuse an attention layer whose cache we cannot pack.

    Raises:
        EnvironmentRefused: naming the layer and what it does.
    """
    if type(layer) is not compat.Attention:
        problem = f"is a {type(layer).__name__}"
    elif layer.attn_type != compat.AttentionType.DECODER:
        problem = f"has the attention type {layer.attn_type}"
    elif alibi:
        problem = "uses ALiBi"
    elif layer.kv_sharing_target_layer_name is not None:
        problem = f"shares the KV cache of {layer.kv_sharing_target_layer_name}"
    elif kv_cache_dtype != "auto":
        problem = f"has the KV-cache dtype {kv_cache_dtype!r}"
    elif layer.head_size_v != layer.head_size:
        problem = f"has keys of {layer.head_size} and values of {layer.head_size_v} channels"
    else:
        return
    raise EnvironmentRefused(
        f"attention layer {name} {problem}",
        allowed="packed KV caches support plain causal self-attention",
        do="remove the KV-cache plugin for this model",
    )
