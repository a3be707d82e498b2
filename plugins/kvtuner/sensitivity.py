"""How much each layer loses at each (key codec, value codec): calibration text forward, then forward and backward.

With g the gradient of the log-probability of a token sampled from the model's own prediction, with respect to a layer's
attention output, a change d of that output costs 1/2 E[(g.d)^2] nats of KL divergence to second order (the Fisher form
of the KL); g.d is summed over the channels and heads of a token, and tokens are taken as independent. The paper's
metrics (section 3.2), and the norm ratio of the outputs, are computed beside it (`metrics`). No error is propagated
between layers: each sees exact inputs.

Codec statistics come from the forward pass, per KV head and channel: the centre is the mean key, the equalisation is
(std(key) / rms(query))^0.5. With the rotation, quantisation noise is spread evenly over the equalised channels, so
the score error is sum(q^2 s^2) * sum((k - c)^2 / s^2), which that choice of s minimises. (Weighting tokens by their
share of the predicted KL gained another 3 to 8 % on SmolLM2's 4-bit keys for half a minute more; not worth it.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from jettison.hooks.errors import InputRefused
from jettison.hooks.files import write_atomically
from jettison.plugins.kvtuner.codec_kinds import Native, PerToken
from jettison.plugins.kvtuner.codecs import Codec
from jettison.plugins.kvtuner.metrics import Disagreement, LayerErrors, LayerMeter, disagreements, warning
from jettison.plugins.kvtuner.stream import LayerShape, Seen, backward, forward, layer_shapes
from jettison.plugins.kvtuner.table import Pair

BITS = (16, 8, 4, 2)
PAIRS: tuple[Pair, ...] = tuple((key, value) for key in BITS for value in BITS)
Progress = Callable[[str, int, int], None]
"""(what, done, total)."""

SINKS = 4
"""First tokens of each text that the key statistics leave out: attention sinks have keys unlike all others."""


@dataclass(frozen=True)
class Sensitivity:
    """Measured on `tokens` tokens. With I key and J value codecs, column i * J + j is pair (i, j): `PAIRS` by default.

    Attributes:
        kl: predicted mean KL divergence in nats per token when this layer alone is stored so, [L, I * J].
        output_error: the paper's e_o, mean |o - o'| / |o|, [L, I * J].
        output_norm_ratio: ||o - o'|| / ||o||, mean over query heads, [L, I * J].
        key_center, key_scale: float32 [L, Hkv, D], rounded to what float16 holds.
        tokens: calibration tokens.
        key_error, attention_error: e_k and e_a, [L, I].
        value_error: e_v, [L, J].
        windows: visible tokens of each layer, -1 for all.
        keys, values: names of the codecs.
    """

    kl: Tensor
    output_error: Tensor
    output_norm_ratio: Tensor
    key_center: Tensor
    key_scale: Tensor
    tokens: int
    key_error: Tensor
    attention_error: Tensor
    value_error: Tensor
    windows: tuple[int, ...]
    keys: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def options(self) -> list[str]:
        """Names of the columns, e.g. `int8-hadamard/int4-hadamard`."""
        return [f"{key}/{value}" for key in self.keys for value in self.values]

    def disagreements(self) -> list[Disagreement]:
        """Where the paper's e_o ranks the layers unlike the norm ratio."""
        return disagreements(self.output_error, self.output_norm_ratio, self.options)

    @property
    def warning(self) -> str | None:
        """One sentence about `disagreements`, None if there are none."""
        return warning(self.disagreements())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as safetensors, atomically."""
        from safetensors.torch import save

        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        rest = {name: value for name, value in tensors.items() if not isinstance(value, Tensor)}
        content = {name: value.contiguous() for name, value in tensors.items() if isinstance(value, Tensor)}
        write_atomically(path, save(content, {"kvtuner.sensitivity": json.dumps({"schema": 1, **rest})}))


def load_sensitivity(path: str | os.PathLike[str]) -> Sensitivity:
    """Read what `Sensitivity.save` wrote.

    Raises:
        InputRefused: unreadable, or not of this schema.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            rest = json.loads((file.metadata() or {})["kvtuner.sensitivity"])
            if rest.pop("schema") != 1:
                raise ValueError("another schema")
            parts: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            parts |= {name: tuple(rest.pop(name)) for name in ("windows", "keys", "values")}
            found = Sensitivity(**rest, **parts)
            _check_shapes(found)
            return found
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputRefused(
            f"{os.fspath(path)} holds no sensitivities ({type(error).__name__}: {error})", do="measure them again"
        ) from error


def _check_shapes(found: Sensitivity) -> None:
    layers, options = len(found.windows), len(found.options)
    expected = {
        "kl": (layers, options),
        "output_error": (layers, options),
        "output_norm_ratio": (layers, options),
        "key_error": (layers, len(found.keys)),
        "attention_error": (layers, len(found.keys)),
        "value_error": (layers, len(found.values)),
        "key_center": (layers, *found.key_center.shape[1:]),
        "key_scale": tuple(found.key_center.shape),
    }
    for name, shape in expected.items():
        tensor = getattr(found, name)
        if tuple(tensor.shape) != shape or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is not finite {list(shape)}")


def default_codecs(*, rotate: bool) -> tuple[Codec, ...]:
    """What the engines' pages hold: 16, 8, 4 and 2 bits per token, in the order of `BITS`."""
    return (Native(), *(PerToken(bits, rotate) for bits in BITS[1:]))


