import json
import random
import re

import pytest

from faults import mutate
from faults.kill import kill_repeatedly
from jettison.hooks import InputRefused
from jettison.hooks.results import Results, Row, load

KILLS = 12
WRITER = """
import itertools, sys
from jettison.hooks.results import Results
results = Results.start(command="test", device="cpu")
print("ready", flush=True)
for size in itertools.count(1):
    results.add(f"case{size}" + "x" * 2000, "jettison", "m", size, "s")
    results.write(sys.argv[1])
"""


def _results():
    results = Results.start(command="bench", device="cpu")
    results.add("16x4096", "jettison", "decode_ratio", 1.5, "ratio")
    results.add("16x4096", "vllm", "decode_ratio", 1, "ratio")
    return results


def test_round_trip(tmp_path):
    results = _results()
    file = results.write(tmp_path / "new" / "folder" / "r.json")
    assert load(file) == results
    assert set(json.loads(file.read_text())) == {"command", "commit", "date", "device", "versions", "rows"}
    assert set(json.loads(file.read_text())["rows"][0]) == {"case", "system", "metric", "value", "unit"}
    assert results.value("16x4096", "decode_ratio") == 1.5
    assert results.value("16x4096", "decode_ratio", "vllm") == 1.0


def test_start_records_where_it_ran():
    results = Results.start()
    assert results.versions.keys() >= {"python", "jettison", "torch"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", results.date)
    assert results.device


def test_missing_figure_is_named():
    with pytest.raises(InputRefused, match="no row 'a' / 'jettison' / 'b'"):
        _results().value("a", "b")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figures_are_finite(value):
    with pytest.raises(ValueError, match="finite"):
        _results().add("a", "jettison", "b", value, "s")


def test_mutated_files(tmp_path):
    results = _results()
    original = results.model_dump(mode="json")
    rng = random.Random(3)
    file = tmp_path / "r.json"

    def read(data):
        file.write_bytes(data)
        found = load(file)
        assert all(isinstance(row, Row) for row in found.rows)
        # NOTES: a changed figure or name is a valid file, so only crashes and slowness count here.

    cases = ((what, mutate.dump(broken)) for what, broken in (mutate.structural(original, rng) for _ in range(500)))
    damaged = (mutate.byte_level(mutate.dump(original), rng) for _ in range(500))
    for stream in (cases, damaged):
        counts, findings = mutate.judge(stream, read, None)
        assert not findings, findings[:5]
        assert counts["rejected"] > 200


def test_killed_writers_leave_whole_files(tmp_path):
    file = tmp_path / "r.json"
    seen = []

    def inspect():
        if file.exists():
            seen.append(len(load(file).rows))

    kill_repeatedly(WRITER, [str(file)], inspect, times=KILLS, rng=random.Random(8), longest=0.1)
    assert len(seen) > KILLS / 2, f"files seen: {seen}"
