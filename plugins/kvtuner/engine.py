"""What an engine asks of KVTuner: the format of each attention layer, and what came of it."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from jettison.csrc.layout import PageLayout
from jettison.hooks.errors import ConfigError
from jettison.hooks.specs import hookimpl
from jettison.hooks.types import AttentionLayer, KVFormat
from jettison.plugins.kvtuner.config import KVTunerOptions
from jettison.plugins.kvtuner.table import Table

logger = logging.getLogger("jettison")

REPORT_BLOCK = 128
"""Tokens per block that `report` assumes when it counts the sink area; an engine with another block size differs."""


class KVTuner:
    """Carrier of the engine-level hooks for one engine."""

    def __init__(self, options: KVTunerOptions) -> None:
        self._options = options
        self._answered: dict[int, tuple[AttentionLayer, KVFormat]] = {}

    @hookimpl
    def kv_cache_format(self, layer: AttentionLayer) -> KVFormat:
        """Return the layer's format.

        Raises:
            ConfigError: the table was measured on a model of another shape.
        """
        pair, table = self._options.uniform, self._options.table
        if table is not None:
            _check_shape(table, layer)
            if not self._answered and _is_other(table, layer):
                logger.warning(
                    "the table of %r was measured on a model with another config.json; if its weights differ too, "
                    "make a table for this model: jettison kvtuner search MODEL -o table.json",
                    table.model.name,
                )
            answer = table.format(layer.index)
        elif pair is not None:
            rotate = self._options.rotate is not False
            answer = KVFormat(*pair, rotate=rotate, sink_tokens=self._options.sink_tokens or 0)
        else:
            raise AssertionError("options hold exactly one of table and pair")
        self._answered[layer.index] = (layer, answer)
        return answer

    @hookimpl
    def report(self) -> dict[str, Any]:
        """Return the formats given so far and their bytes per token (all heads, blocks of 128 tokens, before TP)."""
        table = self._options.table
        source: dict[str, Any] = {"source": "table" if table is not None else "pair"}
        if table is not None:
            source |= {"model": table.model.name, "payload_sha256": table.payload_sha256}
            if any(layer.config_sha256 for layer, _ in self._answered.values()):
                source["config_differs"] = any(_is_other(table, layer) for layer, _ in self._answered.values())
        packed = stock = 0
        pairs: Counter[str] = Counter()
        for layer, answer in self._answered.values():
            pairs[f"k{answer.key_bits}v{answer.value_bits}"] += 1
            layout = PageLayout(layer.head_size, answer.key_bits, answer.value_bits, answer.sink_tokens)
            packed += layer.num_kv_heads * layout.bytes_per_token(REPORT_BLOCK)
            stock += layer.num_kv_heads * layer.head_size * 4
        sizes = {"bytes_per_token": packed, "bf16_bytes_per_token": stock}
        ratio = {"capacity_ratio": round(stock / packed, 4)} if packed else {}
        return {**source, "layers": len(self._answered), "pairs": dict(sorted(pairs.items())), **sizes, **ratio}


def _is_other(table: Table, layer: AttentionLayer) -> bool:
    """Whether the engine's model has another `config.json`: a warning only, as saving a model anew changes it."""
    return layer.config_sha256 is not None and layer.config_sha256 != table.model.config_sha256


def _check_shape(table: Table, layer: AttentionLayer) -> None:
    has = f"the model of layer {layer.index} ({layer.name}) has"
    table.check_model((layer.num_layers, layer.num_kv_heads, layer.head_size), has=has)
    if not 0 <= layer.index < layer.num_layers:
        raise ConfigError(f"{layer.name} is layer {layer.index}", allowed=f"layers are 0 to {layer.num_layers - 1}")
