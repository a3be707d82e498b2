"""Predicted weight scales: never broken in strict mode, noticed where they can be, refused where they cannot hold."""

import logging
import time

import pytest
import torch
from torch import nn

from jettison.csrc.fp8_format import scale_for
from jettison.hooks.errors import ConfigError
from jettison.plugins.moss.config import MossOptions
from jettison.plugins.moss.convert import convert
from jettison.plugins.moss.scaling import WeightScales

COUNT = 3


def model(dtype=torch.float32, width=24, **options):
    torch.manual_seed(0)
    built = nn.Sequential(*[nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(COUNT)])
    convert(built, MossOptions(min_features=1, **options))
    return built


def largest(built):
    return torch.tensor([layer.weight.detach().abs().max().item() for layer in built], dtype=torch.float64)


def managed(kind=torch.optim.AdamW, dtype=torch.float32, options=None, **arguments):
    built = model(dtype, **(options or {}))
    optimizer = kind(built.parameters(), **arguments)
    scales = WeightScales(built)
    scales.attach(optimizer)
    return built, optimizer, scales


def step(built, optimizer, generator, sparsity=1.0):
    for p in built.parameters():
        gradient = torch.randn(p.shape, generator=generator)
        p.grad = (gradient * (torch.rand(p.shape, generator=generator) < sparsity)).to(p.dtype)
    optimizer.step()


def run(built, optimizer, scales, steps, sparsity=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for number in range(steps):
        step(built, optimizer, generator, sparsity)
        assert (scales.predicted >= largest(built)).all(), f"step {number}: a prediction is below its weight"
        for codes, predicted in zip(scales.codes, scales.predicted, strict=True):
            assert torch.equal(codes.scale, scale_for(predicted.reshape(1)))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("betas", "sparsity"), [((0.9, 0.95), 1.0), ((0.9, 0.999), 0.01)], ids=["dense", "sparse"])
def test_d_strict_never_clips_in_2000_steps(betas, sparsity, weight_decay):
    built, optimizer, scales = managed(lr=1e-3, betas=betas, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 300)
    generator = torch.Generator().manual_seed(1)
    for number in range(2000):
        if number == 1000:
            optimizer.param_groups[0]["lr"] = 0.05  # a spike
        step(built, optimizer, generator, sparsity)
        schedule.step()
        assert (scales.predicted >= largest(built)).all(), f"step {number}"
        assert (scales.predicted <= 1.25 * scales.measured * (1 + 1e-9)).all() or number >= 1000
    report = scales.report()
    assert (report["clipped"], report["broken_predictions"], report["refused"]) == (0, 0, {})
    assert report["worst_ratio"] <= 1.25
    measured = sum(count for reason, count in report["events"].items() if reason != "start")
    assert 0 < measured < 2000 * COUNT / 4, f"measured {measured} of {2000 * COUNT} times"


@pytest.mark.parametrize("mode", ["paper", "strict"])
def test_d_gradients_that_break_the_papers_estimate_are_clipped_and_counted(mode):
    """Gradients that grow by beta2 / beta1 make steps of several learning rates, 6.7 in the end."""
    built, optimizer, scales = managed(
        lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0, options={"weight_scale": mode, "recalibrate_ratio": 16.0}
    )
    generator = torch.Generator().manual_seed(2)
    for number in range(60):
        for p in built.parameters():
            p.grad = torch.full_like(p, (0.9 / 0.999) ** (60 - number))
        optimizer.step()
        assert built(torch.randn(4, 24, generator=generator)).isfinite().all()
    below = (scales.predicted < largest(built)).all()
    assert (scales.report()["clipped"] > 0) == (mode == "paper")
    assert below == (mode == "paper")


def test_d_jit_measures_every_step_and_is_exact():
    built, optimizer, scales = managed(lr=1e-2, options={"weight_scale": "jit"})
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step(built, optimizer, generator)
        assert torch.equal(scales.predicted, largest(built))
    assert scales.report()["clipped"] == 0


