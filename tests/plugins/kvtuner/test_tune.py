"""The whole method on tiny models with random weights, and one whose fragile layer is planted."""

from dataclasses import replace

import pytest
import torch

import tiny_models
from jettison.hooks import ConfigError
from jettison.hooks.quality import summarise
from jettison.plugins.kvtuner import calibration, tune
from jettison.plugins.kvtuner.artefact import read_pairs
from jettison.plugins.kvtuner.ledger import Ledger
from jettison.plugins.kvtuner.prepare import PARTS, TuneSettings, prepare_loaded, real_bits, resolve_budget
from jettison.plugins.kvtuner.quality import paired, rescore
from jettison.plugins.kvtuner.search import SearchSettings
from jettison.plugins.kvtuner.space import Candidate
from jettison.plugins.kvtuner.table import ModelShape, load_table
from jettison.plugins.kvtuner.tasks import Task

FRAGILE = 2
SETTINGS = TuneSettings(search=SearchSettings("nsga2", 24, 8, 0), sinks=(0,), length=192, search_length=96, items=0)
K4V4 = tiny_models.LAYERS * tiny_models.KV_HEADS * 72
"""Bytes per token of uniform K4V4 without sink tokens at head size 64."""


def random_texts(seed, count=2, length=192):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 250, (length,), generator=generator) for _ in range(count)]


def parts(length=192, search=96):
    texts = {part: random_texts(number, length=length) for number, part in enumerate(PARTS)}
    texts["search"] = [ids[:search] for ids in texts["search"]]
    return texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.llama(tmp_path_factory.mktemp("tune") / "llama")


@pytest.fixture(scope="module")
def planted(folder):
    """Keys of one layer are eight times as long, so its scores are eight times as far off."""
    model, tokenizer = calibration.load_model(str(folder))
    with torch.no_grad():
        model.model.layers[FRAGILE].self_attn.k_proj.weight.mul_(8)
    return prepare_loaded(str(folder), model, tokenizer, parts(), "random", SETTINGS)


@pytest.mark.parametrize("sampler", ["nsga2", "moead"])
def test_a8_a_planted_fragile_layer_gets_its_bits(planted, sampler):
    settings = replace(SETTINGS, search=replace(SETTINGS.search, sampler=sampler))
    with Ledger(None) as ledger:
        outcome = tune.tune(planted, K4V4, settings, ledger)
    pairs = outcome.table.payload.pairs
    assert pairs[FRAGILE][0] == max(key for key, _ in pairs) >= 8, pairs
    assert sum(key == pairs[FRAGILE][0] for key, _ in pairs) == 1, pairs
    assert outcome.table.sizes.bytes_per_token <= K4V4
    held_out = random_texts(99, 4)
    uniform = Candidate(((4, 4),) * len(pairs), 0)
    own, other = rescore(planted.model, held_out, [planted.formats(c) for c in (outcome.chosen.candidate, uniform)])
    difference, error = paired(own, other)
    assert difference + 3 * error < 0, f"{sampler}: {difference} +- {error}, {summarise(other).mean_kl} uniform"


def test_the_table_is_complete_and_says_how_it_was_found(planted, tmp_path):
    task = Task("planted", tuple((tuple(ids[:40].tolist()), 1) for ids in random_texts(5, 6)))
    with Ledger(None) as ledger:
        outcome = tune.tune(planted, K4V4, SETTINGS, ledger, task)
    outcome.table.save(tmp_path / "t.json")
    table = load_table(tmp_path / "t.json")
    assert table == outcome.table
    found = table.search
    assert found.budget_bytes == K4V4
    assert found.trials == 24
    assert sorted(layer for group in found.groups for layer in group) == list(range(tiny_models.LAYERS))
    assert found.objective.kl == outcome.chosen.quality.mean_kl
    assert found.objective.positions == 2 * 96
    assert found.validation.positions == 2 * 192
    assert [row.task for row in found.accuracy] == ["planted", "planted, not quantised"]
    assert all(row.low <= row.correct / row.items <= row.high for row in found.accuracy)
    assert found.uniform.bytes_per_token <= table.sizes.bytes_per_token
    assert table.sizes.real_bits == pytest.approx(real_bits(planted.shape, table.sizes.bytes_per_token))
    assert table.sizes.nominal_bits == pytest.approx(sum(map(sum, table.payload.pairs)) / 8)
    assert table.model.architecture == "LlamaForCausalLM"
    assert {"torch", "transformers", "optuna"} <= set(table.versions)
    smaller = [point.bytes_per_token for point in found.neighbours]
    assert len(smaller) >= 1
    assert all(size != table.sizes.bytes_per_token for size in smaller)
    assert all(len(read_pairs(point.pairs)) == tiny_models.LAYERS for point in found.neighbours)


def test_the_canary_can_be_measured_again(planted):
    with Ledger(None) as ledger:
        table = tune.tune(planted, K4V4, SETTINGS, ledger).table
    ids = torch.tensor(table.canary.ids)
    assert torch.equal(ids, torch.cat(planted.texts["canary"]))
    (own,) = rescore(planted.model, [ids], [[table.format(layer) for layer in range(tiny_models.LAYERS)]])
    assert summarise(own).mean_kl == pytest.approx(table.canary.kl, rel=1e-4)


