"""A pool held full with prefix caching on: no probe may differ from its run alone (the recipe of vllm#50702).

As a test, as many probes as fit a minute. In full:

    python integration/test_pinned_pool.py --probes 2000

writes integration/results/pinned_pool.json. Oracles: every probe alone on an engine whose pool never fills, its prompt
never seen before; the same probe again, with its prompt cached. Then background requests keep the pool at least 99 %
full while probes come and go, hit the prefix cache, are preempted and computed anew.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jettison.hooks.console import progress
from jettison.hooks.results import Results
from vllm_engines import install_probe, running

HERE = Path(__file__).resolve().parent
MIX = {"probe": {"kv": [[8, 8], [4, 4], [4, 2], [2, 2]], "rotate": True, "sink_tokens": 4}}
BLOCK, BLOCKS, WIDTH, BUDGET = 16, 2048, 512, 1024
"""Tokens per block, blocks of the pool, requests under way, tokens of one step. A pool of 64 blocks, as in the issue,
would be below 99 % whenever a single one is free."""

PROBES, ANSWER, PREFIX, PROBING = 32, 16, 48, 10
"""Unique probe prompts, tokens of an answer, tokens that every fourth prompt shares, probes under way at once."""

FULL = 0.99


@dataclass
class Pinned:
    """What happened while the pool was full."""

    probes: int = 0
    wrong: list[str] = field(default_factory=list)
    preempted: int = 0
    hits: int = 0
    full: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Share of the pool that was in use, over the steps since it was full for the first time."""
        return statistics.fmean(self.full)


def prompts(seed: int = 50_702) -> list[list[int]]:
    """The probes: 50 to 94 tokens; four families share a prefix of three blocks."""
    rng = random.Random(seed)
    families = [[rng.randrange(250) for _ in range(PREFIX)] for _ in range(4)]
    made = []
    for number in range(PROBES):
        rest = [rng.randrange(250) for _ in range(rng.randrange(1, 46))]
        made.append(families[number % 4] + [number, *rest])
    return made


