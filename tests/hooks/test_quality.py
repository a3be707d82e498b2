import math

import pytest
import torch

from jettison.hooks.quality import ROWS, compare, summarise


def test_equal_distributions():
    logits = torch.randn(ROWS + 3, 50)
    found = summarise([compare(logits, logits + 5.0)])
    assert found.mean_kl == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1
    assert found.positions == ROWS + 3


def test_kl_by_hand():
    reference = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    other = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log() - 3.0
    kl, same = compare(reference, other)
    assert kl.tolist() == pytest.approx([0.5 * math.log(3), 0], abs=1e-6)
    assert same.tolist() == [False, True]
    found = summarise([(kl, same)])
    assert (found.top1_agreement, found.worst_percent_share) == (0.5, pytest.approx(1))
    assert found.mean_kl == pytest.approx(0.25 * math.log(3), abs=1e-6)


def test_half_precision_is_compared_in_full():
    reference = torch.randn(8, 1000)
    exact = summarise([compare(reference, reference * 1.1)])
    half = summarise([compare(reference.bfloat16(), (reference * 1.1).bfloat16())])
    assert half.mean_kl == pytest.approx(exact.mean_kl, rel=0.2)
