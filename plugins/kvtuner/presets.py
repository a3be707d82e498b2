"""Published tables of the paper's authors (YAML, one per model and mode): read, checked, turned into a `Table`.

The form is a mapping `layer: {nbits_key: n, nbits_value: n}` without model, mode or group size inside; the mode stands
in the file's name (`_pertoken_` or `_kivi_`). Their search also writes layers down in groups, two of which are
defective (a layer in two groups, section 3.4): `check_groups` rejects those.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from jettison.csrc.layout import SUPPORTED_BITS
from jettison.hooks import __version__
from jettison.hooks.errors import ConfigError, InputRefused
from jettison.plugins.kvtuner.artefact import Pair
from jettison.plugins.kvtuner.table import LayerBits, ModelShape, Payload, Source, Table, seal

Mode = Literal["per-token", "per-channel"]
METHOD = "imported preset"
KIVI_SIZE = 32
"""Tokens per group and residual of the published per-channel tables (paper, section 2.1)."""

_MAX_BYTES = 1 << 20
_NUMBER = re.compile(r"0|[1-9][0-9]{0,3}")
_PLAIN = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:str")
_SIDES = ("nbits_key", "nbits_value")
_BLOCK = 128


@dataclass(frozen=True)
class Preset:
    """A published table.

    Attributes:
        name: the file's name without its suffix.
        mode: "per-token", or "per-channel" for KIVI's keys.
        pairs: (key bits, value bits) of every layer, in order.
        sha256: of the file.
    """

    name: str
    mode: Mode
    pairs: tuple[Pair, ...]
    sha256: str

    @property
    def nominal_bits(self) -> float:
        """The paper's "equivalent precision": the plain mean of all bits, scales and residual not counted."""
        return sum(map(sum, self.pairs)) / (2 * len(self.pairs))


def read_preset(path: Path, mode: Mode | None = None) -> Preset:
    """Read a published table; `mode` is taken from the file's name if not given.

    Raises:
        InputRefused: unreadable, not of that form, a layer that is missing, double or unknown, illegal bits.
        ConfigError: the name does not tell the mode.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:
        raise InputRefused(f"cannot read {path} ({error})", do="give the preset's YAML file") from error
    if len(data) > _MAX_BYTES:
        raise InputRefused(f"{path} is larger than {_MAX_BYTES} bytes", do="give the preset's YAML file")
    pairs = parse_preset(text, str(path))
    return Preset(path.stem, mode or mode_of(path.stem), pairs, hashlib.sha256(data).hexdigest())


def mode_of(name: str) -> Mode:
    """Mode that a published file's name tells.

    Raises:
        ConfigError: neither `_pertoken_` nor `_kivi_` is in it.
    """
    for word, mode in (("_pertoken_", "per-token"), ("_kivi_", "per-channel")):
        if word in f"_{name}_":
            return mode  # type: ignore[return-value]
    raise ConfigError(
        f"the name {name!r} does not tell how the preset quantises",
        allowed="published names have _pertoken_ or _kivi_ in them",
        do=f"say it with --mode {' or --mode '.join(get_args(Mode))}",
    )


def parse_preset(text: str, where: str) -> tuple[Pair, ...]:
    """(key bits, value bits) of every layer of a published table; `where` names it in errors.

    Raises:
        InputRefused: as `read_preset`.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputRefused(f"{where} is not YAML ({reason})", do="give the preset's YAML file") from error
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise _refused(where, "it is no mapping of layers")
    found: dict[int, Pair] = {}
    lines: dict[int, int] = {}
    for key, value in root.value:
        layer = _layer(key, where)
        if layer in found:
            raise _refused(where, f"layer {layer} occurs twice, in lines {lines[layer]} and {_line(key)}")
        found[layer], lines[layer] = _pair(layer, value, where), _line(key)
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise _refused(where, f"layer {missing[0]} is missing, but layer {max(found)} is there")
    return tuple(found[layer] for layer in range(len(found)))


def check_groups(groups: Iterable[Sequence[int]], num_layers: int, where: str = "the grouping") -> None:
    """Check that every layer is in exactly one group.

    Raises:
        InputRefused: naming the first layer that is double, missing or unknown, and its groups.
    """
    listed = [list(group) for group in groups]
    for number, layers in enumerate(listed):
        for layer in layers:
            if type(layer) is not int or not 0 <= layer < num_layers:
                raise _refused(where, f"group {number} holds layer {layer!r}, but the model has {num_layers} layers")
    members = [layer for layers in listed for layer in layers]
    for layer in range(num_layers):
        homes = [number for number, layers in enumerate(listed) for other in layers if other == layer]
        if len(homes) != 1:
            twice = f"layer {layer} is in group {' and in group '.join(map(str, homes))}"
            raise _refused(where, twice if homes else f"layer {layer} is in no group")
    if len(members) != num_layers:
        raise AssertionError("each layer was seen once")


