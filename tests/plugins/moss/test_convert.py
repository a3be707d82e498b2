"""Converting and reverting: same parameters, same names, nothing left behind."""

import copy
import pickle

import pytest
import torch
from torch import nn

from jettison.hooks.errors import ConfigError, EnvironmentRefused
from jettison.plugins import moss
from jettison.plugins.moss.config import MossOptions
from jettison.plugins.moss.convert import convert, revert
from jettison.plugins.moss.linear import MossLinear
from jettison.plugins.moss.scaling import WeightScales


class Adapter(nn.Linear):
    """Somebody else's subclass."""


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(32, 32)
        self.layers = nn.ModuleList(
            [nn.Linear(32, 64), nn.Linear(64, 32, bias=False), Adapter(32, 32), nn.Linear(32, 8)]
        )
        self.lm_head = nn.Linear(32, 32, bias=False)
        self.tied = nn.Linear(32, 64)
        self.tied.weight = self.layers[0].weight


OPTIONS = MossOptions(min_features=16)


def test_what_is_converted():
    model = Model()
    assert convert(model, OPTIONS) == ["layers.0", "layers.1", "tied"]
    assert [type(x) for x in model.layers] == [MossLinear, MossLinear, Adapter, nn.Linear]
    assert convert(Model(), OPTIONS, only=lambda name, layer: layer.bias is None) == ["layers.1"]
    assert convert(nn.Linear(16, 16), OPTIONS) == [""]
    assert "backend=block" in repr(model.layers[0])


def test_round_trip_leaves_nothing_behind():
    model = Model()
    called = []
    model.layers[0].register_forward_hook(lambda *_: called.append(1))
    before = {name: (id(m), type(m), set(vars(m))) for name, m in model.named_modules()}
    parameters, state = [id(p) for p in model.parameters()], list(model.state_dict())
    convert(model, OPTIONS)
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.state_dict()) == state
    model.layers[0](torch.ones(2, 32))
    assert called, "a hook was lost"
    assert revert(model) == ["layers.0", "layers.1", "tied"]
    assert {name: (id(m), type(m), set(vars(m))) for name, m in model.named_modules()} == before


def test_tied_weights_share_one_copy():
    model = Model()
    convert(model, OPTIONS)
    scales = WeightScales(model)
    assert model.tied.codes is model.layers[0].codes
    assert scales.names == ["layers.0.weight", "layers.1.weight"]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_on_its_own(copier):
    model = Model()
    convert(model, OPTIONS)
    WeightScales(model)
    other = copier(model)
    assert other.tied.codes is other.layers[0].codes is not model.layers[0].codes
    assert not other.layers[0].codes.managed
    x = torch.randn(4, 32)
    with torch.no_grad():
        other.layers[0].weight.mul_(3)
        torch.testing.assert_close(
            other.layers[0](x) - other.layers[0].bias,
            3 * (model.layers[0](x) - model.layers[0].bias),
            rtol=0.2,
            atol=0.2,
        )


def test_refusals():
    with pytest.raises(ConfigError, match=r"has 5, the smaller side of the largest is 32.*1024"):
        convert(Model())
    model = Model()
    convert(model, OPTIONS)
    scales = WeightScales(model)
    with pytest.raises(ConfigError, match=r"'layers\.0' is still managed"):
        revert(model)
    with pytest.raises(ConfigError, match="another WeightScales"):
        WeightScales(model)
    scales.remove()
    revert(model)
    with pytest.raises(ConfigError, match="no MossLinear"):
        WeightScales(model)
    with pytest.raises(ValueError, match="'group' has no meaning"):
        MossOptions(backend="tensor", group=32)
    with pytest.raises(EnvironmentRefused, match="does not serve"):
        moss.activate(OPTIONS)
    assert moss.options() is MossOptions
