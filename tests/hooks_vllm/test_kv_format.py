"""From a plugin's answer to what a rank's kernels take, and the backend classes that carry it."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from jettison.csrc.layout import PageLayout
from jettison.hooks import AttentionLayer, JettisonError, KVFormat
from jettison.hooks.vllm import compat, kv_format
from jettison.hooks.vllm.cpu_backend import JettisonCPUBackend, PackedCPUImpl
from jettison.hooks.vllm.cuda_backend import JettisonCUDABackend
from jettison.hooks.vllm.packed import PackedMetadataBuilder, specialised


def config(block_size: int = 128) -> Any:
    return types.SimpleNamespace(
        cache_config=types.SimpleNamespace(block_size=block_size),
        device_config=types.SimpleNamespace(device=torch.device("cpu")),
    )


def record(heads: int = 4, head_size: int = 64) -> AttentionLayer:
    return AttentionLayer(0, "layers.0.attn", 8, heads, head_size, None, 1)


def localise(kv: KVFormat, *, local: int = 4, rank: int = 0, ranks: int = 1, **of: int) -> kv_format.LayerFormat:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "get_tensor_model_parallel_world_size", lambda: ranks, raising=False)
        patch.setattr(compat, "get_tensor_model_parallel_rank", lambda: rank, raising=False)
        return kv_format._localise(config(), record(**of), kv, types.SimpleNamespace(num_kv_heads=local))


def table(heads: int = 4, head_size: int = 64) -> list[list[float]]:
    return [[float(head * 1000 + channel + 1) for channel in range(head_size)] for head in range(heads)]


@pytest.mark.parametrize(
    ("heads", "ranks", "rank", "expected"),
    [(4, 1, 0, [0, 1, 2, 3]), (4, 2, 0, [0, 1]), (4, 2, 1, [2, 3]), (4, 4, 3, [3]), (2, 4, 0, [0]), (2, 4, 1, [0]),
     (2, 4, 2, [1]), (2, 4, 3, [1]), (1, 2, 1, [0])],
)  # fmt: skip
def test_each_rank_takes_the_rows_of_its_heads(heads: int, ranks: int, rank: int, expected: list[int]) -> None:
    local = max(1, heads // ranks)
    kv = KVFormat(4, 4, key_center=table(heads), key_scale=table(heads))
    found = localise(kv, local=local, rank=rank, ranks=ranks, heads=heads)
    for rows in (found.key_center, found.key_scale):
        assert rows is not None
        assert rows.shape == (local, 64)
        assert rows.dtype == torch.float32
        assert rows.is_contiguous()
        assert [int(row[0]) // 1000 for row in rows] == expected, f"{heads} heads, rank {rank} of {ranks}"


@pytest.mark.parametrize("of", [{"heads": 2}, {"head_size": 32}])
def test_a_table_of_another_model_is_refused(of: dict[str, int]) -> None:
    with pytest.raises(JettisonError, match="4 heads of 64 channels") as error:
        localise(KVFormat(4, 4, key_center=table()), **of)
    assert "layers.0.attn" in str(error.value)


@pytest.mark.parametrize("head_size", [16, 40, 100, 272, 512])
def test_a_head_size_that_cannot_be_packed_is_refused(head_size: int) -> None:
    with pytest.raises(JettisonError, match=f"head size {head_size}"):
        localise(KVFormat(8, 8), head_size=head_size)


def test_a_block_size_that_cannot_be_packed_is_refused() -> None:
    with pytest.raises(JettisonError, match="block size 24"), pytest.MonkeyPatch.context():
        kv_format._localise(config(24), record(), KVFormat(8, 8), types.SimpleNamespace(num_kv_heads=4))


def spec(block_size: int = 32, **more: Any) -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(block_size=block_size, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, **more)


@pytest.mark.parametrize("base", [JettisonCPUBackend, JettisonCUDABackend])
@pytest.mark.parametrize("layout", [PageLayout(64, 8, 4), PageLayout(64, 16, 16), PageLayout(64, 2, 2, sink_tokens=4)])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_a_layer_page_is_what_the_layout_says(base: Any, layout: PageLayout, block_size: int) -> None:
    found = specialised(base, layout).customize_spec(spec(block_size))
    assert found.dtype == torch.uint8
    assert found.page_size_bytes == 2 * block_size * layout.bytes_per_token(block_size)
    assert specialised(base, layout).customize_spec(spec(1)).state_content_bytes == layout.bytes_per_token(128)


@pytest.mark.parametrize("base", [JettisonCPUBackend, JettisonCUDABackend])
def test_backends_of_different_layouts_are_different_groups(base: Any) -> None:
    names = {
        specialised(base, PageLayout(size, k, v, s)).full_cls_name()
        for size in (32, 64) for k in (16, 8, 4, 2) for v in (16, 8, 4, 2) for s in (0, 4)
    }  # fmt: skip
    assert len(names) == 64
    one = specialised(base, PageLayout(64, 8, 4))
    assert one is specialised(base, PageLayout(64, 8, 4))
    assert one.get_name() == base.get_name()
    assert one.get_builder_cls() is PackedMetadataBuilder
    layouts = compat.KVCacheLayout
    assert one.supported_kv_cache_layouts() == (layouts.LBHNC, layouts.BLHNC)


def test_the_unspecialised_cpu_backend_is_stock() -> None:
    stock = compat.CPUAttentionBackend
    assert JettisonCPUBackend.customize_spec(spec()) == spec()
    assert JettisonCPUBackend.get_builder_cls() is stock.get_builder_cls()
    assert JettisonCPUBackend.supported_kv_cache_layouts() == stock.supported_kv_cache_layouts()
    assert JettisonCPUBackend.get_supported_kernel_block_sizes() == stock.get_supported_kernel_block_sizes()
    assert set(vars(JettisonCPUBackend)) - {"__module__", "__doc__", "__abstractmethods__", "_abc_impl"} == {
        "get_impl_cls"
    }


def test_layers_that_were_never_specialised_are_refused(make_config: Any) -> None:
    engine_config = make_config({"kvtest": {}})
    with compat.set_current_vllm_config(engine_config):
        impl_class = JettisonCPUBackend.get_impl_cls()
        assert impl_class is PackedCPUImpl
        impl = impl_class(4, 64, 0.125, 2, None, None, "auto")
    with pytest.raises(JettisonError, match="process_weights_after_loading"):
        JettisonCPUBackend.customize_spec(spec())
    del impl
    assert JettisonCPUBackend.customize_spec(spec()) == spec(), "a dead engine must not stand in a stock one's way"


def test_without_options_the_stock_implementation_is_built(make_config: Any) -> None:
    with compat.set_current_vllm_config(make_config()):
        assert JettisonCPUBackend.get_impl_cls() is compat.CPUAttentionBackendImpl
        with pytest.raises(JettisonError, match="--attention-backend CUSTOM"):
            JettisonCUDABackend.get_impl_cls()


def test_a_changed_block_size_is_refused(make_config: Any) -> None:
    engine_config = make_config({"kvtest": {}})
    layout = PageLayout(64, 4, 4, sink_tokens=4)
    page = kv_format.LayerFormat(layout, False, None, None)
    layer = types.SimpleNamespace(impl=types.SimpleNamespace(page=page))
    engine_config.compilation_config.static_forward_context["a"] = layer
    good = specialised(JettisonCPUBackend, layout).customize_spec(spec(32))
    PackedMetadataBuilder(good, ["a"], engine_config, torch.device("cpu"))
    with pytest.raises(JettisonError, match="blocks of 64 tokens"):
        PackedMetadataBuilder(good.copy_with_new_block_size(64), ["a"], engine_config, torch.device("cpu"))


def test_metadata_is_the_step_as_it_is(make_config: Any) -> None:
    builder = PackedMetadataBuilder(spec(), [], make_config({"kvtest": {}}), torch.device("cpu"))
    common = types.SimpleNamespace(
        num_actual_tokens=3,
        query_start_loc=torch.zeros(2),
        seq_lens=torch.zeros(1),
        block_table_tensor=torch.zeros(1, 1),
    )
    found = builder.build(0, common)
    assert (found.num_tokens, found.query_start_loc, found.seq_lens, found.block_table) == (
        3, common.query_start_loc, common.seq_lens, common.block_table_tensor,
    )  # fmt: skip