def model_shape(model: str) -> ModelShape:
    """Name, configuration hash and shape of a checkpoint folder or hub name, from its configuration alone.

    Raises:
        InputRefused: there is no configuration that transformers can read, or it is no model with keys and values
            per head.
    """
    from transformers import AutoConfig
    from transformers.utils import cached_file

    from jettison.plugins.kvtuner.hf_cache import layer_windows

    try:
        config = AutoConfig.from_pretrained(model)
        raw = Path(str(cached_file(model, "config.json"))).read_bytes()
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputRefused(f"{model} has no readable configuration ({reason})", do="give a checkpoint") from error
    text = config.get_text_config(decoder=True)
    architectures = json.loads(raw).get("architectures") or [None]
    return ModelShape(
        name=Path(model).resolve().name if Path(model).is_dir() else model,
        architecture=architectures[0],
        config_sha256=hashlib.sha256(raw).hexdigest(),
        num_layers=len(layer_windows(config)),
        num_kv_heads=text.num_key_value_heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
    )


def to_table(preset: Preset, shape: ModelShape, *, rotate: bool = False) -> Table:
    """Wrap a preset as a table of the model.

    A per-channel preset becomes a table of the codec `kivi`, which the Hugging Face cache reads and engines refuse.
    `rotate` adds the engines' Hadamard rotation to a per-token one; the published tables were searched without.

    Raises:
        InputRefused: the model has another number of layers.
        ConfigError: a rotation of per-channel keys.
    """
    if len(preset.pairs) != shape.num_layers:
        raise InputRefused(
            f"the preset {preset.name!r} is for {len(preset.pairs)} layers, {shape.name} has {shape.num_layers}",
            do="give the model that the preset was made for",
        )
    channel = preset.mode == "per-channel"
    if channel and rotate:
        raise ConfigError("per-channel keys cannot be rotated", do="leave --rotate out")
    layers = [LayerBits(layer=n, key_bits=k, value_bits=v) for n, (k, v) in enumerate(preset.pairs)]  # type: ignore[arg-type]
    sizes: dict[str, Any] = {"codec": "kivi", "group_size": KIVI_SIZE, "residual": KIVI_SIZE} if channel else {}
    payload = Payload(layers=layers, rotate=rotate, sink_tokens=0, key_center=None, key_scale=None, **sizes)
    content = {
        "schema": 1,
        "kind": "kvtuner.table",
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "jettison": __version__,
        "model": shape,
        "payload": payload,
    }
    draft = seal({**content, "source": _source(preset, 1.0)})
    if draft.sizes is None:
        raise AssertionError("a sealed table has its sizes")
    return seal({**content, "source": _source(preset, 4 * shape.elements / draft.sizes.bytes_per_token)})


def _source(preset: Preset, ratio: float) -> Source:
    return Source(
        method=f"{METHOD}, {preset.mode}",
        data=preset.name[:256],
        data_sha256=preset.sha256,
        tokens=0,
        seed=0,
        capacity_ratio=round(ratio, 6),
        block_size=_BLOCK,
    )


def _layer(node: yaml.Node, where: str) -> int:
    plain = isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN
    if not plain or not _NUMBER.fullmatch(node.value):
        shown = repr(node.value[:32]) if isinstance(node, yaml.ScalarNode) else "no number"
        raise _refused(where, f"line {_line(node)} has {shown} where a layer's number should be")
    return int(node.value)


def _pair(layer: int, node: yaml.Node, where: str) -> Pair:
    if not isinstance(node, yaml.MappingNode):
        raise _refused(where, f"layer {layer} (line {_line(node)}) is no mapping of nbits_key and nbits_value")
    found: dict[str, int] = {}
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else None
        if isinstance(name, str) and _NUMBER.fullmatch(name):
            raise _refused(where, f"layer {layer} has bits per KV head (line {_line(key)}); one pair per layer is read")
        if name not in _SIDES:
            shown = repr(str(name)[:32])
            raise _refused(where, f"layer {layer} has the unknown key {shown} (line {_line(key)})")
        if name in found:
            raise _refused(where, f"layer {layer} has {name} twice (line {_line(key)})")
        found[name] = _bits(layer, name, value, where)
    for name in _SIDES:
        if name not in found:
            raise _refused(where, f"layer {layer} (line {_line(node)}) has no {name}")
    return found["nbits_key"], found["nbits_value"]


def _bits(layer: int, name: str, node: yaml.Node, where: str) -> int:
    plain = isinstance(node, yaml.ScalarNode) and node.tag == _PLAIN[0]
    if not plain or not _NUMBER.fullmatch(node.value) or int(node.value) not in SUPPORTED_BITS:
        shown = repr(node.value[:32]) if isinstance(node, yaml.ScalarNode) else "a collection"
        allowed = ", ".join(map(str, SUPPORTED_BITS))
        raise _refused(where, f"{name} of layer {layer} (line {_line(node)}) is {shown}; allowed are {allowed}")
    return int(node.value)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _refused(where: str, what: str) -> InputRefused:
    return InputRefused(f"{where} is refused: {what}", do="correct it or measure a table of your own")
