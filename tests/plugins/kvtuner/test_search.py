import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from jettison.hooks import ConfigError, InputRefused
from jettison.plugins.kvtuner.ledger import Ledger
from jettison.plugins.kvtuner.search import WORST_KL, Measurements, SearchSettings, pareto, search, seed_genes
from search_samples import OPTIONS, additive, additive_space, interacting, quality

BUDGET = 72 * 6
"""4.5 real bits of head size 64."""
SAMPLERS = ("nsga2", "moead")


def run(space, evaluate, budget, settings, path=None, trials=None):
    with Ledger(path) as ledger:
        measure = Measurements(ledger, {"test": 1}, evaluate, space.cost)
        return search(space, measure, ledger, budget, settings), measure.made


def brute_front(space, evaluate, budget):
    """All (cost, KL) that nothing within the budget dominates, over every point of the space."""
    points = set()
    for genes in itertools.product(*map(range, space.sizes)):
        candidate = space.candidate(genes)
        if space.cost(candidate) <= budget:
            points.add((space.cost(candidate), evaluate(candidate).mean_kl))
    return [p for p in sorted(points) if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]


def volume(front, reference):
    """Area that (cost, KL) points dominate below the point `reference`."""
    area, high = 0.0, reference[1]
    for cost, kl in sorted(front):
        if kl < high:
            area += (reference[0] - cost) * (high - kl)
            high = kl
    return area


@pytest.mark.parametrize("sampler", ["dp", *SAMPLERS])
@pytest.mark.parametrize("seed", range(3))
def test_a7_the_true_front_of_an_additive_problem_is_found(sampler, seed):
    space = additive_space(seed)
    expected = brute_front(space, additive(space), BUDGET)
    found, _ = run(space, additive(space), BUDGET, SearchSettings(sampler, 150, 100, seed))
    front = [(one.cost, one.quality.mean_kl) for one in pareto(found)]
    assert [cost for cost, _ in front] == [cost for cost, _ in expected], f"{sampler}, seed {seed}"
    assert [kl for _, kl in front] == pytest.approx([kl for _, kl in expected], rel=1e-12), f"{sampler}, seed {seed}"


@pytest.mark.parametrize("sampler", ["dp", *SAMPLERS])
@pytest.mark.parametrize("budget", [40 * 6, 56 * 6 + 5, 64 * 6, BUDGET, 136 * 6, 10_000])
def test_a7_the_budget_is_never_exceeded(sampler, budget):
    """Not by any candidate that is evaluated, whatever the sampler proposes."""
    space = additive_space(1, sinks=(0, 1))
    seen = []

    def evaluate(candidate):
        seen.append(space.cost(candidate))
        return additive(space)(candidate)

    run(space, evaluate, budget, SearchSettings(sampler, 60, 8, 0))
    assert seen
    assert max(seen) <= budget, f"{sampler}: {max(seen)} of {budget}"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a7_deterministic_under_a_seed(sampler):
    space = additive_space(2, sinks=(0, 1))
    runs = [run(space, interacting(space), BUDGET, SearchSettings(sampler, 60, 8, seed))[0] for seed in (5, 5, 6)]
    keys = [[one.candidate.key for one in found] for found in runs]
    assert keys[0] == keys[1], sampler
    assert keys[0] != keys[2], f"{sampler}: the seed changes nothing"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("stops", [(1,), (8, 9), (3, 17, 40)])
def test_a7_a_stopped_search_goes_on_as_if_unbroken(sampler, stops, tmp_path):
    """StoppedError in the middle of an evaluation, with a trial open in the journal; nothing is evaluated twice."""
    space = additive_space(3, sinks=(0, 1))
    settings = SearchSettings(sampler, 50, 8, 0)
    expected, _ = run(space, interacting(space), BUDGET, settings)
    path, calls = tmp_path / "journal.log", []

    class StoppedError(Exception):
        pass

    def evaluate(candidate):
        calls.append(candidate.key)
        if len(calls) in stops:
            calls.pop()
            stops_left.remove(stops_left[0])
            raise StoppedError
        return interacting(space)(candidate)

    stops_left = list(stops)
    while stops_left:
        with pytest.raises(StoppedError):
            run(space, evaluate, BUDGET, settings, path)
        calls.append("stopped")
    found, _ = run(space, evaluate, BUDGET, settings, path)
    assert [one.candidate.key for one in found] == [one.candidate.key for one in expected], f"{sampler}, {stops}"
    assert [one.quality for one in found] == [one.quality for one in expected]
    evaluated = [key for key in calls if key != "stopped"]
    assert len(evaluated) == len(set(evaluated)), f"{sampler}: a candidate was evaluated twice"
    _, made = run(space, evaluate, BUDGET, settings, path)
    assert made == 0, "a finished search evaluates nothing"


