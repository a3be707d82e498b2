"""`jettison kvtuner search`, `report` and `compare` on a tiny model, as a user runs them."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from click.testing import CliRunner

import tiny_models
from jettison.hooks import ConfigError, InputRefused
from jettison.plugins.kvtuner.command import kvtuner
from jettison.plugins.kvtuner.report import load_record
from jettison.plugins.kvtuner.table import load_table

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = ("--trials", "10", "--population", "4", "--length", "128", "--search-length", "64", "--items", "4")


def call(*words):
    done = CliRunner().invoke(kvtuner, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder, a text of its words, and a task."""
    folder = tmp_path_factory.mktemp("commands")
    tiny_models.llama(folder / "llama")
    generator = torch.Generator().manual_seed(0)
    words = [f"w{n}" for n in torch.randint(0, 250, (600,), generator=generator).tolist()]
    (folder / "text.txt").write_text(" ".join(words))
    items = [{"context": " ".join(words[n : n + 20]), "continuation": f" {words[n + 20]}"} for n in range(0, 200, 20)]
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, items)))
    return folder


@pytest.fixture(scope="module")
def searched(place):
    words = ("search", place / "llama", "-o", place / "t.json", "--bits", "4.75", "--text", place / "text.txt")
    done = call(*words, "--task", place / "task.jsonl", *SMALL, "--json")
    return json.loads(done.stdout)


def test_search_prints_both_sizes_and_writes_everything(place, searched):
    table = load_table(place / "t.json")
    assert searched["real_bits"] <= 4.75
    assert searched["nominal_bits"] < searched["real_bits"]
    assert searched["bytes_per_token"] == table.sizes.bytes_per_token <= searched["budget_bytes"]
    assert searched["budget_bytes"] == int(4.75 * 2 * 4 * 2 * 64 / 8)
    assert searched["accuracy"]["task"]["items"] == 4
    assert sorted(p.name for p in (place / "t.search").iterdir() if p.suffix != ".safetensors") == [
        "journal.log",
        "record.json",
        "report.html",
        "report.png",
    ]


