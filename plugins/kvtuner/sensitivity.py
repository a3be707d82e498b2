"""How much each layer loses at each (key bits, value bits): one forward and one backward pass over calibration text.

With g the gradient of the log-probability of a token sampled from the model's own prediction, with respect to a layer's
attention output, a change d of that output costs 1/2 E[(g.d)^2] nats of KL divergence to second order (the Fisher form
of the KL); g.d is summed over the channels and heads of a token, and tokens are taken as independent. The paper's
metric e_o (section 3.2), and its norm ratio, are computed beside it. No error is propagated between layers: each sees
exact inputs.

Codec statistics come from the same pass, per KV head and channel: the centre is the mean key, the equalisation is
(std(key) / rms(query))^0.5. With the rotation, quantisation noise is spread evenly over the equalised channels, so
the score error is sum(q^2 s^2) * sum((k - c)^2 / s^2), which that choice of s minimises. (Weighting tokens by their
share of the predicted KL gained another 3 to 8 % on SmolLM2's 4-bit keys for half a minute more; not worth it.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jettison.plugins.kvtuner.capture import causal_attention, intercept
from jettison.plugins.kvtuner.codec import store_keys, store_values
from jettison.plugins.kvtuner.table import Pair

BITS = (16, 8, 4, 2)
PAIRS: tuple[Pair, ...] = tuple((key, value) for key in BITS for value in BITS)
Progress = Callable[[str, int, int], None]
"""(what, done, total)."""

SINKS = 4
"""First tokens of each text that the key statistics leave out."""


@dataclass(frozen=True)
class Sensitivity:
    """Measured on `tokens` tokens; the columns of the three tables are `PAIRS`.

    Attributes:
        kl: predicted mean KL divergence in nats per token when this layer alone is stored so, [L, 16].
        output_error: the paper's e_o, mean |o - o'| / |o|, [L, 16].
        output_norm_ratio: ||o - o'|| / ||o||, [L, 16].
        key_center, key_scale: float32 [L, Hkv, D], rounded to what float16 holds.
        tokens: calibration tokens.
    """

    kl: Tensor
    output_error: Tensor
    output_norm_ratio: Tensor
    key_center: Tensor
    key_scale: Tensor
    tokens: int


@dataclass(frozen=True)
class Captured:
    """One text through one layer: query, output and gradient [1, Hq, T, D], key and value [1, Hkv, T, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    gradient: Tensor
    scale: float
    window: int


def measure(
    model: Any,
    texts: Sequence[Tensor],
    *,
    sink_tokens: int = 1,
    rotate: bool = True,
    seed: int = 0,
    progress: Progress = lambda _what, _done, _total: None,
) -> Sensitivity:
    """Measure `model`, a Hugging Face causal LM in float32, on `texts`, each a 1-D tensor of token ids.

    Keeps queries, keys, values, outputs and gradients of all layers: (3 Hq + 2 Hkv) * D * 4 bytes per token and layer.
    """
    generator = torch.Generator().manual_seed(seed)
    captured: list[list[Captured]] = []
    for number, ids in enumerate(texts):
        progress("forward and backward", number, len(texts))
        captured.append(capture(model, ids, generator))
    layers = [[text[layer] for text in captured] for layer in range(len(captured[0]))]
    rows, centers, scales = [], [], []
    for number, layer in enumerate(layers):
        progress("pairs per layer", number, len(layers))
        center, scale = key_statistics(layer)
        rows.append(layer_errors(layer, center, scale, rotate=rotate, sink_tokens=sink_tokens))
        centers.append(center)
        scales.append(scale)
    kl, error, ratio = torch.stack(rows).unbind(1)
    return Sensitivity(kl, error, ratio, torch.stack(centers), torch.stack(scales), sum(len(ids) for ids in texts))


def capture(model: Any, ids: Tensor, generator: torch.Generator) -> list[Captured]:
    """Run one text forward and backward and return what every layer's attention saw, in layer order."""
    seen: dict[int, tuple[Tensor, Tensor, Tensor, Tensor, float, int]] = {}

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
        output = causal_attention(query, key, value, scale, window)
        output.retain_grad()
        seen[layer] = (query.detach(), key.detach(), value.detach(), output, scale, window)
        return output

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        embedded = model.get_input_embeddings()(ids[None].to(model.device)).requires_grad_()
        with torch.enable_grad(), intercept(model, attend):
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
            chances = torch.log_softmax(logits.float(), -1)
            sampled = _sample(chances.detach(), generator)
            chances.gather(1, sampled).sum().backward()
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    return [
        Captured(q, k, v, output.detach(), _gradient(output), scale, window)
        for _, (q, k, v, output, scale, window) in sorted(seen.items())
    ]


def key_statistics(layer: Sequence[Captured]) -> tuple[Tensor, Tensor]:
    """Centre and equalisation of one layer's keys, each [Hkv, D], equalisation of mean 1, both float16 values.

    The first tokens of each text are left out: attention sinks have keys unlike all others.
    """
    key = torch.cat([text.key[0, :, SINKS:] for text in layer], 1).float()
    query = torch.cat([text.query[0] for text in layer], 1).float()
    demand = query.unflatten(0, (key.shape[0], -1)).square().mean((1, 2)).sqrt()
    scale = (_floored(key.std(1)) / _floored(demand)).sqrt()
    return key.mean(1).half().float(), (scale / scale.mean(-1, keepdim=True)).half().float()


def _floored(x: Tensor) -> Tensor:
    """`x` with a floor of 1e-3 of its mean over channels: a dead channel must give neither zero nor infinity."""
    return x.clamp_min(1e-3 * x.mean(-1, keepdim=True)).clamp_min(1e-12)


def layer_errors(layer: Sequence[Captured], center: Tensor, scale: Tensor, *, rotate: bool, sink_tokens: int) -> Tensor:
    """Predicted KL, e_o and norm ratio of one layer, [3, 16] over `PAIRS`.

    The change of the output is that of the keys plus that of the values, the product of both being neglected, so each
    bit width is attended to once: 6 passes for 16 pairs.
    """
    sums = torch.zeros(4, len(PAIRS), dtype=torch.float64)
    elements = 0
    for text in layer:
        changes = _changes(text, center, scale, rotate=rotate, sink_tokens=sink_tokens)
        output = text.output.float()
        for column, (key_bits, value_bits) in enumerate(PAIRS):
            change = changes["key", key_bits] + changes["value", value_bits]
            sums[0, column] += 0.5 * (text.gradient.float() * change).sum((0, 1, 3)).pow(2).sum().item()
            sums[1, column] += output_error(output, change).sum().item()
            sums[2, column] += change.pow(2).sum().item()
        sums[3] += output.pow(2).sum().item()
        elements += output.numel()
    tokens = sum(text.query.shape[2] for text in layer)
    return torch.stack((sums[0] / tokens, sums[1] / elements, (sums[2] / sums[3]).sqrt()))


def output_error(output: Tensor, change: Tensor) -> Tensor:
    """The paper's elementwise relative error |change| / |output|, guarded at 1e-8; e_o is its mean."""
    return change.abs() / output.abs().clamp_min(1e-8)


def _changes(
    text: Captured, center: Tensor, scale: Tensor, *, rotate: bool, sink_tokens: int
) -> dict[tuple[str, int], Tensor]:
    exact = text.output.float()
    zero = torch.zeros_like(exact)
    changes = {("key", 16): zero, ("value", 16): zero}
    query, key, value = text.query.float(), text.key.float(), text.value.float()
    for bits in BITS[1:]:
        stored = store_keys(key, bits, rotate=rotate, sink_tokens=sink_tokens, center=center, scale=scale)
        changes["key", bits] = causal_attention(query, stored, value, text.scale, text.window) - exact
        stored = store_values(value, bits, rotate=rotate, sink_tokens=sink_tokens)
        changes["value", bits] = causal_attention(query, key, stored, text.scale, text.window) - exact
    return changes


def _sample(chances: Tensor, generator: torch.Generator) -> Tensor:
    """One token per position, [T, 1], from log-probabilities [T, vocabulary]."""
    total = chances.exp().cumsum(-1)
    at = torch.rand(len(chances), 1, generator=generator).to(chances.device) * total[:, -1:]
    return torch.searchsorted(total, at).clamp_max(chances.shape[-1] - 1)


def _gradient(output: Tensor) -> Tensor:
    if output.grad is None:
        raise AssertionError("every attention output is part of the graph")
    return output.grad
