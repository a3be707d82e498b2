"""The search on a real model: SmolLM2-135M-Instruct and text that no step of it has seen."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from jettison.hooks import assets
from jettison.hooks.quality import summarise
from jettison.plugins.kvtuner import calibration, tune
from jettison.plugins.kvtuner.ledger import Ledger
from jettison.plugins.kvtuner.prepare import TuneSettings, prepare, resolve_budget
from jettison.plugins.kvtuner.quality import paired, rescore
from jettison.plugins.kvtuner.search import SearchSettings
from jettison.plugins.kvtuner.space import Candidate

ROOT = Path(__file__).resolve().parent.parent
BITS = 4.25


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a9_the_search_beats_the_best_uniform_pair_and_a_shuffled_table() -> None:
    """At 4.25 real bits per element; differences are paired by position and exceed three standard errors."""
    settings = TuneSettings(
        search=SearchSettings("nsga2", 8, 4, 0), sinks=(1,), length=256, search_length=96, validation_length=128,
        finalists=2, items=0,
    )  # fmt: skip
    prepared = prepare(str(assets.checkpoint(ROOT / "build")), settings)
    budget = resolve_budget(prepared.shape, bits=BITS)
    with Ledger(None) as ledger:
        outcome = tune.tune(prepared, budget, settings, ledger)
    assert outcome.table.sizes is not None
    assert outcome.table.sizes.bytes_per_token <= budget
    best = tune.best_within(outcome.uniform, budget)
    assert best is not None
    pairs = list(outcome.chosen.candidate.pairs)
    random.Random(0).shuffle(pairs)
    shuffled = Candidate(tuple(pairs), outcome.chosen.candidate.sink_tokens)
    texts = calibration.token_texts(prepared.tokenizer, "held-out", 2, 256)
    candidates = {"search": outcome.chosen.candidate, "uniform": best.candidate, "shuffled": shuffled}
    parts = rescore(prepared.model, texts, [prepared.formats(one) for one in candidates.values()])
    found = dict(zip(candidates, parts, strict=True))
    figures = {name: summarise(own).mean_kl for name, own in found.items()}
    for other in ("uniform", "shuffled"):
        difference, error = paired(found["search"], found[other])
        assert difference + 3 * error < 0, f"search against {other}: {difference} +- {error} of {figures}"
