"""Small language models trained in FP8 beside float32: the same curve, whoever says the scales (D, E in small)."""

import math

import pytest
import torch
from torch import nn

from jettison.plugins.moss.config import MossOptions
from jettison.plugins.moss.convert import convert
from jettison.plugins.moss.scaling import WeightScales

VOCABULARY, CONTEXT, WIDTH = 32, 16, 64
STEPS = 120


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.ffn_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.ffn_norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids):
        x = self.embed_tokens(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def batch(number, size=16):
    """Affine recurrences modulo the vocabulary: the next token follows from the two before it."""
    generator = torch.Generator().manual_seed(number)
    rows = [torch.randint(VOCABULARY, (size,), generator=generator) for _ in range(2)]
    for _ in range(CONTEXT - 1):
        rows.append((rows[-1] + rows[-2] + 1) % VOCABULARY)
    return torch.stack(rows, 1)


def loss_of(model, ids):
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


def train(seed, options=None):
    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    scales = None
    if options is not None:
        assert len(convert(model, options)) == 8
        scales = WeightScales(model)
        scales.attach(optimizer)
    for number in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batch(1000 * seed + number)).backward()
        optimizer.step()
    with torch.no_grad():
        return loss_of(model, batch(-1, 256)).item(), scales


@pytest.fixture(scope="module")
def plain():
    losses = [train(seed)[0] for seed in range(3)]
    mean = sum(losses) / 3
    deviation = math.sqrt(sum((x - mean) ** 2 for x in losses) / 2)
    assert mean < 0.8 * math.log(VOCABULARY), f"the model has not learned: {losses}"
    return mean, deviation


@pytest.mark.parametrize(
    "changes",
    [{}, {"weight_scale": "jit"}, {"wgrad": "bf16", "group": 32, "level": "row"}],
    ids=["strict", "jit", "bf16"],
)
def test_e_the_loss_is_that_of_float32_within_its_noise(plain, changes):
    """The criterion of section 7: half a percent, or twice the deviation between seeds, of the mean of three seeds."""
    mean, deviation = plain
    runs = [train(seed, MossOptions(min_features=16, **changes)) for seed in range(3)]
    losses = [loss for loss, _ in runs]
    difference = abs(sum(losses) / 3 - mean)
    assert difference <= max(0.005 * mean, 2 * deviation), f"{changes}: {losses} beside {mean:.4f} +- {deviation:.4f}"
    for _, scales in runs:
        assert (scales.clipped, scales.report()["broken_predictions"]) == (0, 0)