def test_the_same_seed_gives_the_same_table_and_a_ledger_saves_the_work(planted, tmp_path):
    tables, evaluations = [], []
    for path in (None, tmp_path / "journal.log", tmp_path / "journal.log"):
        with Ledger(path) as ledger:
            outcome = tune.tune(planted, K4V4, SETTINGS, ledger)
        tables.append(outcome.table.payload)
        evaluations.append(outcome.evaluations)
    assert tables[0] == tables[1] == tables[2]
    assert evaluations[0] == evaluations[1] > 0
    assert evaluations[2] == 0


def test_no_uniform_pair_of_no_greater_size_is_better_on_the_validation_text(planted):
    for bits in (2.5, 3.0, 4.5, 5.0, 8.25):
        budget = resolve_budget(planted.shape, bits=bits)
        with Ledger(None) as ledger:
            outcome = tune.tune(planted, budget, replace(SETTINGS, search=SearchSettings("dp", 4, 4)), ledger)
        finalist = outcome.finalists[0]
        assert finalist.found.cost <= budget, f"{bits} bits"
        best = tune.best_within(outcome.uniform, budget)
        (own,) = rescore(planted.model, planted.texts["validation"], [planted.formats(best.candidate)])
        difference, error = paired(finalist.parts, own)
        assert difference <= error, f"{bits} bits: {difference} +- {error} above {best.candidate.key}"


def test_measured_layers_are_taken_from_the_folder(folder, tmp_path):
    model, tokenizer = calibration.load_model(str(folder))
    first = prepare_loaded(str(folder), model, tokenizer, parts(), "random", SETTINGS, tmp_path)
    asked = []
    second = prepare_loaded(
        str(folder), model, tokenizer, parts(), "random", SETTINGS, tmp_path, progress=lambda *what: asked.append(what)
    )
    assert not asked, "nothing is measured again"
    assert second.space == first.space
    other = prepare_loaded(str(folder), model, tokenizer, {**parts(), "sensitivity": random_texts(7)}, "random",
                           SETTINGS, tmp_path)  # fmt: skip
    assert other.space != first.space, "another text is measured anew"


SHAPE = ModelShape(name="x", config_sha256="0" * 64, num_layers=30, num_kv_heads=3, head_size=64)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"bits": 4.5}, 6480),
        ({"bits": 4.25}, 6120),
        ({"ratio": 3.0}, 7680),
        ({"size": 1234}, 1234),
        ({"bits": 16}, 23040),
    ],
)
def test_budgets_mean_real_bytes(flags, expected):
    """4.5 bits are 2 x 64 x 4.5 / 8 = 72 bytes for each of 90 heads."""
    found = resolve_budget(SHAPE, **flags)
    assert found == expected
    assert real_bits(SHAPE, expected) * SHAPE.elements / 4 == expected


@pytest.mark.parametrize(
    "flags", [{}, {"bits": 4.0, "ratio": 3.0}, {"bits": 0.0}, {"ratio": -1.0}, {"bits": float("nan")}, {"size": 0}]
)
def test_bad_budgets_are_refused(flags):
    with pytest.raises(ConfigError, match="exactly one of --bits, --bytes and --ratio"):
        resolve_budget(SHAPE, **flags)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"metric": "mse"}, "metric 'mse'"),
        ({"sinks": ()}, "sink tokens"),
        ({"sinks": (1, 1)}, "sink tokens"),
        ({"sinks": (17,)}, "sink tokens"),
        ({"block_size": 8}, "block size 8"),
        ({"length": 3}, "texts of"),
        ({"search_length": 3}, "texts of"),
        ({"finalists": 0}, "0 finalists"),
    ],
)
def test_bad_settings_are_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TuneSettings(**changes)


def test_an_impossible_budget_is_refused_before_anything_is_run(planted):
    with Ledger(None) as ledger, pytest.raises(ConfigError, match=r"the smallest cache takes 320"):
        tune.tune(planted, 319, SETTINGS, ledger)


def test_paired_differences_by_hand():
    same = torch.zeros(128, dtype=torch.bool)
    one = [(torch.cat([torch.full((32,), float(n)) for n in range(4)]), same)]
    other = [(torch.zeros(128), same)]
    difference, error = paired(one, other)
    assert difference == 1.5
    assert error == pytest.approx((5 / 3) ** 0.5 / 2)
    assert paired(one, one) == (0.0, 0.0)
    short = [(torch.ones(20), same[:20])]
    assert paired(short, short) == (0.0, float("inf"))


def test_a_shuffled_table_is_worse_on_a_planted_model(planted):
    with Ledger(None) as ledger:
        chosen = tune.tune(planted, K4V4, SETTINGS, ledger).chosen.candidate
    shuffled = Candidate((*chosen.pairs[1:], chosen.pairs[0]), chosen.sink_tokens)
    assert shuffled.pairs[FRAGILE] != chosen.pairs[FRAGILE]
    own, other = rescore(planted.model, random_texts(98), [planted.formats(c) for c in (chosen, shuffled)])
    assert summarise(own).mean_kl < summarise(other).mean_kl
