"""Tables as flags of vLLM itself, without this plugin, where vLLM 0.32 can express them.

Stock vLLM has one format for all layers (`--kv-cache-dtype`) and a list of layers that keep the model's type
(`--kv-cache-dtype-skip-layers`): a table can be said in that way if its layers are at 16 bits or of one pair that has
a format there. The formats are vLLM's, not those that the table was measured with: its KL does not carry over.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

from jettison.hooks.errors import ConfigError
from jettison.plugins.kvtuner.artefact import Pair
from jettison.plugins.kvtuner.table import Table

VERSION = "0.32"


@dataclass(frozen=True)
class StockFormat:
    """A value of `--kv-cache-dtype`.

    Attributes:
        pair: (key bits, value bits) that it stands for.
        meta: bytes per token and KV head beside the codes.
        boundary: first and last layers that vLLM keeps at 16 bits whatever it is told.
    """

    pair: Pair
    meta: int
    boundary: int = 0


FORMATS = {
    "fp8": StockFormat((8, 8), 0),
    "int8_per_token_head": StockFormat((8, 8), 8),
    "fp8_per_token_head": StockFormat((8, 8), 8),
    "int4_per_token_head": StockFormat((4, 4), 8),
    "turboquant_k8v4": StockFormat((8, 4), 4, boundary=2),
}
"""What we emit; of several for one pair the first is the default."""


@dataclass(frozen=True)
class Recipe:
    """How to start vLLM with (nearly) a table's cache.

    Attributes:
        model: name of the table's model.
        cache_dtype: `--kv-cache-dtype`, "auto" for 16 bits everywhere.
        skip_layers: layers at 16 bits, `--kv-cache-dtype-skip-layers`.
        bytes_per_token: of all layers and KV heads in vLLM's formats, before vLLM pads pages to one size.
        bf16_bytes_per_token: of an unquantised cache.
        nominal_bits: of the table, per element, without scales and zeros.
    """

    model: str
    cache_dtype: str
    skip_layers: tuple[int, ...]
    bytes_per_token: int
    bf16_bytes_per_token: int
    nominal_bits: float

    @property
    def flags(self) -> list[str]:
        """Arguments for `vllm serve MODEL`."""
        skipped = ["--kv-cache-dtype-skip-layers", *map(str, self.skip_layers)] if self.skip_layers else []
        return ["--kv-cache-dtype", self.cache_dtype, *skipped]

    @property
    def command(self) -> str:
        """The command line, quoted for a shell."""
        return shlex.join(["vllm", "serve", self.model, *self.flags])

    @property
    def content(self) -> dict[str, Any]:
        """JSON-ready: what `export --json` prints."""
        return {
            "engine": "vllm",
            "version": VERSION,
            "model": self.model,
            "flags": self.flags,
            "cache_dtype": self.cache_dtype,
            "skip_layers": list(self.skip_layers),
            "bytes_per_token": self.bytes_per_token,
            "bf16_bytes_per_token": self.bf16_bytes_per_token,
            "nominal_bits": self.nominal_bits,
            "real_bits": round(16 * self.bytes_per_token / self.bf16_bytes_per_token, 4),
        }

    def text(self) -> str:
        """Return the content as JSON text for a file."""
        return json.dumps(self.content, indent=1) + "\n"


def recipe(table: Table, cache_dtype: str | None = None) -> Recipe:
    """Say `table` in vLLM's own flags; `cache_dtype` is one of `FORMATS`, else the first that fits.

    Raises:
        ConfigError: naming the first layer that stock vLLM cannot store as the table asks.
    """
    if table.payload.codec != "token-head":
        raise ConfigError(
            f"the table of {table.model.name!r} has the codec {table.payload.codec}",
            allowed="vLLM stores keys and values per token",
            do="use the Hugging Face cache for this table",
        )
    if cache_dtype not in (None, *FORMATS):
        raise ConfigError(
            f"vLLM format {cache_dtype!r} is not one we emit", allowed=f"allowed are {', '.join(FORMATS)}"
        )
    pairs = table.payload.pairs
    name = cache_dtype or _first_fit(pairs)
    skipped = tuple(layer for layer, pair in enumerate(pairs) if pair == (16, 16))
    if name is not None:
        _check(pairs, name)
    shape = table.model
    per_head = [_stored(pair, name, shape.head_size) for pair in pairs]
    return Recipe(
        model=shape.name,
        cache_dtype=name if name is not None and len(skipped) < len(pairs) else "auto",
        skip_layers=skipped if len(skipped) < len(pairs) else (),
        bytes_per_token=shape.num_kv_heads * sum(per_head),
        bf16_bytes_per_token=4 * shape.elements,
        nominal_bits=table.measure_sizes().nominal_bits,
    )


def _first_fit(pairs: list[Pair]) -> str | None:
    packed = next((pair for pair in pairs if pair != (16, 16)), None)
    if packed is None:
        return None
    name = next((name for name, form in FORMATS.items() if form.pair == packed), None)
    if name is None:
        raise _inexpressible(pairs.index(packed), packed, "16-bit layers beside one of " + _known())
    return name


def _check(pairs: list[Pair], name: str) -> None:
    """Raise ConfigError unless vLLM, told `name`, stores every layer as `pairs` says."""
    form, last = FORMATS[name], len(pairs) - 1
    for layer, pair in enumerate(pairs):
        if pair not in ((16, 16), form.pair):
            raise _inexpressible(layer, pair, f"beside 16 bits, {name} stores {_text(form.pair)} in all other layers")
        if pair == form.pair and (layer < form.boundary or layer > last - form.boundary):
            raise _inexpressible(
                layer, pair, f"{name} keeps the first and last {form.boundary} layers at 16 bits whatever it is told"
            )


def _inexpressible(layer: int, pair: Pair, allowed: str) -> ConfigError:
    return ConfigError(
        f"layer {layer} is {_text(pair)}, which stock vLLM {VERSION} cannot store so in this table",
        allowed=allowed,
        do="serve the table with this plugin: jettison serve MODEL --with kvtuner=table.json",
    )


def _stored(pair: Pair, name: str | None, head_size: int) -> int:
    meta = FORMATS[name].meta if name is not None and pair != (16, 16) else 0
    return head_size * sum(pair) // 8 + meta


def _known() -> str:
    return ", ".join(dict.fromkeys(_text(form.pair) for form in FORMATS.values()))


def _text(pair: Pair) -> str:
    return f"k{pair[0]}v{pair[1]}"
