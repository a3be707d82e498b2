"""Run a text through a model and meet its layers one at a time, so that 8k tokens fit beside the weights.

Forward: what a layer's attention sees is handed over and dropped. Backward: every decoder layer is recomputed when its
gradient is due (activation checkpointing), and logits exist for `ROWS` positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jettison.hooks.errors import InputRefused
from jettison.plugins.kvtuner.capture import Rule, intercept

ROWS = 256
"""Positions whose logits exist at a time."""


@dataclass(frozen=True)
class Seen:
    """One text through one layer.

    Attributes:
        query: [1, Hq, T, D]. key, value: [1, Hkv, T, D], after RoPE.
        rule: how the layer attends.
        gradient: [1, Hq, T, D], of the sampled tokens' log-probability with respect to the attention output; None when
            the text was run forward only.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rule: Rule
    gradient: Tensor | None = None


Visit = Callable[[int, Seen], None]
"""(layer, what it saw)."""


@dataclass(frozen=True)
class LayerShape:
    """What a layer caches: `heads` query heads over `kv_heads` of `size` channels, `window` visible tokens or -1."""

    heads: int
    kv_heads: int
    size: int
    window: int


def layer_shapes(model: Any) -> list[LayerShape]:
    """Shape of every layer's cache, found by running two tokens.

    Raises:
        InputRefused: a layer has no key-value cache of its own, or layers differ in heads or head size.
    """
    found: dict[int, LayerShape] = {}

    def visit(layer: int, seen: Seen) -> None:
        heads, size = seen.query.shape[1], seen.key.shape[3]
        if layer in found:
            raise _refused(f"layer {layer} attends twice")
        found[layer] = LayerShape(heads, seen.key.shape[1], size, seen.rule.window)

    forward(model, torch.zeros(2, dtype=torch.long), visit)
    count = model.config.get_text_config().num_hidden_layers
    if missing := sorted(set(range(count)) - set(found)):
        raise _refused(f"layers {missing[:4]} of {count} have no key-value cache")
    if len({(shape.kv_heads, shape.size) for shape in found.values()}) != 1:
        raise _refused("layers differ in KV heads or head size")
    return [found[layer] for layer in range(count)]


def dimensions(model: Any) -> tuple[int, int, int]:
    """(layers, KV heads, head size) of a model's cache; errors as `layer_shapes`."""
    shapes = layer_shapes(model)
    return len(shapes), shapes[0].kv_heads, shapes[0].size


def _refused(found: str) -> InputRefused:
    return InputRefused(
        found,
        allowed="measured are models whose layers all cache keys and values of one shape",
        do="serve this model without a table",
    )


@torch.no_grad()
def forward(model: Any, ids: Tensor, visit: Visit) -> None:
    """Run the text `ids` [T] forward, without logits; `visit` is called once per layer, in order."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        visit(layer, Seen(query, key, value, rule))
        return rule.attend(query, key, value)

    with intercept(model, attend):
        model.base_model(input_ids=ids[None].to(model.device), use_cache=False)


def backward(model: Any, ids: Tensor, generator: torch.Generator, visit: Visit) -> None:
    """Run the text `ids` [T] forward and backward; `visit` is called once per layer, last layer first.

    The gradient is that of the summed log-probability of one token per position, sampled from the model's own
    prediction with `generator`.
    """

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        output = rule.attend(query, key, value)
        if output.requires_grad:
            # NOTES: under checkpointing only the recomputation needs a gradient, so nothing is held until then.
            seen = partial(Seen, query.detach(), key.detach(), value.detach(), rule)
            output.register_hook(lambda gradient: visit(layer, seen(gradient)))
        return output

    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(intercept(model, attend))
        stack.enter_context(_checkpointed(model))
        embedded = model.get_input_embeddings()(ids[None].to(model.device)).detach().requires_grad_()
        hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        hidden.backward(_hidden_gradient(model, hidden.detach(), generator))


def _hidden_gradient(model: Any, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the sampled tokens' log-probability with respect to the last hidden states [1, T, hidden]."""
    parts = []
    for rows in hidden.split(ROWS, 1):
        leaf = rows.clone().requires_grad_()
        chances = torch.log_softmax(head(model, leaf)[0].float(), -1)
        chances.gather(1, _sample(chances.detach(), generator)).sum().backward()
        parts.append(leaf.grad)
    return torch.cat(parts, 1)


def head(model: Any, hidden: Tensor) -> Tensor:
    """Logits [1, T, vocabulary] of last hidden states [1, T, hidden], with all that the model does after its trunk."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    base = model.base_model
    # NOTES: soft caps and scales of the logits are code of the outer forward; only the trunk is replaced.
    with _replaced(base, "forward", lambda *_args, **_kwargs: MoeModelOutputWithPast(last_hidden_state=hidden)):
        logits: Tensor = model(inputs_embeds=hidden, use_cache=False).logits
    return logits


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _checkpointed(model: Any) -> Iterator[None]:
    """Recompute decoder layers in the backward pass.

    transformers' own checkpointing needs training mode, which also turns dropout on.
    """

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return checkpoint(partial(original, **kwargs), hidden, *args, use_reentrant=True, preserve_rng_state=False)

        return run

    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.enter_context(_replaced(layer, "forward", wrap(layer.forward)))
        yield


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of `model` in order; empty if they are not one list of as many as the configuration says."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.base_model.modules() if isinstance(module, torch.nn.ModuleList)]
    found = [module for module in lists if len(module) == count and all(_attends(layer) for layer in module)]
    return list(found[0]) if len(found) == 1 else []


def _attends(layer: Any) -> bool:
    return any(hasattr(module, "layer_idx") and hasattr(module, "is_causal") for module in layer.modules())


@contextmanager
def _replaced(target: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Set an attribute of an instance that its class provides, and remove it again."""
    before = target.__dict__.get(name)
    setattr(target, name, replacement)
    try:
        yield
    finally:
        if before is None:
            delattr(target, name)
        else:
            setattr(target, name, before)


def _sample(chances: Tensor, generator: torch.Generator) -> Tensor:
    """One token per position, [T, 1], from log-probabilities [T, vocabulary]."""
    total = chances.exp().cumsum(-1)
    at = torch.rand(len(chances), 1, generator=generator).to(chances.device) * total[:, -1:]
    return torch.searchsorted(total, at).clamp_max(chances.shape[-1] - 1)
