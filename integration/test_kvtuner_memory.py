"""Peak memory of a measurement with gradients at 8k tokens, in a process of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent / "tests"

PEAK = """
    import resource, torch
    from kvtuner_families import tiny
    from jettison.plugins.kvtuner.codecs import Native, PerToken
    from jettison.plugins.kvtuner.sensitivity import measure
    model = tiny("{family}", vocab_size=4096, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    codecs = (Native(), PerToken(4, True))
    measure(model, [torch.arange(300)], keys=codecs, values=codecs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measure(model, [torch.arange(8192) % 4096], keys=codecs, values=codecs)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gpt-oss"])
def test_8k_tokens_fit(family):
    """With gradients: less than the [T, T] scores of one layer alone would take, 4 heads of 256 MiB.

    Kept are hidden states (2 MiB a layer), one layer's graph (tens of tensors of 2 to 8 MiB, and the experts' own), and
    scores of 128 queries (16 MiB) in a few copies. A graph over all chunks of scores took 2.4 GiB.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(PEAK).format(family=family)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 1024, f"{family}: {done.stdout} MiB"