def test_recursion_by_hand():
    """amax <- (1 - lr * wd) * amax + kappa * lr, with the learning rate of each step and group."""
    built = model()
    optimizer = torch.optim.AdamW(
        [{"params": built[0].parameters(), "lr": 1e-3}, {"params": built[1:].parameters(), "lr": 2e-3}],
        betas=(0.9, 0.9), weight_decay=0.1,
    )  # fmt: skip
    scales = WeightScales(built)
    scales.attach(optimizer)
    expected = largest(built)
    for factor in (1.0, 0.5, 0.0):
        rates = torch.tensor([1e-3, 2e-3, 2e-3], dtype=torch.float64) * factor
        for group, rate in zip(optimizer.param_groups, (rates[0], rates[1]), strict=True):
            group["lr"] = float(rate)
        step(built, optimizer, torch.Generator().manual_seed(0))
        # kappa is 1 for equal betas; the rest is room for float32
        expected = (1 - 0.1 * rates) * expected + rates
        torch.testing.assert_close(scales.predicted, expected, rtol=1e-6, atol=3 * 1.1e-3 * 2e-3)
        assert (scales.predicted >= expected).all()


def test_a_weight_without_gradient_does_not_decay():
    built, optimizer, scales = managed(lr=0.1, weight_decay=1.0)
    frozen = largest(built)[1]
    for _ in range(5):
        for i, p in enumerate(built.parameters()):
            p.grad = None if i == 1 else torch.zeros_like(p)
        optimizer.step()
        assert scales.predicted[1] >= frozen == largest(built)[1]
    assert scales.clipped == 0


@pytest.mark.parametrize(("steps", "ratio", "reason"), [(7, 16.0, "interval"), (10_000, 1.25, "drift")])
def test_when_weights_are_measured_again(steps, ratio, reason):
    built, optimizer, scales = managed(lr=1e-2, options={"recalibrate_steps": steps, "recalibrate_ratio": ratio})
    run(built, optimizer, scales, 28)
    events = scales.report()["events"]
    assert set(events) == {"start", reason}
    assert events[reason] == (4 * COUNT if reason == "interval" else events[reason] > 0 and events[reason])


@pytest.mark.parametrize(
    ("kind", "dtype", "reason"),
    [
        (lambda p, **k: torch.optim.SGD(p, momentum=0.9, **k), torch.float32, "SGD"),
        (torch.optim.RMSprop, torch.float32, "RMSprop"),
        (torch.optim.AdamW, torch.bfloat16, "16-bit"),
    ],
    ids=["sgd", "rmsprop", "bf16 weights"],
)
def test_without_a_bound_weights_are_measured_and_it_says_so(kind, dtype, reason, caplog):
    with caplog.at_level(logging.WARNING):
        built, optimizer, scales = managed(kind, dtype, lr=0.5)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            step(built, optimizer, generator)
            assert torch.equal(scales.predicted, largest(built))
    report = scales.report()
    assert len(report["refused"]) == COUNT
    assert all(reason in text for text in report["refused"].values())
    assert sum(reason in record.message for record in caplog.records) == 1, "warned once"
    assert (report["clipped"], report["broken_predictions"]) == (0, 0)


def test_changed_betas_end_the_prediction():
    built, optimizer, scales = managed(lr=1e-3)
    run(built, optimizer, scales, 3)
    optimizer.param_groups[0]["betas"] = (0.5, 0.999)
    run(built, optimizer, scales, 3)
    assert "betas were changed" in next(iter(scales.report()["refused"].values()))
    assert torch.equal(scales.predicted, largest(built))


