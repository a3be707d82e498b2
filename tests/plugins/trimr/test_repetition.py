import keyword
import random
import sysconfig
import time
from pathlib import Path

import pytest

from jettison.plugins.trimr.config import Repeat, TrimROptions
from jettison.plugins.trimr.machine import Trimmer
from jettison.plugins.trimr.repetition import LoopDetector, Words
from jettison.plugins.trimr.rules import Repetition

OPTIONS = Repeat()
RULE = Repetition(OPTIONS)
SHORTEST = OPTIONS.times * OPTIONS.window


def first_fire(tokens, options=OPTIONS):
    """Number of tokens after which a run counts as a loop, by the detector."""
    detector, rule = LoopDetector(options), Repetition(options)
    for count, token in enumerate(tokens, 1):
        detector.push([token])
        if any(rule.is_loop(loop, structured=False) for loop in detector.loops()):
            return count
    return None


def first_fire_by_force(tokens, options=OPTIONS):
    """The same by trying every period at every place."""
    runs = [0] * (options.max_period + 1)
    for at in range(len(tokens)):
        for period in range(1, min(at, options.max_period) + 1):
            runs[period] = runs[period] + 1 if tokens[at] == tokens[at - period] else 0
            long_enough = runs[period] + period >= max(options.times * period, options.times * options.window)
            if long_enough and runs[period] >= options.window:
                return at + 1
    return None


