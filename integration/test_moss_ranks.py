"""Two ranks over gloo: the same scales on both without talking, but to measure (H)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from jettison.plugins.moss.config import MossOptions
from jettison.plugins.moss.convert import convert
from jettison.plugins.moss.scaling import WeightScales

STEPS, INTERVAL = 24, 8


def build(rows: int = 64) -> tuple[nn.Module, WeightScales, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, rows, bias=False), nn.GELU(), nn.Linear(rows, 32, bias=False))
    convert(model, MossOptions(min_features=1, recalibrate_steps=INTERVAL, recalibrate_ratio=16.0))
    return model, *follow(model, None)


def follow(model: nn.Module, group: Any) -> tuple[WeightScales, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    scales = WeightScales(model, group)
    scales.attach(optimizer)
    return scales, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, part: slice) -> None:
    for number in range(STEPS):
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(number))[part]
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()


def outcome(scales: WeightScales) -> dict[str, Any]:
    return {
        "predicted": scales.predicted,
        "codes": [codes.codes.view(torch.uint8) for codes in scales.codes if codes.codes is not None],
        "weights": [weight.detach() for weight in scales.weights],
        "clipped": scales.clipped,
    }


def replicas(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model, scales, optimizer = build()
    train(DistributedDataParallel(model), optimizer, slice(32 * rank, 32 * rank + 32))
    torch.save(outcome(scales), Path(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


def shards(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model, alone, _ = build()
    alone.remove()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + rank)
    calls: list[int] = []
    real = distributed.all_reduce
    distributed.all_reduce = lambda tensor, *args, **more: calls.append(tensor.numel()) or real(tensor, *args, **more)
    scales, optimizer = follow(model, distributed.group.WORLD)
    train(model, optimizer, slice(None))
    own = torch.tensor([weight.detach().abs().max().item() for weight in scales.weights], dtype=torch.float64)
    torch.save({**outcome(scales), "calls": calls, "own": own}, Path(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


def both(function: Any, folder: Path) -> list[dict[str, Any]]:
    processes.spawn(function, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_h_replicas_have_the_same_bytes_and_one_rank_gives_nearly_the_same(tmp_path: Path) -> None:
    first, second = both(replicas, tmp_path)
    assert torch.equal(first["predicted"], second["predicted"])
    assert all(torch.equal(a, b) for a, b in zip(first["codes"], second["codes"], strict=True))
    model, scales, optimizer = build()
    train(model, optimizer, slice(None))
    before = [parameter.detach() for parameter in build()[0].parameters()]
    for name, mine, alone, start in zip(scales.names, first["weights"], scales.weights, before, strict=True):
        moved, reference = mine - start, alone.detach() - start
        cosine = nn.functional.cosine_similarity(moved.flatten(), reference.flatten(), dim=0)
        assert cosine > 0.99, f"{name}: two ranks moved it elsewhere, cosine {cosine:.4f}"
    assert first["clipped"] == second["clipped"] == 0


def test_h_shards_agree_on_their_scale_and_talk_only_to_measure(tmp_path: Path) -> None:
    first, second = both(shards, tmp_path)
    assert torch.equal(first["predicted"], second["predicted"])
    assert (first["predicted"] >= torch.maximum(first["own"], second["own"])).all()
    assert not torch.equal(first["own"], second["own"])
    assert first["calls"] == second["calls"] == [2] * (1 + STEPS // INTERVAL), "one message for all weights"
    assert first["clipped"] == second["clipped"] == 0
