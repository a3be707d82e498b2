"""Turn the linear layers of a model into FP8 ones, and back. Parameters stay the same objects."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from jettison.hooks.errors import ConfigError
from jettison.plugins.moss.config import MossOptions
from jettison.plugins.moss.linear import MossLinear
from jettison.plugins.moss.weight import WeightCodes

Filter = Callable[[str, nn.Linear], bool]


def convert(model: nn.Module, options: MossOptions | None = None, only: Filter | None = None) -> list[str]:
    """Turn linear layers into :class:`MossLinear`, in place.

    Layers keep their identity, parameters, hooks and names, so an optimizer made before stays valid and a checkpoint
    fits the model before and after. Subclasses of `nn.Linear` (adapters, quantised layers) are left alone.

    Args:
        model: any module; may itself be an `nn.Linear`.
        options: defaults if None.
        only: called with a layer's name and the layer; returns whether to convert it. Comes after `skip` and
            `min_features`.

    Returns:
        names of the converted layers, in the model's order.

    Raises:
        ConfigError: no layer is left to convert.
    """
    options = options or MossOptions()
    chosen = [(name, layer) for name, layer in _layers(model, nn.Linear) if _wanted(name, layer, options, only)]
    if not chosen:
        sizes = [min(layer.weight.shape) for _, layer in _layers(model, nn.Linear)]
        raise ConfigError(
            f"no linear layer to convert: the model has {len(sizes)}, the smaller side of the largest is "
            f"{max(sizes, default=0)}",
            allowed=f"'min_features' is {options.min_features}, 'skip' is {', '.join(options.skip) or 'empty'}",
            do="lower 'min_features' or skip less",
        )
    shared: dict[int, WeightCodes] = {}
    for _, layer in chosen:
        layer.__class__ = MossLinear
        layer.options = options
        layer.codes = shared.setdefault(id(layer.weight), WeightCodes())
    return [name for name, _ in chosen]


def revert(model: nn.Module) -> list[str]:
    """Turn every :class:`MossLinear` of a model back into `nn.Linear`, in place; returns their names.

    Raises:
        ConfigError: a :class:`~jettison.plugins.moss.scaling.WeightScales` still manages one.
    """
    layers = _layers(model, MossLinear)
    for name, layer in layers:
        if layer.codes.managed:
            raise ConfigError(f"the scale of {name!r} is still managed", do="call remove() of its WeightScales first")
    for _, layer in layers:
        del layer.options, layer.codes
        layer.__class__ = nn.Linear
    return [name for name, _ in layers]


def _layers(model: nn.Module, kind: type) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if type(module) is kind]


def _wanted(name: str, layer: nn.Linear, options: MossOptions, only: Filter | None) -> bool:
    if set(name.split(".")) & set(options.skip) or min(layer.weight.shape) < options.min_features:
        return False
    return only is None or only(name, layer)
