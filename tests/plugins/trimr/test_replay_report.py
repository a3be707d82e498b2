"""What replay reports: cuts, false stops and losses counted by hand, intervals that cover, and the choice."""

import json
import math

import numpy as np
import pytest

from jettison.hooks.cli import main
from jettison.hooks.errors import InputRefused
from jettison.hooks.results import load
from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.machine import Trimmer
from jettison.plugins.trimr.replay import Outcome, run, wholes
from jettison.plugins.trimr.replay_choose import Setting, choose, difference_interval, figures, grid, wilson
from jettison.plugins.trimr.shadow import Line, read_traces
from jettison.plugins.trimr.types import ThinkingStrings

SETTINGS = {"min_think_tokens": 0, "min_thought_tokens": 0, "poll_tokens": 1, "shadow": True, "log_text": True}


def stated(*answers):
    """Thinking that states these answers in turn, and tells how many words each thought has."""
    return "\n\nWait, let me look again. ".join(f"I compute it. So the answer is {answer}." for answer in answers)


def write(path, *traces, text=True):
    """Log (answers while thinking, final answer, expected) traces, a word a token."""
    lines = []
    for number, (answers, final, expected) in enumerate(traces):
        options = TrimROptions(**{**SETTINGS, "log_text": text})
        events = []
        trimmer = Trimmer(options, "How much is it?", 500, ThinkingStrings(), log=events.append)
        output = f"{stated(*answers)}</think>The answer is {final}."
        for word in output.replace(" ", " \0").split("\0"):
            trimmer.feed(word, 1)
        trimmer.finish()
        lines += [Line(request=f"q{number}", expected=expected, event=event).model_dump_json() for event in events]
    path.write_text("\n".join(lines) + "\n")
    return path


SETTLED = ((5, 5, 5, 5, 5, 5), 5, "5")
WRONG_THEN_RIGHT = ((4, 4, 4, 5, 5, 5), 5, "5")
WAVERING = ((1, 2, 3, 4, 5), 5, "5")


def test_t8_outcomes_are_those_of_the_text(tmp_path):
    requests, _ = wholes(read_traces(write(tmp_path / "t.jsonl", SETTLED, WRONG_THEN_RIGHT, WAVERING)))
    two = [run(request, TrimROptions(M=2)) for request in requests]
    assert [outcome.rule for outcome in two] == ["overthinking", "overthinking", None]
    assert [outcome.kept for outcome in two] == [True, False, True], "4 4 4 would have become 5"
    assert [outcome.right for outcome in two] == [True, False, True]
    assert [outcome.whole_right for outcome in two] == [True, True, True]
    words = len(stated(*SETTLED[0]).split(" "))
    assert two[0].whole_tokens == words
    third = len(stated(5, 5, 5).split(" "))
    assert third <= two[0].tokens <= third + 6, "cut when the third thought has ended"
    assert two[2].tokens == two[2].whole_tokens
    three = run(requests[1], TrimROptions(M=3))
    assert three.rule is None, "neither answer comes four times"


def test_t8_figures_by_hand():
    outcomes = [
        Outcome("overthinking", 40, 100, True, True, True),
        Outcome("overthinking", 60, 100, False, False, True),
        Outcome("repetition", 50, 200, False, True, False),
        Outcome(None, 100, 100, True, True, True),
    ]
    got = figures(outcomes)
    assert (got.requests, got.cuts, got.false_stops) == (4, 3, 2)
    assert got.rules == {"overthinking": 2, "repetition": 1}
    assert got.saved == pytest.approx(0.5)
    assert (got.accuracy, got.whole_accuracy, got.loss) == (0.75, 0.75, 0.0)
    assert got.false_stop_rate == pytest.approx(2 / 3)
    assert got.saved_interval[0] < 0.5 < got.saved_interval[1]
    assert figures(outcomes) == got, "the same seed"
    blind = figures([Outcome("overthinking", 1, 2, kept, None, None) for kept in (True, False)])
    assert (blind.accuracy, blind.whole_accuracy) == (0.5, 1.0), "without expected answers: agreement"


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (10, 10), (17, 400)])
def test_t8_wilson_bounds_solve_its_equation(hits, trials):
    """The bounds are the shares p at which (hits/trials - p)^2 = z^2 p (1 - p) / trials."""
    z = 1.959963984540054
    for bound in wilson(hits, trials):
        assert (hits / trials - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / trials, abs=1e-9)
    assert wilson(0, 0) == (0.0, 1.0)


