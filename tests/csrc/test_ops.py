"""Schemas, fake implementations, refusals and the three instruction-set tiers."""

import os
import subprocess
import sys

import pytest
import torch

from jettison import csrc
from jettison.csrc import ops
from jettison.csrc.layout import PageLayout

LAYOUT = PageLayout(64, 8, 4)


def store_arguments(batch):
    return (batch.key, batch.value, batch.cache, batch.slots, 8, 4, 0, True, None, torch.ones(2, 64))


def attention_arguments(batch):
    return (
        batch.query, batch.cache, torch.zeros_like(batch.query), batch.query_start, batch.seq_lens, batch.table,
        0.125, 8, 4, 0, True, torch.ones(2, 64), -1, 0.0, None,
    )  # fmt: skip


@pytest.mark.parametrize("lengths", [[5], [1, 20], [40, 16, 3]], ids=str)
def test_t12_opcheck(batch_factory, lengths):
    batch = batch_factory(LAYOUT, lengths, [1] * len(lengths))
    ops.kv_store(batch.key, batch.value, batch.cache, batch.slots, LAYOUT)
    torch.library.opcheck(torch.ops.jettison.kv_store.default, store_arguments(batch))
    torch.library.opcheck(torch.ops.jettison.packed_attention.default, attention_arguments(batch))


def across(x):
    """The same values with the second and third dimension swapped in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


WRONG = {
    "key must be float32": lambda b: {"key": b.key.double()},
    "key has 2 dimensions": lambda b: {"key": b.key[:, 0]},
    "key must be contiguous in its last dimension": lambda b: {"key": across(b.key)},
    "cache must be uint8": lambda b: {"cache": b.cache.float()},
    "bytes per token, this format needs 104": lambda b: {"cache": b.cache[..., :96]},
    "bytes of a page must be contiguous": lambda b: {"cache": across(b.cache)},
    "cache has 1 heads, key has 2": lambda b: {"cache": b.cache[:, :1]},
    "64-bit integers": lambda b: {"slot_mapping": b.slots.int()},
    "slot 99999 is outside": lambda b: {"slot_mapping": b.slots.clone().fill_(99999)},
    "slot_mapping names 48 tokens": lambda b: {"slot_mapping": b.slots.repeat(2)},
    "key_scale has 64 elements": lambda b: {"key_scale": torch.ones(1, 64)},
    "key_center must be contiguous float32": lambda b: {"key_center": torch.ones(2, 64).double()},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_store_refuses_by_name(batch_factory, message):
    batch = batch_factory(LAYOUT, [24], [1])
    arguments = {"key": batch.key, "value": batch.value, "cache": batch.cache, "slot_mapping": batch.slots}
    with pytest.raises(RuntimeError, match=message):
        ops.kv_store(**{**arguments, **WRONG[message](batch)}, layout=LAYOUT)


WRONG_READS = {
    "5 query heads over 2 KV heads": lambda b: {"query": b.query[:, :5], "output": b.query[:, :5].clone()},
    "output must have the shape and type": lambda b: {"output": b.query.float()},
    "block 77 of sequence 0 is outside": lambda b: {"block_table": b.table.clone().fill_(77)},
    "block -1 of sequence 0 is outside": lambda b: {"block_table": b.table.clone().fill_(-1)},
    "sequence 0 has length 999": lambda b: {"seq_lens": torch.tensor([999], dtype=torch.int32)},
    "sequence 0 has length 0 for 1 queries": lambda b: {"seq_lens": torch.tensor([0], dtype=torch.int32)},
    "query_start_loc of sequence 0": lambda b: {"query_start_loc": torch.tensor([0, 9], dtype=torch.int32)},
    "must cover 1 sequences": lambda b: {"query_start_loc": torch.tensor([0], dtype=torch.int32)},
    "sinks has 2 elements": lambda b: {"sinks": torch.ones(2)},
}


@pytest.mark.parametrize("message", WRONG_READS)
def test_attention_refuses_by_name(batch_factory, message):
    batch = batch_factory(LAYOUT, [24], [1])
    arguments = {
        "query": batch.query, "cache": batch.cache, "output": torch.zeros_like(batch.query),
        "query_start_loc": batch.query_start, "seq_lens": batch.seq_lens, "block_table": batch.table,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        ops.packed_attention(**{**arguments, **WRONG_READS[message](batch)}, layout=LAYOUT, scale=1.0)


@pytest.mark.parametrize("tier", ["portable", "avx2"])
def test_every_tier_passes_the_same_tests(tier):
    """The kernel tests again, in a process that dispatches to an older instruction set."""
    if tier == csrc.isa():
        pytest.skip(f"this processor's own tier is {tier}")
    folder = os.path.dirname(__file__)
    selected = "(bytes_of_the_reference and 64) or (every_pair and (64 or 80)) or prefix_alone or poisoned or soft_cap"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", folder, "-k", selected]
    environment = {**os.environ, "JETTISON_ISA": tier}
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


def test_the_library_needs_no_particular_python_or_torch():
    path = csrc.library_path()
    assert path is not None
    symbols = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    foreign = [s for s in symbols.split() if s.startswith(("Py", "_Py", "_ZN2at", "_ZN3c10", "_ZNK2at", "_ZNK3c10"))]
    assert not foreign, f"symbols outside the stable ABI: {foreign[:5]}"