def alone(llm: Any, probes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Each probe by itself, first cold and then with its prompt cached: both must agree."""
    answers = []
    for number, probe in enumerate(probes):
        llm.reset_prefix_cache()
        cold, warm = (_solo(llm, probe) for _ in range(2))
        assert cold == warm, f"probe {number}: a cached prompt gives {warm} instead of {cold}, alone"
        answers.append(cold)
    return answers


def _solo(llm: Any, probe: Sequence[int]) -> list[int]:
    (output,) = llm.generate([{"prompt_token_ids": list(probe)}], _params(ANSWER), use_tqdm=False)
    return list(output.outputs[0].token_ids)


def _params(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)


class Pool:
    """Drives an engine step by step, so that the pool is seen after each."""

    def __init__(self, llm: Any, probes: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> None:
        self.engine = llm.llm_engine
        self.manager = self.engine.engine_core.engine_core.scheduler.kv_cache_manager
        self.probes, self.expected = probes, expected
        self.rng = random.Random(1)
        self.sent = 0
        self.background = 0
        self.under_way: dict[str, int] = {}
        self.found = Pinned()
        self.metrics = llm.get_metrics

    def run(self, probes: int, limit_s: float, seen: Callable[[int], None] = lambda done: None) -> Pinned:
        """Answer `probes` probes on a full pool, or as many as end within the limit."""
        before = {name: self._counter(name) for name in ("num_preemptions", "prefix_cache_hits")}
        end = time.monotonic() + limit_s
        while self.found.probes < probes and time.monotonic() < end:
            self._fill()
            self._step()
            seen(self.found.probes)
        self.found.preempted = self._counter("num_preemptions") - before["num_preemptions"]
        self.found.hits = self._counter("prefix_cache_hits") - before["prefix_cache_hits"]
        self.engine.abort_request([*self.under_way, *(f"background-{n}" for n in range(self.background))])
        return self.found

    def _fill(self) -> None:
        while self.found.full and len(self.under_way) < PROBING:
            name, number = f"probe-{self.sent}", self.sent % len(self.probes)
            self.under_way[name] = number
            self._add(name, self.probes[number], ANSWER, self.rng.randrange(7))
            self.sent += 1
        while self.engine.get_num_unfinished_requests() < WIDTH:
            ids = [self.rng.randrange(250) for _ in range(self.rng.randrange(20, 80))]
            self._add(f"background-{self.background}", ids, self.rng.randrange(250, 420), self.rng.randrange(3, 10))
            self.background += 1

    def _add(self, name: str, ids: Sequence[int], tokens: int, priority: int) -> None:
        """The ranges of priorities overlap, so that probes get in, and get preempted."""
        self.engine.add_request(name, {"prompt_token_ids": list(ids)}, _params(tokens), priority=priority)

    def _step(self) -> None:
        for output in self.engine.step():
            if output.finished and output.request_id in self.under_way:
                self._compare(output)
        if self.found.full or self.manager.usage >= FULL:
            self.found.full.append(self.manager.usage)

    def _compare(self, output: Any) -> None:
        number = self.under_way.pop(output.request_id)
        tokens = list(output.outputs[0].token_ids)
        self.found.probes += 1
        if tokens != list(self.expected[number]):
            self.found.wrong.append(f"{output.request_id}: {tokens} instead of {self.expected[number]}")

    def _counter(self, name: str) -> int:
        return sum(int(metric.value) for metric in self.metrics() if metric.name == f"vllm:{name}")


def pin(model: Path, probes: int, limit_s: float, seen: Callable[[int], None] = lambda done: None) -> Pinned:
    """Run the whole recipe on `model`."""
    options = {
        "block_size": BLOCK,
        "max_model_len": 512,
        "enable_prefix_caching": True,
        "disable_log_stats": False,
        "scheduling_policy": "priority",
    }
    texts = prompts()
    with running(model, MIX, max_num_seqs=1, **options) as llm:
        expected = alone(llm, texts)
    small = {"num_gpu_blocks_override": BLOCKS, "max_num_seqs": WIDTH, "max_num_batched_tokens": BUDGET}
    with running(model, MIX, **options, **small) as llm:
        return Pool(llm, texts, expected).run(probes, limit_s, seen)


def check(found: Pinned) -> None:
    """What must hold whatever the size of the run."""
    assert found.wrong == [], f"{len(found.wrong)} of {found.probes} probes differ: {found.wrong[:3]}"
    assert found.mean >= FULL, f"the pool was {found.mean:.2%} full"
    assert found.preempted > 0
    assert found.hits > 0


def test_no_probe_differs_on_a_full_pool(tmp_path: Path) -> None:
    import tiny_models

    install_probe(tmp_path / "probe")
    found = pin(tiny_models.llama(tmp_path / "llama"), probes=48, limit_s=120)
    check(found)
    assert found.probes >= 16, f"only {found.probes} probes ended in time"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probes", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=3000.0)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "pinned_pool.json")
    options = parser.parse_args()
    import tiny_models

    results = Results.start()
    with tempfile.TemporaryDirectory() as folder, progress() as bar:
        install_probe(Path(folder) / "probe")
        task = bar.add_task("probes", total=options.probes)
        model = tiny_models.llama(Path(folder) / "llama")
        found = pin(model, options.probes, options.seconds, lambda done: bar.update(task, completed=done))
    for metric, value, unit in (
        ("probes", found.probes, "count"),
        ("wrong", len(found.wrong), "count"),
        ("preemptions", found.preempted, "count"),
        ("cached_tokens", found.hits, "tokens"),
        ("mean_pool_usage", found.mean, "ratio"),
    ):
        results.add("pinned pool", "jettison", metric, value, unit)
        print(f"{metric} {value:.6g} {unit}")
    results.write(options.output)
    check(found)
    return 0 if found.probes >= options.probes else 1


if __name__ == "__main__":
    sys.exit(main())