def measure(
    model: Any,
    texts: Sequence[Tensor],
    *,
    sink_tokens: int = 1,
    rotate: bool = True,
    seed: int = 0,
    keys: Sequence[Codec] | None = None,
    values: Sequence[Codec] | None = None,
    gradients: bool = True,
    progress: Progress = lambda _what, _done, _total: None,
) -> Sensitivity:
    """Measure `model`, a Hugging Face causal LM in float32, on `texts`, each a 1-D tensor of token ids.

    Args:
        model: full or sliding-window attention with keys and values of one shape in all layers.
        texts: at least one, each of more than `SINKS` tokens.
        sink_tokens: first tokens of a text kept at 16 bits.
        rotate: of the default codecs.
        seed: of the sampled tokens.
        keys, values: codecs to try; default: 16, 8, 4 and 2 bits per token, in the order of `BITS`.
        gradients: predict the KL; without, half the time and only the paper's metrics.
        progress: called with (what, done, total).

    Memory beside the weights: one decoder layer's activations, and hidden states of all layers, of one text.

    Raises:
        InputRefused: a model that cannot be measured, or no text.
    """
    default = default_codecs(rotate=rotate)
    found = measure_sinks(
        model,
        texts,
        (sink_tokens,),
        keys=keys or default,
        values=values or default,
        seed=seed,
        gradients=gradients,
        progress=progress,
    )
    return found[sink_tokens]


def measure_sinks(
    model: Any,
    texts: Sequence[Tensor],
    sinks: Sequence[int],
    *,
    keys: Sequence[Codec],
    values: Sequence[Codec],
    seed: int = 0,
    gradients: bool = True,
    progress: Progress = lambda _what, _done, _total: None,
) -> dict[int, Sensitivity]:
    """`measure` at several numbers of sink tokens with the passes through the model of one; the figures are the same.

    Raises:
        InputRefused: a model that cannot be measured, or no text.
    """
    if not texts or min(len(ids) for ids in texts) <= SINKS:
        raise InputRefused(f"{len(texts)} texts", allowed=f"at least one is needed, each of more than {SINKS} tokens")
    shapes = layer_shapes(model)
    statistics = [KeyStatistics() for _ in shapes]
    for number, ids in enumerate(texts):
        progress("key statistics", number, len(texts))
        forward(model, ids, lambda layer, seen: statistics[layer].add(seen))
    channels = [own.result() for own in statistics]
    meters = {sink: [LayerMeter(keys, values, *own, sink) for own in channels] for sink in sinks}
    per_layer = list(zip(*meters.values(), strict=True))
    _run(model, texts, per_layer, torch.Generator().manual_seed(seed), gradients=gradients, progress=progress)
    return {
        sink: _collect([meter.result() for meter in own], channels, shapes, texts, keys, values)
        for sink, own in meters.items()
    }


def _run(
    model: Any,
    texts: Sequence[Tensor],
    meters: Sequence[Sequence[LayerMeter]],
    generator: torch.Generator,
    *,
    gradients: bool,
    progress: Progress,
) -> None:
    done, total = 0, len(texts) * len(meters)

    def visit(layer: int, seen: Seen) -> None:
        nonlocal done
        for meter in meters[layer]:
            meter.add(seen)
        done += 1
        progress("pairs per layer", done, total)

    for ids in texts:
        if gradients:
            backward(model, ids, generator, visit)
        else:
            forward(model, ids, visit)


def _collect(
    errors: Sequence[LayerErrors],
    channels: Sequence[tuple[Tensor, Tensor]],
    shapes: Sequence[LayerShape],
    texts: Sequence[Tensor],
    keys: Sequence[Codec],
    values: Sequence[Codec],
) -> Sensitivity:
    centers, scales = zip(*channels, strict=True)
    return Sensitivity(
        kl=torch.stack([own.kl.flatten() for own in errors]),
        output_error=torch.stack([own.output.flatten() for own in errors]),
        output_norm_ratio=torch.stack([own.norm_ratio.flatten() for own in errors]),
        key_center=torch.stack(centers).cpu(),
        key_scale=torch.stack(scales).cpu(),
        tokens=sum(len(ids) for ids in texts),
        key_error=torch.stack([own.key for own in errors]),
        attention_error=torch.stack([own.attention for own in errors]),
        value_error=torch.stack([own.value for own in errors]),
        windows=tuple(shape.window for shape in shapes),
        keys=tuple(codec.name for codec in keys),
        values=tuple(codec.name for codec in values),
    )


class KeyStatistics:
    """Centre and equalisation of one layer's keys, summed text by text in float64."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, seen: Seen) -> None:
        """Add one text, without its first `SINKS` keys."""
        key = seen.key[0, :, SINKS:].double()
        query = seen.query[0].double().unflatten(0, (key.shape[0], -1))
        counts = torch.tensor([key.shape[1], query.shape[1] * query.shape[2]], dtype=torch.float64, device=key.device)
        sums = [key.sum(1), key.square().sum(1), query.square().sum((1, 2)), counts]
        self._sums = [old + new for old, new in zip(self._sums, sums, strict=True)] if self._sums else sums

    def result(self) -> tuple[Tensor, Tensor]:
        """Return centre and equalisation, each [Hkv, D], equalisation of mean 1, both float16 values in float32."""
        total, squares, queries, counts = self._sums
        keys, rows = counts.tolist()
        center = total / keys
        spread = ((squares - keys * center.square()) / max(keys - 1, 1)).clamp_min(0).sqrt()
        scale = (_floored(spread) / _floored((queries / rows).sqrt())).sqrt()
        return center.half().float(), (scale / scale.mean(-1, keepdim=True)).half().float()


def _floored(x: Tensor) -> Tensor:
    """`x` with a floor of 1e-3 of its mean over channels: a dead channel must give neither zero nor infinity."""
    return x.clamp_min(1e-3 * x.mean(-1, keepdim=True)).clamp_min(1e-12)