CHILD = """
import sys, time
from pathlib import Path
from search_samples import additive_space, interacting
from jettison.plugins.kvtuner.ledger import Ledger
from jettison.plugins.kvtuner.search import Measurements, SearchSettings, search
space = additive_space(3, sinks=(0, 1))
def evaluate(candidate):
    print("evaluated", flush=True)
    time.sleep(0.02)
    return interacting(space)(candidate)
with Ledger(Path(sys.argv[1])) as ledger:
    measure = Measurements(ledger, {"test": 1}, evaluate, space.cost)
    for one in search(space, measure, ledger, 432, SearchSettings(sys.argv[2], 40, 8, 0)):
        print("found", one.candidate.key, repr(one.quality.mean_kl), flush=True)
"""


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a7_a_killed_search_ends_with_the_same_front(sampler, tmp_path):
    """SIGKILL at two moments of a real process; the unbroken one runs here."""

    def start(journal):
        command = [sys.executable, "-c", textwrap.dedent(CHILD), str(journal), sampler]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)

    journal = tmp_path / "journal.log"
    for lines in (3, 12):
        child = start(journal)
        for _ in range(lines):
            assert child.stdout.readline() == "evaluated\n"
        time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        child.stdout.close()
    space = additive_space(3, sinks=(0, 1))
    expected, _ = run(space, interacting(space), BUDGET, SearchSettings(sampler, 40, 8, 0))
    child = start(journal)
    text, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    found = [line.split()[1:] for line in text.splitlines() if line.startswith("found")]
    assert found == [[one.candidate.key, repr(one.quality.mean_kl)] for one in expected], sampler


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a7_the_search_beats_its_seed_where_layers_interact(sampler):
    """Mean over seeds: the dominated area grows beyond the programme's, and reaches 97 % of the true front's."""
    gains, shares = [], []
    for seed in range(4):
        space = additive_space(seed, groups=5)
        evaluate = interacting(space)
        budget = 72 * 5
        reference = (budget + 1, evaluate(space.candidate((0,) * 6)).mean_kl * 1.01)
        true = volume(brute_front(space, evaluate, budget), reference)
        dp, _ = run(space, evaluate, budget, SearchSettings("dp", 16, 16, seed))
        found, _ = run(space, evaluate, budget, SearchSettings(sampler, 200, 16, seed))
        areas = [volume([(one.cost, one.quality.mean_kl) for one in pareto(rows)], reference) for rows in (dp, found)]
        gains.append(areas[1] / areas[0])
        shares.append(areas[1] / true)
    assert min(gains) >= 1, f"{sampler}: {gains}"
    assert max(gains) > 1, f"{sampler}: {gains}"
    assert sum(shares) / len(shares) >= 0.97, f"{sampler}: {shares}"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_more_trials_continue_the_same_study(sampler, tmp_path):
    space = additive_space(0)
    path = tmp_path / "journal.log"
    short, first = run(space, interacting(space), BUDGET, SearchSettings(sampler, 20, 8, 0), path)
    long, second = run(space, interacting(space), BUDGET, SearchSettings(sampler, 35, 8, 0), path)
    assert [one.candidate.key for one in long[:20]] == [one.candidate.key for one in short]
    assert first <= 20
    assert first + second <= 35


def test_another_setting_starts_another_study(tmp_path):
    space = additive_space(0)
    path = tmp_path / "journal.log"
    one, _ = run(space, interacting(space), BUDGET, SearchSettings("nsga2", 30, 8, 0), path)
    other, made = run(space, interacting(space), BUDGET, SearchSettings("nsga2", 30, 8, 1), path)
    assert [f.candidate.key for f in one] != [f.candidate.key for f in other]
    assert made < 30, "seeds and common children are not evaluated again"


def test_a_children_repeats_only_where_nothing_is_left():
    space = additive_space(0, groups=1)
    found, made = run(space, additive(space), 10_000, SearchSettings("nsga2", 12, 4, 0))
    assert len(found) == 12
    assert made == 5
    assert {one.candidate.pairs[0] for one in found} == set(OPTIONS)


def test_output_that_is_not_finite_is_the_worst():
    space = additive_space(0)
    found, _ = run(space, lambda _candidate: quality(float("nan")), BUDGET, SearchSettings("moead", 6, 4, 0))
    assert {one.quality.mean_kl for one in found} == {WORST_KL}


def test_an_impossible_budget_is_refused():
    space = additive_space(0, sinks=(1, 0))
    with pytest.raises(ConfigError, match="budget of 239 bytes per token is too small; the smallest cache takes 240"):
        run(space, additive(space), 239, SearchSettings())
    assert run(space, additive(space), 240, SearchSettings("nsga2", 4, 4, 0))[0][0].cost == 240


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"sampler": "tpe"}, "sampler 'tpe'"), ({"trials": 0}, "0 trials"), ({"population": 3}, "population of 3")],
)
def test_bad_settings_are_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        SearchSettings(**changes)


def test_seeds_are_the_exact_front_and_reach_the_budget():
    space = additive_space(4, sinks=(0, 1))
    seeds = seed_genes(space, BUDGET, 16)
    assert len(set(seeds)) == len(seeds) == 16
    optimum = brute_front(space, additive(space), BUDGET)[-1][1]
    assert space.predicted(space.candidate(seeds[0])) == pytest.approx(optimum, rel=1e-12)
    assert min(space.cost(space.candidate(genes)) for genes in seeds) == space.least


def test_a_held_or_foreign_journal_is_refused(tmp_path):
    path = tmp_path / "journal.log"
    with Ledger(path), pytest.raises(InputRefused, match="held by another search"):
        Ledger(path)
    Ledger(path).close()
    with pytest.raises(InputRefused, match="cannot open"):
        Ledger(tmp_path / "missing" / "journal.log")
    for text in ('{"a": 1}\n', "hello\n", "[1]\n", "\0\n"):
        other = tmp_path / "other.log"
        other.write_text(text)
        with pytest.raises(InputRefused, match="is not a journal of a search"):
            Ledger(other).close()
        assert other.read_text() == text, "a foreign file is left as it was"


def test_a_torn_last_line_is_cut_off(tmp_path):
    space = additive_space(0)
    path = tmp_path / "journal.log"
    settings = SearchSettings("nsga2", 20, 8, 0)
    expected, _ = run(space, interacting(space), BUDGET, settings, path)
    whole = path.read_bytes()
    for cut in (1, 7, 60, 400):
        path.write_bytes(whole[:-cut])
        found, _ = run(space, interacting(space), BUDGET, settings, path)
        assert [f.candidate.key for f in found] == [f.candidate.key for f in expected], f"{cut} bytes lost"
