import codecs
import random
import time
from pathlib import Path

import pytest

from jettison.plugins.trimr.markers import families, markers_of
from jettison.plugins.trimr.segment import Segmenter

GOLDEN = Path(__file__).with_name("golden_thoughts.txt")


def corpus():
    """Name, text, and the offsets of its boundaries (marked § in the file by hand)."""
    traces = []
    for part in GOLDEN.read_text(encoding="utf-8").split("=== ")[1:]:
        name, marked = part.split("\n", 1)
        pieces = marked.rstrip("\n").split("§")
        ends = [sum(map(len, pieces[: n + 1])) for n in range(len(pieces) - 1)]
        traces.append((name, "".join(pieces), ends))
    return traces


TRACES = corpus()
ALL = [name for name, _, _ in TRACES]


def one_shot(text, markers=None):
    segmenter = Segmenter(markers or markers_of("auto"))
    return segmenter.push(text) + segmenter.flush()


def test_t1_the_golden_corpus_is_cut_as_by_hand():
    assert len(TRACES) >= 60
    right = found = wanted = 0
    wrong = {}
    for name, text, ends in TRACES:
        cuts = one_shot(text)
        right += len(set(cuts) & set(ends))
        found += len(cuts)
        wanted += len(ends)
        if cuts != ends:
            wrong[name] = {"missed": sorted(set(ends) - set(cuts)), "extra": sorted(set(cuts) - set(ends))}
    recall, precision = right / wanted, right / found
    assert recall >= 0.95, f"recall {recall:.3f} of {wanted}: {wrong}"
    assert precision >= 0.9, f"precision {precision:.3f} of {found}: {wrong}"


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, text, _ in TRACES], ids=ALL)
def test_t1_byte_by_byte_cuts_as_one_shot(name, text):
    whole = one_shot(text)
    decoder = codecs.getincrementaldecoder("utf-8")()
    segmenter = Segmenter(markers_of("auto"))
    cuts = [cut for byte in text.encode() for cut in segmenter.push(decoder.decode(bytes([byte])))]
    assert cuts + segmenter.flush() == whole, name
    rng = random.Random(name)
    for _ in range(20):
        segmenter, cuts, at = Segmenter(markers_of("auto")), [], 0
        while at < len(text):
            size = rng.choice((0, 1, 2, 3, 7, 40))
            cuts += segmenter.push(text[at : at + size])
            at += size
        assert cuts + segmenter.flush() == whole, name


def test_t1_windows_line_ends_are_cut_alike():
    for name, text, ends in TRACES:
        unix = [text[cut : cut + 12] for cut in one_shot(text)]
        windows = text.replace("\n", "\r\n")
        assert [windows.replace("\r", "") and windows[cut : cut + 12].split("\r")[0] for cut in one_shot(windows)] == [
            part.split("\n")[0] for part in unix
        ], (name, ends)


@pytest.mark.parametrize("family", families())
def test_t1_every_marker_of_every_family_cuts_and_longer_words_do_not(family):
    for marker in markers_of(family):
        text = f"The result is 3.\n\n{marker} here it goes.\n"
        assert one_shot(text, markers_of(family)) == [len("The result is 3.\n\n")], (family, marker)
        if marker[-1].isascii() and marker[-1].isalpha():
            longer = f"The result is 3.\n\n{marker}xyz here it goes.\n"
            assert one_shot(longer, [marker]) == [], (family, marker)


def test_t1_a_list_of_markers_replaces_the_family():
    text = "It is 3.\n\nWait, no.\n\nStop. Again.\n"
    assert one_shot(text, ("Stop",)) == [text.index("Stop")]
    assert one_shot("It is 3.\n\na+b is it\n", ("a+b",)) == [10]
    assert one_shot("It is 3.\n\naab is it\n", ("a+b",)) == []


def test_t1_an_opening_that_never_closes_is_forgotten():
    for opening, limit in (("\\[", 2_000), ("“", 2_000), ("```", 20_000), ("<tool_call>", 50_000)):
        near = f"Start.\n{opening} x\n" + "words of text.\n" * 20 + "\nWait, no.\n"
        assert one_shot(near) == [], opening
        far = f"Start.\n{opening} x\n" + "words of text.\n" * (limit // 14) + "\nWait, no.\n"
        assert one_shot(far) == [far.index("Wait")], opening


def test_t1_hostile_text_takes_linear_time():
    for unit in ("\\[", "```\n", "“", "a" * 99 + " ", "| ", "\n", "Wait", "`", "$$", "<tool_call", ",", "\t", '"'):
        times = []
        for size in (1 << 16, 1 << 19):
            text = (unit * (size // len(unit) + 1))[:size]
            start = time.process_time()
            one_shot(text)
            times.append(time.process_time() - start)
        assert times[1] < 40 * max(times[0], 0.01), f"{unit!r}: 64 KiB took {times[0]:.3f} s, 512 KiB {times[1]:.3f} s"


def test_what_protects_the_end_of_the_text_is_known():
    segmenter = Segmenter(markers_of("auto"))
    segmenter.push("So.\n```\ncode\n")
    assert segmenter.protected
    assert segmenter.structured
    assert not segmenter.in_tool_call
    segmenter.push("```\ntext <tool_call>{")
    assert not segmenter.protected
    assert segmenter.in_tool_call
    segmenter.push('"a": 1}\n')
    assert segmenter.in_tool_call
    segmenter.push("</tool_call> and so on")
    assert not segmenter.in_tool_call
