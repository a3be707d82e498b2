"""One step's batch on CUDA: which rows the decode kernel takes, and the prefill calls for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from jettison.hooks.vllm.compat import AttentionCGSupport, CommonAttentionMetadata
from jettison.hooks.vllm.packed import PackedMetadata, PackedMetadataBuilder
from jettison.hooks.vllm.prefill_plan import Run, count_decodes, plan_prefill

if TYPE_CHECKING:
    from jettison.hooks.vllm.compat import AttentionSpec, VllmConfig


@dataclass(frozen=True, eq=False)
class PrefillRun:
    """A `Run` with what its kernels read.

    Attributes:
        cu_queries, cu_keys: int32 [S+1].
        starts, seq_lens: int32 [S].
        block_table: int32 [S, pages].
    """

    run: Run
    cu_queries: Tensor
    cu_keys: Tensor
    starts: Tensor
    seq_lens: Tensor
    block_table: Tensor


@dataclass(frozen=True, eq=False)
class ServedMetadata(PackedMetadata):
    """A batch whose first `decodes` sequences, with `decode_tokens` tokens, go to the decode kernel.

    All tensors of the decode part are the engine's own persistent buffers, so a captured CUDA graph stays valid.

    Attributes:
        max_query_len: the most new tokens of a decoding sequence; constant for the batches of one CUDA graph.
    """

    decodes: int
    decode_tokens: int
    max_query_len: int
    prefill: tuple[PrefillRun, ...]


@dataclass
class _Memo:
    """The plans of the latest step: every layout has a builder of its own, and all of them see the same batch."""

    common: CommonAttentionMetadata | None = None
    plans: dict[Any, tuple[int, tuple[PrefillRun, ...]]] = field(default_factory=dict)

    def of(self, common: CommonAttentionMetadata) -> dict[Any, tuple[int, tuple[PrefillRun, ...]]]:
        if self.common is not common:
            self.common, self.plans = common, {}
        return self.plans


_memo = _Memo()


class ServedMetadataBuilder(PackedMetadataBuilder):
    """Splits a batch on the host, without waiting for the device.

    Attributes:
        read_fresh: whether the prefill of a sequence without history uses the new keys and values themselves. If not,
            every query reads quantised history only, so that results do not depend on how a prompt was cut.
    """

    read_fresh: ClassVar[bool] = True
    supports_draft_decode_metadata_update = True

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        assert self.reorder_batch_threshold is not None
        self.threshold: int = self.reorder_batch_threshold
        impls = [vllm_config.compilation_config.static_forward_context[name].impl for name in layer_names]
        self.kinds = {impl.window: impl for impl in impls}
        self.window = -1 if -1 in self.kinds else max(self.kinds)
        self.capacity = scratch_tokens(vllm_config)
        self.short = min(impl.short_queries for impl in impls)
        for impl in impls:
            impl.reserve()

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Decode steps, verification of drafts included, are captured whole; not in float32, which no kernel has."""
        full = vllm_config.model_config.dtype != torch.float32
        return AttentionCGSupport.UNIFORM_BATCH if full else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> ServedMetadata:
        """Return the metadata of one step; called once per attention group."""
        common = common_attn_metadata
        decodes = len(common.seq_lens)
        prefill: tuple[PrefillRun, ...] = ()
        if common.max_query_len > self.threshold:
            plans = _memo.of(common)
            key = (self.threshold, self.window, self.capacity, self.read_fresh, self.short)
            if key not in plans:
                plans[key] = self._plan(common)
            decodes, prefill = plans[key]
        metadata = ServedMetadata(
            common.num_actual_tokens,
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            decodes=decodes,
            decode_tokens=prefill[0].run.begin if prefill else common.num_actual_tokens,
            max_query_len=min(common.max_query_len, self.threshold),
            prefill=prefill,
        )
        self._cut(metadata)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> ServedMetadata:
        """Capture with the shortest sequences: replays read the lengths of their own step."""
        metadata = self.build(0, common_attn_metadata)
        metadata.seq_lens.fill_(metadata.max_query_len)
        self._cut(metadata)
        return metadata

    def update_draft_decode_metadata(self, metadata: ServedMetadata) -> None:
        """Cut the work anew: the lengths are in buffers that the speculator updates itself."""
        self._cut(metadata)

    def _cut(self, metadata: ServedMetadata) -> None:
        for impl in self.kinds.values():
            impl.cut(metadata)

    def _plan(self, common: CommonAttentionMetadata) -> tuple[int, tuple[PrefillRun, ...]]:
        bounds: list[int] = common.query_start_loc_cpu.tolist()
        upper = common.seq_lens_cpu_upper_bound
        # NOTES: vLLM's bound on the host is exact for every row that prefills.
        lengths: list[int] = (common.seq_lens if upper is None else upper).tolist()
        decodes = count_decodes(bounds, self.threshold)
        runs = plan_prefill(
            bounds, lengths, decodes, window=self.window, capacity=self.capacity, read_fresh=self.read_fresh,
            short=self.short,
        )  # fmt: skip
        return decodes, to_device(runs, common.block_table_tensor, common.seq_lens)


def scratch_tokens(config: VllmConfig) -> int:
    """Tokens of one layer that can be read back at once: the longest sequence, or a whole step of new tokens."""
    longest: int = config.model_config.max_model_len
    step: int = config.scheduler_config.max_num_batched_tokens
    return max(longest, step)


def to_device(runs: Sequence[Run], block_table: Tensor, seq_lens: Tensor) -> tuple[PrefillRun, ...]:
    """Send the runs to the device of `block_table`, in one copy that nothing waits for."""
    if not runs:
        return ()
    words = [word for run in runs for word in run.words]
    host = torch.tensor(words, dtype=torch.int32, pin_memory=block_table.is_cuda)
    sent = host.to(block_table.device, non_blocking=True)
    served, at = [], 0
    for run in runs:
        count = run.last - run.first
        queries, keys, starts = sent[at : at + 3 * count + 2].split([count + 1, count + 1, count])
        rows = slice(run.first, run.last)
        served.append(PrefillRun(run, queries, keys, starts, seq_lens[rows], block_table[rows]))
        at += 3 * count + 2
    return tuple(served)
