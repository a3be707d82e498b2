from types import SimpleNamespace

import pytest
import torch

from jettison.hooks import InputRefused, KVFormat
from jettison.plugins.kvtuner import tasks
from jettison.plugins.kvtuner.tasks import Task, answers, difference, task_file, wilson
from kvtuner_samples import tiny_model


class Letters:
    """A tokenizer of one id per character."""

    def __call__(self, text):
        return SimpleNamespace(input_ids=[ord(c) % 128 for c in text])


def random_task(model, count=20, seed=0):
    """Items of which every second one ends as the model itself would go on."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for number in range(count):
        ids = torch.randint(0, 128, (5 + 7 * number % 40,), generator=generator).tolist()
        length = 1 + number % 3
        for _ in range(length):
            with torch.no_grad():
                likeliest = model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
            ids.append(likeliest if number % 2 else (likeliest + 1) % 128)
        items.append((tuple(ids), length))
    return Task("planted", tuple(items))


def test_planted_answers_are_told_apart_whatever_the_batch(monkeypatch):
    model = tiny_model()
    task = random_task(model)
    expected = [bool(number % 2) for number in range(20)]
    for batch in (1, 3, 8, 64):
        monkeypatch.setattr(tasks, "BATCH", batch)
        assert answers(model, task, None) == expected, f"batch {batch}"
        identity = [KVFormat(16, 16)] * 2
        assert answers(model, task, identity) == expected, f"batch {batch}, 16 bits"


def test_quantised_answers_are_those_of_one_item_alone(monkeypatch):
    """Padding on the right changes nothing, codes being per token."""
    model = tiny_model()
    task = random_task(model, 30, 1)
    formats = [KVFormat(2, 2, rotate=True)] * 2
    found = []
    for batch in (1, 7, 30):
        monkeypatch.setattr(tasks, "BATCH", batch)
        found.append(answers(model, task, formats))
    assert found[0] == found[1] == found[2]
    assert found[0] != [bool(number % 2) for number in range(30)], "2 bits must show in a random model"


@pytest.mark.parametrize(("right", "items", "low", "high"), [(0, 10, 0.0, 0.27754), (5, 10, 0.23659, 0.76341)])
def test_wilson_by_the_formula(right, items, low, high):
    found = wilson([True] * right + [False] * (items - right))
    z, p = 1.959964, right / items
    middle = (p + z * z / (2 * items)) / (1 + z * z / items)
    half = z / (1 + z * z / items) * (p * (1 - p) / items + z * z / (4 * items * items)) ** 0.5
    assert (found.low, found.high) == pytest.approx((max(0.0, middle - half), middle + half), abs=1e-6)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    assert found.share == right / items


def test_differences_are_paired():
    same = [True, False] * 50
    assert difference(same, same) == (0.0, 0.0)
    better = [True] * 60 + [False] * 40
    worse = [True] * 40 + [False] * 60
    low, high = difference(better, worse)
    assert 0.1 < low < 0.2 < high < 0.3
    assert difference(worse, better) == pytest.approx((-high, -low))


def test_a_task_file(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text('{"context": "ab", "continuation": " cd"}\n\n{"context": "x", "continuation": "y"}\n')
    found = task_file(Letters(), path, 10)
    assert found.name == "task"
    assert found.items == (((97, 98, 32, 99, 100), 3), ((120, 121), 1))
    assert len(task_file(Letters(), path, 1).items) == 1


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"context": "a"}', '{"context": "a", "continuation": ""}', '{"context": 1, "continuation": "b"}',
     '{"context": "", "continuation": "b"}', "\ud800"],
)  # fmt: skip
def test_bad_task_files_are_refused(tmp_path, text):
    path = tmp_path / "task.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputRefused):
        task_file(Letters(), path, 10)
    with pytest.raises(InputRefused, match="cannot read"):
        task_file(Letters(), tmp_path / "missing.jsonl", 10)


@pytest.mark.assets
def test_lambada_ends_with_its_word():
    from jettison.hooks import assets

    halves = [assets.lambada("calibration"), assets.lambada("held-out")]
    assert not {context for context, _ in halves[0]} & {context for context, _ in halves[1]}
    assert 5100 < sum(map(len, halves)) <= 5153, "some passages occur twice"
    assert halves[0][0][1] == "signs"
    for context, word in halves[0][:50]:
        assert not context.endswith(" "), context
        assert word.split() == [word]
