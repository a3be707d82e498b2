import random
import subprocess
import sys
from pathlib import Path

import pytest

from faults import mutate
from jettison.hooks import InputRefused
from jettison.hooks.files import parse_document, read_document, write_atomically

ATTACKS = sorted((Path(__file__).parent.parent / "attacks").glob("*"))


@pytest.mark.parametrize("attack", [path for path in ATTACKS if path.suffix != ".md"], ids=lambda path: path.name)
def test_attack_is_refused(attack):
    with pytest.raises(InputRefused) as caught:
        read_document(attack)
    assert attack.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "yaml"),
    [(mutate.deep(), False), (mutate.deep(opening='{"a":', closing="}"), False), (mutate.deep(2000), True)],
)
def test_depth_is_bounded(text, yaml):
    with pytest.raises(InputRefused, match="deep"):
        parse_document(text, "x", yaml=yaml)


def test_huge_integers_are_kept_or_refused():
    assert parse_document(str(2**64 + 1), "x") == 2**64 + 1
    with pytest.raises(InputRefused):
        parse_document("9" * 100_000, "x")


def test_size_is_bounded(tmp_path):
    file = tmp_path / "big.json"
    file.write_text('"' + "x" * 2000 + '"')
    with pytest.raises(InputRefused, match="larger than 1000 bytes"):
        read_document(file, max_bytes=1000)


@pytest.mark.parametrize("name", ["missing.json", "folder.json", "table.pickle", "table", "nul\x00.json"])
def test_unreadable(name, tmp_path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputRefused):
        read_document(tmp_path / name)


@pytest.mark.parametrize("yaml", [False, True])
def test_mutated_documents(yaml):
    original = {"a": [1, 2.5, {"b": "text"}], "c": {"d": None, "e": True}}
    data = mutate.dump(original)
    rng = random.Random(20)
    cases = (mutate.byte_level(data, rng) for _ in range(2000))

    def read(mutated):
        try:
            text = mutated.decode()
        except UnicodeDecodeError as error:
            raise InputRefused("not UTF-8") from error
        parse_document(text, "case", yaml=yaml)
        return original

    counts, findings = mutate.judge(cases, read, original)
    assert not findings, findings[:5]
    assert counts["rejected"] > 500


def test_write_replaces_whole(tmp_path):
    target = tmp_path / "result.json"
    write_atomically(target, "old")
    write_atomically(target, "new", mode=0o600)
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("place", ["missing/result.json", "folder"])
def test_write_failure_leaves_nothing(place, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "keep").touch()
    with pytest.raises(InputRefused, match="cannot write"):
        write_atomically(tmp_path / place, "x")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_write_through_a_link_replaces_the_link_only(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    link = tmp_path / "link"
    link.symlink_to(outside)
    write_atomically(link, "new")
    assert outside.read_text() == "untouched"
    assert link.read_text() == "new"


def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    """A child may write 1,000 bytes to a file; its target was there before and stays."""
    target = tmp_path / "result.json"
    target.write_text("old")
    program = (
        "import resource, signal, sys; from jettison.hooks.files import write_atomically; "
        "from jettison.hooks import InputRefused; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_atomically(sys.argv[1], 'x' * 5000)\n"
        "except InputRefused as error:\n    print(error)\n"
    )
    answer = subprocess.run([sys.executable, "-B", "-c", program, target], capture_output=True, text=True, check=True)
    assert answer.stdout == f"cannot write {target} (File too large); give a writable place.\n"
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
