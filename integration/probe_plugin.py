"""A plugin for tests: KV formats layer by layer, and request policies that obey, fail or attack on demand.

`options.kv` is a list of `[key_bits, value_bits]` or null, taken in turn by the layers. A request picks its policy with
`extra_args={"probe": {...}}`.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

from jettison.hooks import AttentionLayer, KVFormat, PluginOptions, Request, hookimpl


class ProbeOptions(PluginOptions):
    kv: list[list[int] | None] | None = None
    rotate: bool = False
    sink_tokens: int = 0
    center: list[list[float]] | None = None
    scale: list[list[float]] | None = None
    policies: bool = False
    fail_on_layer: int | None = None
    formats_for: str = "all"


@hookimpl
def options() -> type[ProbeOptions]:
    return ProbeOptions


@hookimpl
def activate(options: ProbeOptions) -> object:
    members: dict[str, Any] = {}
    if options.kv is not None:
        members["kv_cache_format"] = hookimpl(lambda layer: _format(options, layer))
    if options.policies:
        members["request_policy"] = hookimpl(lambda request: _policy(request))  # noqa: PLW0108  marks no function of the module
    return types.SimpleNamespace(**members)


def _format(options: ProbeOptions, layer: AttentionLayer) -> KVFormat | None:
    if options.fail_on_layer == layer.index:
        raise RuntimeError("probe failed as told")
    assert options.kv is not None
    bits = options.kv[layer.index % len(options.kv)]
    if bits is None:
        return None
    return KVFormat(
        bits[0],
        bits[1],
        rotate=options.rotate,
        sink_tokens=options.sink_tokens,
        key_center=options.center,
        key_scale=options.scale,
    )


def _policy(request: Request) -> object | None:
    order = request.params.get("probe")
    if order is None:
        return None
    if order.get("fail") == "admission":
        raise RuntimeError("probe failed at admission")
    if order.get("fail") == "shape":
        return object()
    return ProbePolicy(order, request)


class ProbePolicy:
    """Forces `order["ids"]` once `order["at"]` tokens are out; `order["fail"]` names a way to misbehave there."""

    def __init__(self, order: Mapping[str, Any], request: Request) -> None:
        self.order, self.request = order, request

    def next_tokens(self, output_token_ids: Sequence[int]) -> Sequence[int] | None:
        if len(output_token_ids) != self.order.get("at", 0):
            return None
        fail = self.order.get("fail")
        if fail is None:
            return list(self.order["ids"])
        return _MISDEEDS[fail](self, output_token_ids)


def _raise(policy: ProbePolicy, output: Sequence[int]) -> Any:
    raise KeyError("probe")


def _recurse(policy: ProbePolicy, output: Sequence[int]) -> Any:
    return _recurse(policy, output)


def _mutate(policy: ProbePolicy, output: Sequence[int]) -> Any:
    output.clear()  # type: ignore[attr-defined]


_MISDEEDS = {
    "raise": _raise,
    "recurse": _recurse,
    "mutate": _mutate,
    "out_of_range": lambda policy, output: [policy.request.vocab_size],
    "negative": lambda policy, output: [-1],
    "huge": lambda policy, output: [2**80],
    "float": lambda policy, output: [1.5],
    "text": lambda policy, output: "123",
    "generator": lambda policy, output: (i for i in range(3)),
    "long": lambda policy, output: range(10**9),
}
