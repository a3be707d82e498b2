"""The search on a real model: SmolLM2-135M-Instruct and text that no step of it has seen."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from jettison.hooks import InputRefused, assets
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


@pytest.mark.assets
def test_packaged_texts_are_as_long_as_asked_for_and_share_nothing() -> None:
    """Long contexts too (8,192 tokens, longer than any article): whole, and no two texts have a run in common."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.checkpoint(ROOT / "build"))
    for split in ("calibration", "held-out"):
        short = calibration.token_texts(tokenizer, split, 4, 1024)
        texts = calibration.token_texts(tokenizer, split, 4, 8192)
        assert [len(ids) for ids in texts] == [8192] * 4, split
        assert short[2].tolist() == texts[2][:1024].tolist(), "a short one is the beginning of the same article"
        runs = [{tuple(ids[n : n + 64].tolist()) for n in range(0, 8192 - 64, 64)} for ids in texts]
        whole = [" ".join(map(str, ids.tolist())) for ids in texts]
        for number, own in enumerate(runs):
            for other in (text for index, text in enumerate(whole) if index != number):
                assert not any(" ".join(map(str, run)) in other for run in own), f"{split}, text {number}"
    with pytest.raises(InputRefused, match="the packaged texts are too short: 2 of 1000000 tokens are wanted"):
        calibration.token_texts(tokenizer, "held-out", 2, 1_000_000)
