"""Train a small reasoning model: plain Llama, thinking in <think> tags, on problems with exact answers.

    python integration/lab/train_reasoner.py [--level full|mini] [--output build/reasoner-full] [--seed 0]

The folder is then a normal Hugging Face model with tokenizer and chat template. Interrupted, the run goes on where it
last saved; finished, it does nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jettison.hooks.console import print_table, progress
from jettison.hooks.files import write_atomically
from lab import data, vocabulary
from lab.levels import LEVELS, Level

BUILD = Path(__file__).resolve().parents[2] / "build"
STATE = "training.safetensors"
RECORD = "training.json"
REST_RATE = 3e-3
"""Peak learning rate of embeddings and norms."""
DIGIT_WORTH = 4.0
"""Weight of a digit in the loss; a word has 1."""


def main() -> None:
    options = _options()
    level = LEVELS[options.level]
    level = replace(level, steps=options.steps or level.steps, traces=options.traces or level.traces)
    record = train(level, options.output, options.seed, save_every=options.save_every, compiled=options.compile)
    print_table(("figure", "value"), sorted(record.items()), title=str(options.output))


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=sorted(LEVELS), default="full")
    parser.add_argument("--output", type=Path, help="default: build/reasoner-LEVEL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the level's")
    parser.add_argument("--traces", type=int, help="default: the level's")
    parser.add_argument("--save-every", type=int, default=250, help="steps")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    options = parser.parse_args()
    options.output = options.output or BUILD / f"reasoner-{options.level}"
    return options


def train(
    level: Level,
    folder: Path,
    seed: int = 0,
    *,
    save_every: int = 250,
    compiled: bool = False,
    stop_after: int | None = None,
) -> dict[str, float]:
    """Train into `folder` and return what the run was: loss, tokens, seconds, parameters.

    Args:
        level, folder, seed: what is trained, where to, and what all randomness follows from.
        save_every: steps between two states that a later run can go on from.
        compiled: use torch.compile.
        stop_after: end after this many steps, as an interruption would.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "model.safetensors").exists():
        record: dict[str, float] = json.loads((folder / RECORD).read_text())
        return record
    tokenizer = vocabulary.train()
    with progress() as bar:
        task = bar.add_task("traces")
        traces = data.make(level, seed, _workers(), lambda done, all_: bar.update(task, completed=done, total=all_))
        run = _Run(level, folder, seed, tokenizer)
        bar.update(task, completed=run.step, total=level.steps)
        record = run.go_on(
            traces,
            compiled,
            stop_after or level.steps,
            save_every,
            lambda done, text: bar.update(task, completed=done, description=text),
        )
    if run.step == level.steps:
        _save(folder, run.model, tokenizer, record)
    return record


class _Run:
    """A model in training, taken up where it was last saved."""

    def __init__(self, level: Level, folder: Path, seed: int, tokenizer: Any) -> None:
        from transformers import LlamaForCausalLM

        torch.manual_seed(seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.level, self.folder, self.seed, self.pad = level, folder, seed, tokenizer.pad_token_id
        self.model = LlamaForCausalLM(level.config(tokenizer)).to(self.device)
        self.optimisers = optimisers_of(level, self.model)
        self.worth = _worth(tokenizer).to(self.device)
        self.step = _restore(folder, self.model, self.optimisers)

    def go_on(
        self, traces: data.Traces, compiled: bool, last: int, save_every: int, note: Callable[[int, str], None]
    ) -> dict[str, float]:
        """Train up to step `last`; a run that ends before the level's last step leaves its state."""
        loss_of = torch.compile(_loss) if compiled else _loss
        feed = islice(data.batches(traces, self.level, self.seed, self.pad), self.step, None)
        started, seen, loss = time.perf_counter(), 0, math.nan
        while self.step < last:
            ids, labels = (tensor.to(self.device, non_blocking=True) for tensor in next(feed))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss_now = loss_of(self.model, ids, labels, self.worth)
            update(self.model, self.optimisers, rate(self.level, self.step), loss_now)
            self.step += 1
            seen += ids.numel()
            if self.step % 20 == 0 or self.step == last:
                loss = float(loss_now.detach())
                note(self.step, f"loss {loss:.3f}, {seen / (time.perf_counter() - started):,.0f} tokens/s")
            if self.step < self.level.steps and (self.step % save_every == 0 or self.step == last):
                _save_state(self.folder, self.model, self.optimisers, self.step)
        size = sum(parameter.numel() for parameter in self.model.parameters())
        seconds = time.perf_counter() - started
        return {"loss": loss, "steps": self.step, "tokens": seen, "seconds": seconds, "parameters": size}


def _workers() -> int:
    cores = len(os.sched_getaffinity(0))
    return cores - 2 if cores > 4 else 1


def optimisers_of(level: Level, model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for embeddings and norms; every group knows its peak rate."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(inside, lr=level.rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, lr=REST_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for optimiser in (muon, adam):
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def _worth(tokenizer: Any) -> Tensor:
    """The weight of every token in the loss, [vocabulary]: digits are few among the words and carry the work."""
    worth = torch.ones(len(tokenizer))
    worth[tokenizer.convert_tokens_to_ids([str(digit) for digit in range(10)])] = DIGIT_WORTH
    return worth


def _loss(model: Any, ids: Tensor, labels: Tensor, worth: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), weight=worth, ignore_index=data.IGNORED
    )


def update(model: Any, optimisers: Sequence[torch.optim.Optimizer], share: float, loss: Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * share
        optimiser.step()
    model.zero_grad(set_to_none=True)


def rate(level: Level, step: int) -> float:
    """The share of the peak rate at a step: a linear warm-up over a twentieth of the run, then a cosine to 1 %."""
    warm = max(1, level.steps // 20)
    if step < warm:
        return (step + 1) / warm
    share = (step - warm) / max(1, level.steps - warm)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))


def _save_state(folder: Path, model: Any, optimisers: Sequence[torch.optim.Optimizer], step: int) -> None:
    from safetensors.torch import save

    tensors = {f"model/{name}": value.detach() for name, value in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for optimiser in optimisers:
            for key, value in optimiser.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = torch.as_tensor(value)
    plain = {name: value.cpu().contiguous() for name, value in tensors.items()}
    write_atomically(folder / STATE, save(plain, {"step": str(step)}))


def _restore(folder: Path, model: Any, optimisers: Sequence[torch.optim.Optimizer]) -> int:
    """Load the state of an interrupted run, if there is one; return its steps."""
    from safetensors import safe_open

    if not (folder / STATE).exists():
        return 0
    with safe_open(folder / STATE, "pt") as state:
        saved = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118  no iterator
        step = int(state.metadata()["step"])
    for name, parameter in model.named_parameters():
        parameter.data.copy_(saved[f"model/{name}"])
        owner = next(one for one in optimisers if any(parameter is p for g in one.param_groups for p in g["params"]))
        for full, value in saved.items():
            key, _, of = full.partition("/")
            if of == name and key != "model":
                owner.state[parameter][key] = value if key == "step" else value.to(parameter.device)
    return step


def _save(folder: Path, model: Any, tokenizer: Any, record: Mapping[str, float]) -> None:
    """Write tokenizer and record first and the weights last: where they are, the model is whole."""
    tokenizer.save_pretrained(folder)
    write_atomically(folder / RECORD, json.dumps(record, indent=1) + "\n")
    part = folder / "weights"
    model.to(torch.bfloat16).save_pretrained(part)
    for file in sorted(part.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        os.replace(file, folder / file.name)
    part.rmdir()
    (folder / STATE).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