def test_t8_the_interval_of_a_difference_covers_it():
    """Coverage over 2,000 draws with known loss; the shares of 95 % intervals that miss are counted."""
    source = np.random.default_rng(7)
    for count, worse, better in ((60, 0.1, 0.02), (200, 0.05, 0.05), (400, 0.01, 0.0), (50, 0.4, 0.4)):
        truth, missed = worse - better, 0
        for _ in range(2_000):
            draw = source.random(count)
            differences = np.where(draw < worse, 1.0, np.where(draw < worse + better, -1.0, 0.0))
            low, high = difference_interval(differences)
            missed += not low <= truth <= high
        # NOTES: 5 % of 2,000 is 100, with a standard error of 10; 150 is five of these.
        assert missed <= 150, (count, worse, better, missed)
    low, high = difference_interval(np.zeros(50))
    assert low < 0 < high, "no difference seen is not no difference"
    assert math.isclose(low, -high)


def test_t8_the_choice_saves_most_within_the_limit_and_is_reported_on_other_requests():
    safe, bold, idle = (Setting((("M", m),)) for m in (3, 1, 5))
    good = [Outcome("overthinking", 60, 100, True, True, True)] * 800
    bad = [Outcome("overthinking", 20, 100, i % 4 > 0, i % 4 > 0, True) for i in range(800)]
    none = [Outcome(None, 100, 100, True, True, True)] * 800
    best, held_out = choose({safe: good, bold: bad, idle: none}, 0.01)
    assert best == safe
    assert held_out is not None
    assert held_out.requests == 400
    assert choose({bold: bad}, 0.01) == (None, None)
    assert choose({safe: good[:20]}, 0.01) == (None, None), "20 requests prove nothing to one point"


def test_grids_are_products():
    assert [s.name for s in grid(M=[1, 2], count_mode=["windowed"])] == [
        "M=1 count_mode=windowed", "M=2 count_mode=windowed",
    ]  # fmt: skip


def test_t8_the_command_writes_results_and_a_picture(tmp_path, capsys):
    log = write(tmp_path / "t.jsonl", *[SETTLED, WAVERING] * 30)
    output = tmp_path / "r.json"
    words = ["trimr", "replay", str(log), "--m", "2,3", "--count-mode", "consecutive", "--max-loss", "15"]
    code = main([*words, "-o", str(output), "--json"])
    content = json.loads(capsys.readouterr().out)
    assert code == 0
    assert content["chosen"] == {"M": 2, "count_mode": "consecutive"}
    assert content["measure"] == "accuracy"
    assert load(output).value("M=2 count_mode=consecutive", "false_stop_rate") == 0.0
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert main([*words[:-1], "1"]) == 1, "60 requests cannot prove one point"
    assert "No setting" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: "", "has no trace from start to finish"),
        (lambda text: text.replace('"event":"feed"', '"event":"fed"', 1), "is refused at event.event"),
        (lambda text: text.replace("{", "[", 1), "cannot be used"),
        (lambda text: text.split("\n", 1)[1], "has no trace from start to finish"),
    ],
)
def test_bad_logs_are_one_sentence(tmp_path, capsys, change, sentence):
    path = write(tmp_path / "t.jsonl", SETTLED)
    path.write_text(change(path.read_text()))
    assert main(["trimr", "replay", str(path)]) == 4
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said


def test_logs_without_text_and_bad_flags_are_one_sentence(tmp_path, capsys):
    path = write(tmp_path / "t.jsonl", SETTLED, text=False)
    assert main(["trimr", "replay", str(path)]) == 4
    assert "has no text" in capsys.readouterr().err
    path = write(tmp_path / "t.jsonl", SETTLED)
    for words, sentence in (
        (["--m", "two"], "--m 'two' is not a list of numbers"), (["--m", "0"], "option 'trimr.M'"),
        (["--count-mode", "none"], "count_mode"), (["--m", ","], "is empty"),
    ):  # fmt: skip
        assert main(["trimr", "replay", str(path), *words]) == 2, words
        assert sentence in capsys.readouterr().err, words
    assert main(["trimr", "replay", str(tmp_path / "absent.jsonl")]) == 4
    assert "cannot read" in capsys.readouterr().err


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = write(tmp_path / "t.jsonl", SETTLED, WAVERING)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert len(read_traces(path)) == 1


def test_traces_that_were_cut_while_they_ran_are_not_replayed(tmp_path):
    path = write(tmp_path / "t.jsonl", SETTLED, WAVERING)
    lines = path.read_text().splitlines()
    lines[3] = lines[3].replace('"event":"feed"', '"event":"applied"')
    path.write_text("\n".join(lines) + "\n")
    requests, left_out = wholes(read_traces(path))
    assert ([len(requests[0].trace.events) > 0, left_out], requests[0].trace.name) == ([True, 1], "/q1/0")
    first = lines[: next(at for at, line in enumerate(lines) if '"q1"' in line)]
    path.write_text("\n".join(first) + "\n")
    traces = read_traces(path)
    with pytest.raises(InputRefused, match="every trace was cut"):
        wholes(traces)