def test_adafactor_and_several_optimizers():
    built = model()
    scales = WeightScales(built)
    optimizers = [
        torch.optim.Adafactor(built[0].parameters(), lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW(built[1:].parameters(), lr=1e-2),
    ]
    for optimizer in optimizers:
        scales.attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        for optimizer in optimizers:
            step(built, optimizer, generator)
        assert (scales.predicted >= largest(built)).all()
    assert (scales.clipped, scales.report()["refused"]) == (0, {})
    with pytest.raises(ConfigError, match="updates none"):
        scales.attach(torch.optim.AdamW([nn.Parameter(torch.ones(2))]))


def test_events_that_invalidate():
    built, optimizer, scales = managed(lr=1e-3)
    run(built, optimizer, scales, 2)
    x = torch.randn(4, 24)
    with torch.no_grad():
        built[1].weight.mul_(100)
    built(x)
    assert scales.predicted[1] == largest(built)[1]
    with torch.no_grad():
        built[2].weight.mul_(100)
    run(built, optimizer, scales, 1)
    built.load_state_dict({name: value / 7 for name, value in built.state_dict().items()})
    assert torch.equal(scales.predicted, largest(built)), "a loaded state was not measured at once"
    built.load_state_dict({name: value.clone() for name, value in built.state_dict().items()}, assign=True)
    assert scales.weights[0] is built[0].weight
    built[0].weight.data.mul_(50)
    scales.invalidate("merged")
    assert torch.equal(scales.predicted, largest(built))
    events = scales.report()["events"]
    assert events == {"start": 3, "changed outside a step": 2, "loaded": 6, "merged": 3} | (
        {"drift": events["drift"]} if "drift" in events else {}
    )
    assert scales.clipped == 0


def test_zero_and_broken_weights():
    built = model()
    with torch.no_grad():
        built[0].weight.zero_()
        built[1].weight[2, 3] = float("nan")
    scales = WeightScales(built)
    assert scales.report()["first_not_finite"] == "1.weight"
    assert scales.predicted[0] == 0
    assert scales.predicted[1] == built[1].weight.nan_to_num().abs().max()
    assert built[0](torch.randn(4, 24)).abs().max() == 0
    assert built[1](torch.randn(4, 24))[:, 2].isnan().all()
    assert built[1](torch.randn(4, 24))[:, [0, 1, 3]].isfinite().all()
    optimizer = torch.optim.AdamW(built[0].parameters(), lr=1e-3)
    scales.attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        step(built[:1], optimizer, generator)
        assert scales.predicted[0] >= built[0].weight.abs().max()


def test_an_empty_shard_has_a_scale_and_no_codes():
    """Where ranks outnumber rows, a rank holds nothing of a weight."""
    built = model()
    built[1].weight = nn.Parameter(torch.empty(0, 24))
    built[1].out_features = 0
    scales = WeightScales(built)
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-3)
    scales.attach(optimizer)
    step(built, optimizer, torch.Generator().manual_seed(0))
    assert (scales.predicted[1], scales.clipped) == (0, 0)
    assert built[1](torch.randn(3, 24)).shape == (3, 0)


def test_a_step_skipped_inside_the_optimizer_does_not_decay_the_bound():
    """With a gradient scaler a fused optimizer leaves the weights as they are, but its hooks run."""
    built, optimizer, scales = managed(lr=0.1, weight_decay=1.0, fused=True)
    before = largest(built)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), None
    for _ in range(3):
        step(built, optimizer, torch.Generator().manual_seed(0))
    assert torch.equal(largest(built), before)
    assert (scales.predicted >= before).all()
    assert scales.clipped == 0


def test_predicting_reads_no_weight(monkeypatch):
    built, optimizer, scales = managed(lr=1e-9, options={"recalibrate_steps": 10_000})
    monkeypatch.setattr(scales, "_norms", lambda positions: pytest.fail(f"measured {positions}"))
    run(built, optimizer, scales, 20)


def test_d_predicting_costs_less_than_a_hundredth_of_measuring():
    """Three weights of 4 M elements; those of a 7B model have up to 45 M."""
    built = model(width=2048)
    scales = WeightScales(built)
    positions = torch.arange(COUNT)

    def best(call):
        times = []
        for _ in range(9):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    def predict():
        scales.predicted[positions] = scales.predicted[positions] * 0.999 + 1e-9
        scale_for(scales.predicted)

    measuring, predicting = best(lambda: torch.stack(scales._norms([0, 1, 2])).tolist()), best(predict)
    assert predicting * 100 < measuring, f"{predicting * 1e6:.0f} us beside {measuring * 1e6:.0f} us"
