"""The CUDA builder on vLLM's own batch records: what decodes, what prefills, and that the host never waits."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch

from jettison.csrc.layout import PageLayout
from jettison.hooks.vllm import compat, cuda_metadata, kv_format
from jettison.hooks.vllm.cuda_backend import JettisonCUDABackend
from jettison.hooks.vllm.cuda_metadata import ServedMetadataBuilder, scratch_tokens, to_device
from jettison.hooks.vllm.packed import specialised
from jettison.hooks.vllm.prefill_plan import plan_prefill

LAYOUT = PageLayout(64, 4, 4)


class Layer:
    """Stands for an attention layer on CUDA; counts what the builder asks of it."""

    def __init__(self, window: int = -1) -> None:
        self.impl = self
        self.page = kv_format.LayerFormat(LAYOUT, True, None, None)
        self.window, self.reserved, self.short_queries = window, 0, 24
        self.cuts: list[int] = []

    def reserve(self) -> None:
        self.reserved += 1

    def cut(self, metadata: Any) -> None:
        self.cuts.append(metadata.decodes)


def builder(make_config: Any, *layers: Layer, **options: Any) -> ServedMetadataBuilder:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    config = make_config({"kvtest": {}}, **options)
    names = [f"layers.{n}" for n in range(len(layers))]
    config.compilation_config.static_forward_context.update(zip(names, layers, strict=True))
    plain = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    spec = specialised(JettisonCUDABackend, LAYOUT, ServedMetadataBuilder).customize_spec(plain)
    return ServedMetadataBuilder(spec, names, config, torch.device("cpu"))


class Device(torch.Tensor):
    """A tensor whose values the host must not read: stands for one on the device."""

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Device:
        return data.as_subclass(cls)

    def tolist(self) -> Any:
        raise AssertionError("the host waited for the device")

    item = __bool__ = __int__ = tolist


def batch(queries: list[int], histories: list[int], *, max_query_len: int | None = None) -> Any:
    bounds = torch.tensor([0, *accumulate(queries)], dtype=torch.int32)
    lengths = torch.tensor([q + h for q, h in zip(queries, histories, strict=True)], dtype=torch.int32)
    return compat.CommonAttentionMetadata(
        query_start_loc=Device(bounds.clone()),
        query_start_loc_cpu=bounds,
        seq_lens=Device(lengths.clone()),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(queries),
        num_actual_tokens=sum(queries),
        max_query_len=max_query_len or max(queries),
        max_seq_len=int(lengths.max()),
        block_table_tensor=torch.arange(len(queries) * 8, dtype=torch.int32).view(len(queries), 8),
        slot_mapping=torch.zeros(sum(queries), dtype=torch.int64),
    )


def test_a_decode_step_hands_the_engines_own_buffers_through(make_config: Any) -> None:
    layer = Layer()
    common = batch([1, 1, 1, 0], [9, 8, 7, 0], max_query_len=1)
    found = builder(make_config, layer).build(0, common)
    assert found.query_start_loc is common.query_start_loc
    assert found.seq_lens is common.seq_lens
    assert found.block_table is common.block_table_tensor
    assert (found.decodes, found.decode_tokens, found.max_query_len, found.prefill) == (4, 3, 1, ())
    assert layer.reserved == 1
    assert layer.cuts == [4]


def test_a_mixed_step_is_split(make_config: Any) -> None:
    common = batch([1, 1, 20, 30, 20], [9, 8, 0, 50, 70])
    found = builder(make_config, Layer()).build(0, common)
    assert (found.decodes, found.decode_tokens, found.max_query_len) == (2, 2, 1)
    assert [(r.run.first, r.run.last, r.run.source) for r in found.prefill] == [
        (2, 3, "new"),
        (3, 4, "copy"),
        (4, 5, "pages"),
    ]
    assert found.prefill[2].seq_lens.as_subclass(torch.Tensor).tolist() == [90]
    assert found.prefill[1].cu_keys.tolist() == [0, 80]
    assert torch.equal(found.prefill[1].block_table, common.block_table_tensor[3:4])


def test_verification_of_drafts_is_a_decode_step(make_config: Any) -> None:
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    made = builder(make_config, Layer(), speculative_config=speculation)
    found = made.build(0, batch([4, 4, 2, 1], [9, 8, 7, 3]))
    assert (found.decodes, found.max_query_len, found.prefill) == (4, 4, ())
    found = made.build(0, batch([4, 4, 5], [9, 8, 7]))
    assert (found.decodes, found.decode_tokens, found.max_query_len) == (2, 8, 4)


def test_layers_of_one_step_share_the_plan(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cuda_metadata, "plan_prefill", lambda *a, **k: calls.append(1) or plan_prefill(*a, **k))
    first, second = (builder(make_config, Layer()) for _ in range(2))
    windowed = builder(make_config, Layer(window=24))
    common, other = batch([20], [50]), batch([20], [50])
    assert first.build(0, common).prefill is second.build(0, common).prefill
    assert windowed.build(0, common).prefill[0].run.starts == (27,)
    assert len(calls) == 2
    assert first.build(0, other).prefill is not first.build(0, common).prefill
    assert len(calls) == 4


def test_layers_of_several_windows_read_back_the_widest(make_config: Any) -> None:
    layers = [Layer(window=24), Layer()]
    made = builder(make_config, *layers)
    assert made.build(0, batch([20], [50])).prefill[0].run.starts == (0,)
    assert [len(layer.cuts) for layer in layers] == [1, 1], "each window's work is shared out"


def test_graphs_are_captured_with_short_sequences(make_config: Any) -> None:
    common = batch([1, 1], [900, 8])
    found = builder(make_config, Layer()).build_for_cudagraph_capture(common)
    assert torch.equal(found.seq_lens.as_subclass(torch.Tensor), torch.ones(2, dtype=torch.int32))


@pytest.mark.parametrize(("dtype", "support"), [("bfloat16", "UNIFORM_BATCH"), ("float32", "NEVER")])
def test_graph_support(make_config: Any, dtype: str, support: str) -> None:
    config = make_config({"kvtest": {}}, dtype=dtype)
    assert ServedMetadataBuilder.get_cudagraph_support(config, None) is compat.AttentionCGSupport[support]


def test_scratch_memory_holds_the_longest_sequence_and_a_whole_step(make_config: Any) -> None:
    for longest, step in ((256, 512), (512, 256)):
        config = make_config({"kvtest": {}}, max_model_len=longest, max_num_batched_tokens=step)
        assert scratch_tokens(config) == 512


def test_what_the_device_gets_is_what_was_planned() -> None:
    table = torch.arange(40, dtype=torch.int32).view(5, 8)
    runs = plan_prefill([0, 20, 50, 90, 130, 200], [20, 30, 140, 140, 70], 0, window=32, capacity=300)
    assert len(runs) == 3
    lengths = torch.tensor([20, 30, 140, 140, 70], dtype=torch.int32)
    for served in to_device(runs, table, lengths):
        run = served.run
        assert tuple(served.cu_queries.tolist()) == run.queries
        assert tuple(served.cu_keys.tolist()) == run.keys
        assert tuple(served.starts.tolist()) == run.starts
        assert torch.equal(served.block_table, table[run.first : run.last])
        assert torch.equal(served.seq_lens, lengths[run.first : run.last])
        assert all(b > a for a, b in pairwise(run.queries))
    assert to_device((), table, lengths) == ()


def test_the_slot_custom_builds_this_metadata() -> None:
    assert JettisonCUDABackend.get_builder_cls() is ServedMetadataBuilder
    assert ServedMetadataBuilder.supports_draft_decode_metadata_update