def test_searching_again_takes_up_the_work(place, searched):
    words = ("search", place / "llama", "-o", place / "t.json", "--bits", "4.75", "--text", place / "text.txt")
    before = load_table(place / "t.json")
    again = json.loads(call(*words, "--task", place / "task.jsonl", *SMALL, "--json").stdout)
    assert again["evaluations"] == 0
    assert searched["evaluations"] > 0
    assert load_table(place / "t.json").payload == before.payload
    assert load_record(place / "t.search" / "record.json", load_table(place / "t.json")).searched


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.pictures, self.links, self.cells = [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "img":
            self.pictures.append(found["src"])
        self.links += [found[name] for name in ("href", "src") if name in found and tag != "img"]

    def handle_data(self, data):
        self.cells.append(data.strip())


def test_the_report_is_one_page_that_needs_nothing_else(place, searched):
    done = call("report", place / "t.json", "-o", place / "other.html", "--json")
    assert json.loads(done.stdout) == {"report": str(place / "other.html"), "picture": str(place / "other.png")}
    page = Page()
    page.feed((place / "other.html").read_text())
    assert page.links == []
    (picture,) = page.pictures
    data = base64.b64decode(picture.removeprefix("data:image/png;base64,"))
    assert data == (place / "other.png").read_bytes()
    assert data.startswith(PNG)
    table = load_table(place / "t.json")
    assert table.payload_sha256 in " ".join(page.cells)
    start = page.cells.index("group")
    numbers = [cell for cell in page.cells[start + 1 :] if re.fullmatch(r"\d+", cell)]
    rows = [tuple(map(int, numbers[4 * n : 4 * n + 3])) for n in range(tiny_models.LAYERS)]
    assert rows == [(n, *pair) for n, pair in enumerate(table.payload.pairs)]


def test_names_are_escaped(place, searched):
    from jettison.plugins.kvtuner.report_page import render

    table = load_table(place / "t.json")
    record = load_record(place / "t.search" / "record.json", table)
    evil = table.model_copy(update={"model": table.model.model_copy(update={"name": "<script>alert(1)</script>"})})
    page = render(record, evil, "")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_record_of_another_table_is_refused(place, searched):
    table = load_table(place / "t.json")
    path = place / "t.search" / "record.json"
    record = json.loads(path.read_text())
    for change, sentence in (
        ({"payload_sha256": "0" * 64}, "belongs to another table"),
        ({"heat": [[1.0]]}, "the heat map has not 16 columns"),
        ({"finalists": []}, "refused at finalists"),
        ({"schema": 2}, "refused at schema"),
        ({"uniform": [{**record["uniform"][0], "pairs": "k8v4"}]}, "a candidate has 1 layers"),
    ):
        other = place / "record.json"
        other.write_text(json.dumps({**record, **change}))
        with pytest.raises(InputRefused, match=sentence):
            load_record(other, table)


def test_compare_is_paired_and_shows_both_sizes(place, searched):
    words = ("compare", place / "t.json", "k4v4", "k16v16", "--model", place / "llama", "--text", place / "text.txt")
    rows = json.loads(call(*words, "--length", "256", "--json").stdout)
    assert [row["table"] for row in rows] == ["t.json", "k4v4", "k16v16"]
    assert rows[0]["to_first"] == 0.0
    assert rows[0]["real_bits"] == pytest.approx(searched["real_bits"], abs=1e-4)
    assert rows[1]["real_bits"] == 4.5
    assert rows[1]["nominal_bits"] == 4.0
    assert rows[2]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["to_first"] == pytest.approx(rows[1]["kl"] - rows[0]["kl"], abs=1e-9)
    assert "held-out text" in call(*words, "--length", "64").stdout


def test_a_search_among_codecs_is_compared_shown_and_drawn(place):
    table, text = place / "named.json", ("--text", place / "text.txt")
    words = ("search", place / "llama", "-o", table, "--bits", "6", "--codecs", "fp8, int4,int4-hadamard", *text)
    facts = json.loads(call(*words, *SMALL, "--items", "0", "--sampler", "dp", "--json").stdout)
    assert facts["codec"] == "named"
    assert facts["real_bits"] <= 6
    record = load_record(place / "named.search" / "record.json", load_table(table))
    assert len(record.options) == 9
    assert record.options[:2] == ["fp8/fp8", "fp8/int4"]
    assert (place / "named.search" / "report.png").read_bytes().startswith(PNG)
    for pair in load_table(table).payload.named:
        assert f"<td>{pair[0]}</td><td>{pair[1]}</td>" in (place / "named.search" / "report.html").read_text()
    assert "int4" in call("show", table).stdout
    assert "engines refuse it" in " ".join(call("show", table).stdout.split())
    tried = ("fp8/fp8", "k4v4", "int4-hadamard/int4-hadamard", "16/int8")
    rows = json.loads(call("compare", table, *tried, "--model", place / "llama", *text, "--json").stdout)
    assert [row["table"] for row in rows] == ["named.json", *tried]
    assert [row["real_bits"] for row in rows[1:]] == [8.0, 4.5, 4.5, 12.25]
    assert rows[0]["bytes_per_token"] == facts["bytes_per_token"]
    assert rows[2]["kl"] == rows[3]["kl"] > rows[1]["kl"] > rows[4]["kl"] > 0


def test_the_codecs_are_listed_with_what_they_cost():
    rows = {row["codec"]: row for row in json.loads(call("codecs", "--head-size", "128", "--json").stdout)}
    assert rows["int4-hadamard"] == {"codec": "int4-hadamard", "bits": 4, "real_bits": 4.25, "pages": True}
    assert rows["fp8"] == {"codec": "fp8", "bits": 8, "real_bits": 8.0, "pages": False}
    assert rows["kivi2"]["real_bits"] == 3.0
    assert "fp8" in call("codecs").stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("fp8/int5",), "codec 'int5' is unknown"),
        (("absent/fp8.json",), "cannot read"),
        (("nothing/known",), "nothing/known"),
        (("k4v4", "--sink-tokens", "17"), "sink tokens 17 are refused; allowed are 0 to 16"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_model_is_loaded(words, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call("compare", *words, "--model", "no-such-folder")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--bits", "4", "--codecs", "fp8,fp9"), "codec 'fp9' is unknown"),
        (("--bits", "4", "--ratio", "3"), "exactly one of --bits, --bytes and --ratio"),
        ((), "exactly one of --bits, --bytes and --ratio"),
        (("--bits", "1.0"), "too small; the smallest cache takes"),
        (("--bits", "4", "--groups", "many"), "--groups 'many'"),
        (("--bits", "4", "--sink-tokens", "99"), "sink tokens"),
        (("--bits", "4", "--trials", "0"), "0 trials"),
    ],
)
def test_bad_flags_are_refused_and_write_no_table(place, tmp_path, words, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call("search", place / "llama", "-o", tmp_path / "t.json", "--text", place / "text.txt", *SMALL, *words)
    assert not (tmp_path / "t.json").exists()


def test_bad_places_are_refused(place, tmp_path):
    with pytest.raises(InputRefused, match=r"allowed is \.json"):
        call("search", place / "llama", "-o", tmp_path / "t.txt", "--bits", "4")
    with pytest.raises(InputRefused, match="cannot make"):
        call("search", place / "llama", "-o", tmp_path / "missing" / "t.json", "--bits", "4")
    short = tmp_path / "short.txt"
    short.write_text("w1 " * 100)
    with pytest.raises(InputRefused, match="a search needs 256"):
        call("search", place / "llama", "-o", tmp_path / "t.json", "--bits", "4", "--text", short)


def test_compare_refuses_a_table_of_another_model(place, searched, tmp_path):
    tiny_models.gemma2(tmp_path / "gemma")
    with pytest.raises(
        ConfigError, match=r"t\.json is for 4 layers, 2 KV heads and head size 64, but the model has 4, 1"
    ):
        call("compare", place / "t.json", "--model", tmp_path / "gemma", "--text", place / "text.txt")