@pytest.mark.parametrize("period", range(1, 201))
def test_t3_a_planted_loop_is_found_within_four_periods_and_a_window(period):
    rng = random.Random(period)
    before = [rng.randrange(50_000) for _ in range(rng.randint(0, 700))]
    unit = [rng.randrange(50_000) for _ in range(period)]
    found = first_fire(before + unit * (80 // period + 6))
    assert found is not None, f"period {period} was not found"
    late = found - len(before)
    assert late <= max(4 * period, SHORTEST) + OPTIONS.window, f"period {period}: found after {late} tokens"
    assert late >= max(4 * period, SHORTEST) - 2, f"period {period}: {late} tokens are not four periods"


@pytest.mark.parametrize("seed", range(60))
def test_t3_the_detector_fires_where_trying_every_period_does(seed):
    rng = random.Random(seed)
    options = Repeat(window=rng.choice((4, 6, 16)), times=rng.choice((2, 3, 4)), max_period=rng.choice((5, 40, 200)))
    alphabet, tokens = rng.choice((1, 2, 3, 20)), []
    while len(tokens) < 700:
        part = [rng.randrange(alphabet) for _ in range(rng.randint(1, 60))]
        tokens += part * rng.choice((1, 1, 1, 2, 3, 5))
    wanted = first_fire_by_force(tokens, options)
    found = first_fire(tokens, options)
    assert (found is None) == (wanted is None), f"seed {seed}: {found} instead of {wanted}"
    if wanted is not None:
        assert wanted <= found <= wanted + options.window, f"seed {seed}: {found} instead of {wanted}"


def test_t3_every_run_is_a_real_one():
    rng = random.Random(1)
    tokens = [rng.randrange(3) for _ in range(40)] * 9 + [1 << 70, -5, 0, 2**63] * 40
    detector = LoopDetector(OPTIONS)
    detector.push(tokens)
    loops = detector.loops()
    assert loops[0].period == 4
    for period, length in loops:
        tail = tokens[-length:]
        assert tail[period:] == tail[:-period], (period, length)
        assert length == len(tokens) or tokens[-length - 1] != tokens[-length - 1 + period], "the run is the longest"


def code_lines():
    """Real code: modules of the standard library, comments and all."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for name in ("tokenize", "argparse", "typing", "inspect", "turtle", "locale", "mailbox", "tarfile", "difflib"):
        yield from (folder / f"{name}.py").read_text(encoding="utf-8").splitlines(keepends=True)


def tables_and_lists():
    rng = random.Random(0)
    for table in range(60):
        columns = rng.randint(2, 8)
        yield "| " + " | ".join(f"column {chr(97 + n)}" for n in range(columns)) + " |\n"
        yield "|" + "---|" * columns + "\n"
        for row in range(rng.randint(5, 40)):
            yield "| " + " | ".join(rng.choice(("yes", "no", str(row), "n/a")) for _ in range(columns)) + " |\n"
        yield f"\nTable {table} ends here.\n\n"
    for number in range(1, 1_500):
        yield f"{number}. {rng.choice(keyword.kwlist)} comes before {rng.choice(keyword.kwlist)}\n"
    for number in range(800):
        yield f"- item {number}: {rng.random():.3f}\n"
    for number in range(800):
        yield f"{number},{number * number},{rng.choice((0, 1))},{rng.choice((0, 1))},0,0,0\n"
    for bits in range(256):
        yield " ".join(f"{bits:08b}") + f" -> {bits}\n"
    yield "=" * 400 + "\n" + "-" * 300 + "\n" + "0" * 200 + "\n"


def fires(pieces, tokens_of):
    """Where, if anywhere, the repetition rule of a whole request fires."""
    options = TrimROptions(min_think_tokens=0, poll_tokens=1, n_thres=100_000)
    trimmer = Trimmer(options, "Tidy this up.")
    for number, piece in enumerate(pieces):
        trimmer.feed(piece, tokens_of(piece))
        if trimmer.decision is not None:
            return f"line {number}: {piece!r} after {trimmer.thinking_tokens} tokens: {trimmer.decision.rule}"
    return None


def test_t3_ten_thousand_lines_of_code_tables_and_lists_are_no_loop():
    code, rest = list(code_lines()), list(tables_and_lists())
    assert len(code) + len(rest) >= 10_000
    words = Words()
    assert fires(code, words.push) is None
    fenced = ["```python\n", *code, "```\n"]
    assert fires(fenced, lambda line: max(1, len(line) // 4)) is None
    assert fires(rest, lambda line: max(1, len(line) // 4)) is None
    assert fires(rest, lambda line: list(line.encode())) is None, "one token per byte"


def test_t3_a_loop_in_prose_ends_a_request_and_one_in_a_table_later():
    said = "The seventh number is still missing, so I will count again. "
    trimmer = Trimmer(TrimROptions(min_think_tokens=0, poll_tokens=1), "How many?")
    count = 0
    while trimmer.decision is None and count < 50:
        trimmer.feed(said, list(said.encode()))
        count += 1
    assert trimmer.decision is not None
    assert (trimmer.decision.rule, trimmer.decision.force) == ("repetition", "forceful")
    assert count == 4
    row = "| yes | no |\n"
    trimmer = Trimmer(TrimROptions(min_think_tokens=0, poll_tokens=1), "How many?")
    count = 0
    while trimmer.decision is None and count < 100:
        trimmer.feed(row, list(row.encode()))
        count += 1
    assert count == -(-OPTIONS.structure_tokens // len(row)), "a table is a loop from structure_tokens on"


def coverage_by_force(tokens, options):
    window = tokens[-options.span :]
    covered = set()
    for end in range(options.ngram, len(window) + 1):
        gram = window[end - options.ngram : end]
        varied = len(set(gram)) >= options.ngram // 4
        if varied and any(window[at : at + options.ngram] == gram for at in range(end - options.ngram)):
            covered |= set(range(end - options.ngram, end))
    return len(covered) / options.span if len(tokens) >= options.span else 0.0


def test_t3_text_that_repeats_in_large_parts_is_a_loop_too():
    rng = random.Random(5)
    part = [rng.randrange(1_000) for _ in range(100)]
    tokens = []
    while len(tokens) < 2_048:  # never back to back: a new remark stands between
        tokens += part + [rng.randrange(1_000) for _ in range(5)]
    detector = LoopDetector(OPTIONS)
    detector.push(tokens)
    assert detector.coverage == pytest.approx(coverage_by_force(tokens, OPTIONS))
    assert detector.coverage >= OPTIONS.coverage
    assert not any(RULE.is_loop(loop, structured=False) for loop in detector.loops())
    code = LoopDetector(OPTIONS)
    code.push(tokens, structured=True)
    assert code.coverage == 0.0


@pytest.mark.parametrize("seed", range(8))
def test_t3_coverage_is_that_of_a_direct_count(seed):
    rng = random.Random(seed)
    options = Repeat(window=4, ngram=rng.choice((4, 8, 32)), span=rng.choice((64, 200)), max_period=50)
    tokens = [rng.randrange(3) if rng.random() < 0.95 else rng.randrange(100) for _ in range(900)]
    detector = LoopDetector(options)
    for at, token in enumerate(tokens, 1):
        detector.push([token])
        if at % (options.span // 2) == 0:
            wanted = coverage_by_force(tokens[:at], options)
            assert detector.coverage == pytest.approx(wanted), f"seed {seed}, token {at}, {options}"


def test_t3_a_long_request_needs_little_memory_and_time():
    detector = LoopDetector(OPTIONS)
    rng = random.Random(3)
    start = time.process_time()
    for _ in range(2_000):
        detector.push([rng.randrange(50_000) for _ in range(50)])
        assert detector.loops() == []
    assert len(detector._ids) <= 2 * detector._keep
    assert time.process_time() - start < 3, "100,000 tokens"
    unit = [rng.randrange(50_000) for _ in range(1_000)]
    detector.push(unit * 4)
    assert detector.loops()[0] == (1_000, 4_000)


def test_t3_words_are_the_same_in_any_pieces():
    text = "".join(code_lines())[:3_000] + "等等，12 + 34 = 46。" + "a" * 200 + " " * 200
    whole = Words().push(text + "\n")
    words, rng, parts, at = Words(), random.Random(2), [], 0
    while at < len(text) + 1:
        size = rng.randint(0, 9)
        parts += words.push((text + "\n")[at : at + size])
        at += size
    assert parts == whole
