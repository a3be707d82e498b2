"""Saving and resuming: bit for bit in the middle of an interval, safe with weights that the state does not cover."""

import pytest
import torch
from torch import nn

from jettison.hooks.errors import InputRefused
from jettison.plugins.moss.config import MossOptions
from jettison.plugins.moss.convert import convert
from jettison.plugins.moss.scaling import WeightScales


def training(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    convert(model, MossOptions(min_features=1, recalibrate_steps=7))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.999))
    scales = WeightScales(model)
    scales.attach(optimizer)
    return model, optimizer, scales


def train(model, optimizer, first, last):
    losses = []
    for number in range(first, last):
        x = torch.randn(48, 32, generator=torch.Generator().manual_seed(number))
        loss = (model(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save(path, model, optimizer, scales):
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scales": scales.state_dict()}
    torch.save(content, path)


@pytest.mark.parametrize("at", [1, 10, 14])
def test_d_resuming_gives_the_same_losses_bit_for_bit(at, tmp_path):
    model, optimizer, scales = training()
    train(model, optimizer, 0, at)
    save(tmp_path / "state.pt", model, optimizer, scales)
    expected = train(model, optimizer, at, 30)

    other, other_optimizer, other_scales = training(seed=5)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optimizer"])
    other_scales.load_state_dict(state["scales"])
    assert train(other, other_optimizer, at, 30) == expected
    assert torch.equal(other_scales.predicted, scales.predicted)
    assert torch.equal(other_scales.measured_at, scales.measured_at)


def test_without_the_saved_scales_training_goes_on_unclipped():
    model, optimizer, _ = training()
    train(model, optimizer, 0, 10)
    other, other_optimizer, other_scales = training(seed=5)
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    assert other_scales.attached[0].steps is None, "the age of the moments is not known"
    train(other, other_optimizer, 10, 60)
    assert (other_scales.clipped, other_scales.report()["broken_predictions"]) == (0, 0)


def test_a_state_below_the_weights_is_measured_again():
    model, _, scales = training()
    state = scales.state_dict()
    state["autoscale.0.weight.amax_pred"] *= 0.5
    scales.load_state_dict(state)
    assert scales.predicted[0] == model[0].weight.abs().max()
    assert scales.report()["events"]["below its weight when loaded"] == 1


def test_names_of_the_state_are_those_of_the_parameters():
    _, _, scales = training()
    assert set(scales.state_dict()) == {
        "autoscale.steps",
        "autoscale.optimizer.0.steps",
        *(f"autoscale.{i}.weight.{field}" for i in (0, 2) for field in ("amax_pred", "amax_meas", "step_meas")),
    }


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("autoscale.0.weight.amax_pred"), r"lack 'autoscale\.0\.weight\.amax_pred'"),
        (lambda s: s.update({"autoscale.9.weight.amax_pred": torch.ones(1)}), "have 'autoscale.9"),
        (lambda s: s.update({"autoscale.0.weight.amax_pred": torch.tensor([float("nan")])}), "nan"),
        (lambda s: s.update({"autoscale.0.weight.amax_pred": torch.tensor([-1.0])}), "0 or more"),
        (lambda s: s.update({"autoscale.steps": torch.tensor([-1])}), "0 or more"),
        (lambda s: s.update({"autoscale.0.weight.amax_pred": torch.ones(2)}), "0 or more"),
    ],
)
def test_a_wrong_state_is_refused_and_changes_nothing(change, match):
    _, _, scales = training()
    before = {name: value.clone() for name, value in scales.state_dict().items()}
    state = scales.state_dict()
    change(state)
    with pytest.raises(InputRefused, match=match):
        scales.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in scales.state_dict().items())
