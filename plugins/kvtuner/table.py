"""The artefact `kvtuner.table`, schema 1: key and value bits of every layer, and the static key codec.

A table is JSON. `payload_sha256` covers everything else in it, so a changed value is refused, not served. Fields at
their default are left out of the file and of the hash: a table stays valid when a later version adds a field.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from jettison.csrc.layout import PageLayout
from jettison.hooks.errors import ConfigError, InputRefused
from jettison.hooks.files import read_document, write_atomically
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner import artefact
from jettison.plugins.kvtuner.artefact import SHA256, Canary, Name, Part, Search, Sizes
from jettison.plugins.kvtuner.payload import Channels, LayerBits, Payload, check_channels, read_channels

__all__ = [
    "LayerBits", "ModelShape", "Pair", "Payload", "Source", "Table", "content_sha256", "encode_channels", "load_table",
    "parse_table", "seal",
]  # fmt: skip

Pair = artefact.Pair
Dimensions = tuple[int, int, int]
"""(layers, KV heads, head size) of a model."""


class ModelShape(Part):
    """The model that a table was measured on; counts are the whole model's, before tensor parallelism.

    `config_sha256` is that of its `config.json`, `architecture` the name of its class in transformers.
    """

    name: Name
    architecture: Name | None = None
    config_sha256: SHA256
    num_layers: Annotated[int, Field(ge=1, le=1024)]
    num_kv_heads: Annotated[int, Field(ge=1, le=1024)]
    head_size: Annotated[int, Field(ge=32, le=256, multiple_of=16)]

    @property
    def dimensions(self) -> Dimensions:
        """The three numbers by which a table fits a model."""
        return self.num_layers, self.num_kv_heads, self.head_size

    @property
    def elements(self) -> int:
        """Number of key channels of the whole model: layers x KV heads x head size."""
        return self.num_layers * self.num_kv_heads * self.head_size


class Source(Part):
    """How the table was made. Free of paths and of text from the calibration data.

    `predicted_kl` is the sum of what each layer alone is predicted to cost, nats per token; None where nothing was
    predicted, as for an imported table.
    """

    method: Name
    data: Name
    data_sha256: SHA256
    tokens: Annotated[int, Field(ge=0)]
    seed: int
    capacity_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    block_size: Annotated[int, Field(ge=16, multiple_of=16)]
    predicted_kl: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class Table(Part):
    """The whole artefact. Construction refuses whatever `payload_sha256` or the model's shape contradicts."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    kind: Literal["kvtuner.table"]
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    jettison: Name
    model: ModelShape
    source: Source
    payload: Payload
    sizes: Sizes | None = None
    search: Search | None = None
    canary: Canary | None = None
    versions: dict[Name, Name] = Field(default_factory=dict)
    payload_sha256: SHA256

    @model_validator(mode="after")
    def _consistent(self) -> Table:
        found = [entry.layer for entry in self.payload.layers]
        if found != list(range(self.model.num_layers)):
            raise ValueError(_layer_problem(found, self.model.num_layers))
        for name in ("key_center", "key_scale"):
            check_channels(name, getattr(self.payload, name), self.model.elements, positive=name == "key_scale")
        if content_sha256(self.content()) != self.payload_sha256:
            raise ValueError("payload_sha256 does not match: the table was changed after it was written")
        if self.sizes is not None and self.sizes != self.measure_sizes():
            raise ValueError(f"sizes contradict the layers: they are {self.measure_sizes()!r}")
        return self

    def content(self) -> dict[str, Any]:
        """Return the table as JSON-ready data, fields at their default left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)

    def measure_sizes(self, block_size: int | None = None) -> Sizes:
        """Nominal and real size of the cache at blocks of that many tokens, `source`'s if not given.

        The residual of `kivi` is not counted.
        """
        payload, shape, block_size = self.payload, self.model, block_size or self.source.block_size
        nominal = sum(map(sum, payload.pairs)) / (2 * len(payload.pairs))
        if payload.codec == "kivi":
            meta = [4 * shape.head_size / (payload.group_size or 1) * (k < 16) + 4 * (v < 16) for k, v in payload.pairs]
            codes = [shape.head_size * (k + v) / 8 for k, v in payload.pairs]
            packed = math.ceil(shape.num_kv_heads * sum((*meta, *codes)))
        elif payload.codec == "named":
            nominal, packed = payload.named_sizes(shape.num_kv_heads, shape.head_size, block_size)
        else:
            layouts = [PageLayout(shape.head_size, *pair, payload.sink_tokens) for pair in payload.pairs]
            packed = shape.num_kv_heads * sum(layout.bytes_per_token(block_size) for layout in layouts)
        return Sizes(
            nominal_bits=round(nominal, 6),
            real_bits=round(packed * 4 / shape.elements, 6),
            bytes_per_token=packed,
        )

    def check_model(self, found: Dimensions, *, table: str | None = None, has: str = "the model has") -> None:
        """Raise ConfigError unless the table is for a model of the dimensions `found`.

        `table` names the table in the sentence, `has` the model; default: the table by its model's name.
        """
        expected = self.model.dimensions
        if expected != found:
            raise ConfigError(
                f"{table or f'the table of {self.model.name!r}'} is for {expected[0]} layers, {expected[1]} KV heads "
                f"and head size {expected[2]}, but {has} {found[0]}, {found[1]} and {found[2]}",
                do="measure a table for this model: jettison kvtuner sensitivity MODEL -o table.json",
            )

    def formats(self) -> list[KVFormat]:
        """Return the formats of all layers, in order; errors as `format`."""
        return [self.format(layer) for layer in range(self.model.num_layers)]

    def format(self, layer: int) -> KVFormat:
        """Return the format of layer `layer`, 0 to num_layers - 1.

        Raises:
            ConfigError: the codec is one that packed pages do not hold.
        """
        if self.payload.codec != "token-head":
            raise ConfigError(
                f"layer {layer} of the table of {self.model.name!r} has the codec {self.payload.at(layer)}",
                allowed="packed pages hold token-head",
                do="use the Hugging Face cache for this table"
                + ", or search with pages only: jettison kvtuner codecs" * (self.payload.codec == "named"),
            )
        bits = self.payload.layers[layer]
        center, scale = self.statistics(layer)
        return KVFormat(
            bits.key_bits,
            bits.value_bits,
            rotate=self.payload.rotate,
            sink_tokens=self.payload.sink_tokens,
            key_center=center,
            key_scale=scale,
        )

    def statistics(self, layer: int) -> tuple[Channels | None, Channels | None]:
        """Centre and equalisation of a layer's keys, each [num_kv_heads][head_size], or None."""
        heads, size = self.model.num_kv_heads, self.model.head_size
        texts = self.payload.key_center, self.payload.key_scale
        center, scale = (None if text is None else read_channels(text, layer, heads, size) for text in texts)
        return center, scale

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, atomically."""
        write_atomically(path, json.dumps(self.content(), indent=1) + "\n")


def content_sha256(content: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON (sorted keys, no spaces) of a table's content without its `payload_sha256`."""
    rest = {key: value for key, value in content.items() if key != "payload_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(content: dict[str, Any]) -> Table:
    """Validate `content`, a table without `payload_sha256`, and give it the hash that belongs to it.

    Parts may be given as models or as JSON-like data; `sizes` are added.

    Raises:
        InputRefused: as `parse_table`.
    """
    parts = {
        name: part.model_dump(mode="json", by_alias=True, exclude_defaults=True) if isinstance(part, Part) else part
        for name, part in content.items()
        if part is not None
    }
    draft = parse_table({**parts, "payload_sha256": content_sha256(parts)})
    parts["sizes"] = draft.measure_sizes().model_dump(mode="json")
    return parse_table({**parts, "payload_sha256": content_sha256(parts)})


def parse_table(content: object, where: str = "the table") -> Table:
    """Validate the JSON-like `content`; `where` names it in the error.

    Raises:
        InputRefused: what is wrong, and at which place.
    """
    try:
        return Table.model_validate_json(json.dumps(content, allow_nan=False), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        message = first["msg"].removeprefix("Value error, ")
        raise InputRefused(f"{where} is refused at {place}: {message}", do="measure it again") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise InputRefused(f"{where} is not plain JSON ({type(error).__name__})", do="measure it again") from error


def load_table(path: str | os.PathLike[str]) -> Table:
    """Read a table written by `Table.save`, JSON or the same tree as YAML.

    Raises:
        InputRefused: unreadable, malformed, or not a valid table.
    """
    return parse_table(read_document(path), os.fspath(path))


def encode_channels(values: Any) -> str:
    """Encode a float tensor [num_layers, num_kv_heads, head_size] for the payload. Needs torch.

    Raises:
        ConfigError: a value is not finite in float16.
    """
    import torch

    half = values.detach().to("cpu", torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise ConfigError("a key statistic is not finite in float16", do="check the model and the calibration text")
    return base64.b64encode(half.contiguous().numpy().astype("<f2").tobytes()).decode("ascii")


def _layer_problem(found: list[int], expected: int) -> str:
    twice = sorted({layer for layer in found if found.count(layer) > 1})[:4]
    missing = sorted(set(range(expected)) - set(found))[:4]
    unknown = sorted(set(found) - set(range(expected)))[:4]
    named = (("occurs twice", twice), ("is missing", missing), ("is unknown", unknown))
    problems = [f"layer {layers[0]} {what}" for what, layers in named if layers]
    return f"layers must be 0 to {expected - 1} in order, but " + (", ".join(problems) or "they are out of order")
