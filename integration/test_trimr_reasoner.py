"""T7 in small: the systems of the reasoner's benchmark, on the mini reasoner in real vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

import bench_trimr_reasoner as bench
from jettison.hooks.results import Results, load

MODEL = Path(__file__).resolve().parents[1] / "build" / "reasoner-mini"
PROBLEMS = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (MODEL / "model.safetensors").exists(),
        reason="no mini reasoner; python integration/lab/train_reasoner.py --level mini",
    ),
]


@pytest.fixture(scope="module")
def run() -> bench.Run:
    return bench.measured(MODEL, "mini", PROBLEMS, 1.0, 0)


def test_t7_every_system_answers_every_problem_within_the_limit(run: bench.Run) -> None:
    assert set(run.responses) == set(bench.SYSTEMS)
    limit = bench.LEVELS["mini"].length - 128
    for name, responses in run.responses.items():
        assert len(responses) == PROBLEMS
        assert max(len(one.ids) for one in responses) <= limit, name
        assert run.stops[name][1] == sum(one.stopped_at is not None for one in responses)


def test_t7_the_reasoner_overthinks_and_its_first_answers_are_not_its_best(run: bench.Run) -> None:
    found = bench.measure.phenomena(run.outcomes["none"])
    assert found["overthinking"] > 0.2, found
    assert found["first_accuracy"] < 0.98, found


def test_t7_thinking_is_saved_and_the_budget_is_matched(run: bench.Run) -> None:
    tokens = {name: bench.measure.phenomena(found)["thinking_tokens"] for name, found in run.outcomes.items()}
    assert tokens["jettison"] < tokens["none"], tokens
    assert tokens["first_answer"] < tokens["jettison"], tokens
    assert tokens["budget"] == pytest.approx(tokens["jettison"], rel=0.05), tokens


def test_t7_results_keep_other_cases_and_make_a_picture(run: bench.Run, tmp_path: Path) -> None:
    file = tmp_path / "trimr.json"
    other = Results.start()
    other.add("idle-32-cpu", "jettison", "throughput_ratio", 0.99, "ratio")
    other.add(bench.CASE, "jettison", "accuracy", 0.0, "ratio")
    other.write(file)
    results = Results.start()
    bench.record(results, run)
    results.rows = [*bench._other_cases(file), *results.rows]
    results.write(file)
    again = load(file)
    assert again.value("idle-32-cpu", "throughput_ratio") == 0.99
    right = sum(one.correct for one in run.outcomes["jettison"])
    assert again.value(bench.CASE, "accuracy") == pytest.approx(right / PROBLEMS)
    bench._picture(again, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
