"""From a plugin's `KVFormat` of each layer to what this rank's kernels take: page layout, centre and scale."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jettison.csrc.layout import PageLayout
from jettison.hooks.errors import EnvironmentRefused, JettisonError
from jettison.hooks.types import AttentionLayer, KVFormat, PerChannel
from jettison.hooks.vllm import compat, refusals

if TYPE_CHECKING:
    from jettison.hooks.host import Active

RAW = KVFormat(16, 16)
"""Format of a layer without one, in a model where another layer has one: all pages must be of one kind."""

pending: weakref.WeakSet[Any] = weakref.WeakSet()
"""Attention implementations of active engines that do not know their format yet."""


@dataclass(frozen=True, eq=False)
class LayerFormat:
    """How one layer's cache is stored on this rank.

    Attributes:
        layout: geometry of the pages.
        rotate: whether keys and values are rotated.
        key_center, key_scale: float32 [KV heads of this rank, head size], or None.
    """

    layout: PageLayout
    rotate: bool
    key_center: Tensor | None
    key_scale: Tensor | None

    def describe(self, name: str, block_size: int) -> dict[str, Any]:
        """What the status says of the layer, JSON-ready; bytes are per token and KV head."""
        return {
            "name": name,
            "key_bits": self.layout.key_bits,
            "value_bits": self.layout.value_bits,
            "rotate": self.rotate,
            "sink_tokens": self.layout.sink_tokens,
            "key_center": self.key_center is not None,
            "key_scale": self.key_scale is not None,
            "bytes_per_token": self.layout.bytes_per_token(block_size),
        }


KVPlan = Mapping[str, LayerFormat]
"""Layer name -> format; empty if no plugin gave any format, then the stock implementation serves every layer."""


def make_plan(config: compat.VllmConfig, active: Active) -> KVPlan:
    """Ask the plugins about every attention layer of a loaded model.

    Raises:
        JettisonError: a plugin refused the model, failed, or gave a format that the model or a kernel does not take.
    """
    layers = attention_layers(config)
    records = {name: describe(config, name, layer) for name, layer in layers.items()}
    formats = {name: _ask(active, record) for name, record in records.items()}
    if not any(formats.values()):
        return {}
    for name, layer in layers.items():
        impl = layer.impl
        refusals.check_layer(name, layer, impl.kv_cache_dtype, getattr(impl, "alibi_slopes", None) is not None)
    return {name: _localise(config, records[name], formats[name] or RAW, layers[name]) for name in layers}


def add_draft_layer(config: compat.VllmConfig, plan: KVPlan, name: str) -> KVPlan:
    """The plan with a layer of a draft model, which vLLM loads after the model that the plugins were asked about.

    Drafts are only guesses, and their models are small: such layers keep 16 bits, in pages of the common kind.

    Raises:
        JettisonError: the layer cannot be packed.
    """
    layer = attention_layers(config)[name]
    refusals.check_layer(name, layer, layer.impl.kv_cache_dtype, getattr(layer.impl, "alibi_slopes", None) is not None)
    return {**plan, name: _localise(config, describe(config, name, layer), RAW, layer)}


def attention_layers(config: compat.VllmConfig) -> dict[str, compat.Attention]:
    """The layers that own or share a KV cache, by name, in model order.

    Raises:
        EnvironmentRefused: a layer that is not attention (a state-space layer) keeps a cache of its own.
    """
    layers: dict[str, compat.Attention] = {}
    for name, layer in config.compilation_config.static_forward_context.items():
        if isinstance(layer, compat.Attention):
            layers[name] = layer
        elif isinstance(layer, compat.AttentionLayerBase):
            raise EnvironmentRefused(
                f"layer {name} keeps a cache and is a {type(layer).__name__}",
                allowed="packed KV caches support models with plain attention layers only",
                do="remove the KV-cache plugin for this model",
            )
    return layers


def describe(config: compat.VllmConfig, name: str, layer: compat.Attention) -> AttentionLayer:
    """The layer as plugins see it: totals of the model, before tensor parallelism.

    Raises:
        EnvironmentRefused: the name does not tell which layer it is.
    """
    ranks, model = config.parallel_config.tensor_parallel_size, config.model_config
    num_layers = model.get_total_num_hidden_layers()
    try:
        index = compat.extract_layer_index(name)
    except (AssertionError, IndexError) as error:
        raise EnvironmentRefused(
            f"attention layer {name} has no single layer number in its name",
            do="remove the KV-cache plugin for this model",
        ) from error
    return AttentionLayer(
        index=index,
        name=name,
        num_heads=layer.num_heads * ranks,
        num_kv_heads=layer.num_kv_heads if ranks == 1 else model.get_total_num_kv_heads(),
        head_size=layer.head_size,
        sliding_window=layer.sliding_window,
        num_layers=num_layers,
        config_sha256=_config_sha256(str(model.model)),
    )


@cache
def _config_sha256(folder: str) -> str | None:
    file = Path(folder) / "config.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _ask(active: Active, record: AttentionLayer) -> KVFormat | None:
    try:
        answer = active.hook.kv_cache_format(layer=record)
    except JettisonError:
        raise
    except Exception as error:
        names = ", ".join(active.implementers("kv_cache_format"))
        raise EnvironmentRefused(
            f"the KV-cache plugin {names} failed on layer {record.name} ({type(error).__name__}: {error})",
            do="repair the plugin or remove its section",
        ) from error
    if answer is not None and not isinstance(answer, KVFormat):
        raise EnvironmentRefused(
            f"kv_cache_format returned {type(answer).__name__} for layer {record.name}",
            allowed="allowed are a KVFormat and None",
            do="repair the plugin or remove its section",
        )
    return answer


def _localise(config: compat.VllmConfig, record: AttentionLayer, kv: KVFormat, layer: compat.Attention) -> LayerFormat:
    try:
        layout = PageLayout(record.head_size, kv.key_bits, kv.value_bits, kv.sink_tokens)
        layout.bytes_per_token(config.cache_config.block_size)
    except ValueError as error:
        raise EnvironmentRefused(
            f"the KV cache of layer {record.name} cannot be packed ({error})",
            do="change the table or --block-size, or remove the KV-cache plugin for this model",
        ) from error
    heads = _head_range(record.num_kv_heads, layer.num_kv_heads)
    device = config.device_config.device
    center, scale = (
        _per_channel(what, rows, record, heads, device)
        for what, rows in (("key_center", kv.key_center), ("key_scale", kv.key_scale))
    )
    return LayerFormat(layout, kv.rotate, center, scale)


def _head_range(total: int, local: int) -> slice:
    """KV heads of this rank: an equal share, or one head that several ranks replicate."""
    ranks, rank = compat.get_tensor_model_parallel_world_size(), compat.get_tensor_model_parallel_rank()
    first = rank * local if total >= ranks else rank // (ranks // total)
    return slice(first, first + local)


def _per_channel(
    what: str, rows: PerChannel | None, record: AttentionLayer, heads: slice, device: Any
) -> Tensor | None:
    if rows is None:
        return None
    expected, found = (record.num_kv_heads, record.head_size), (len(rows), len(rows[0]))
    if found != expected:
        raise EnvironmentRefused(
            f"{what} of layer {record.name} has {found[0]} heads of {found[1]} channels",
            allowed=f"the model has {expected[0]} of {expected[1]}",
            do="use a table that was made for this model",
        )
    return torch.tensor(rows, dtype=torch.float32)[heads].contiguous().to(device)
