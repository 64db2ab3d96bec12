"""A bank in parts on several ranks: neighbours and ranks are those of the whole bank on one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import run_distributed_test

from mmd2v.distributed.collectives import rank
from mmd2v.distributed.sharded_bank import sharded_rank_counts, sharded_topk
from mmd2v_kernels import cosine_topk, count_ahead

PARTS = {2: [0, 41, 60], 3: [0, 1, 1, 60]}
"""Ranks → where their parts begin and end; of three ranks one has a single row and one has none."""


def problem():
    torch.manual_seed(0)
    queries, bank = (F.normalize(torch.randn(rows, 16), dim=1) for rows in (37, 60))
    bank[50:] = bank[30:40]  # equal rows, on other ranks in some of the parts
    queries[5] = 0  # all scores equal
    positives = torch.stack([torch.arange(36), torch.arange(36) * 11 % 60], 1)  # one query has none
    positives = torch.cat([positives, torch.tensor([[3, 1], [3, 58], [4, 59]])])
    return queries, bank, positives


def on_rank(parts):
    queries, bank, positives = problem()
    own = bank[parts[rank()] : parts[rank() + 1]]
    found = [tuple(part.numpy() for part in sharded_topk(queries, own, k)) for k in (1, 7, 60)]
    errors = []
    for call in (
        lambda: sharded_topk(queries, own, 61),
        lambda: sharded_rank_counts(queries, own, torch.tensor([[0, 60]])),
    ):
        with pytest.raises(ValueError) as error:
            call()
        errors.append(str(error.value))
    return found, [side.numpy() for side in sharded_rank_counts(queries, own, positives)], errors


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_a_bank_are_the_whole_bank(ranks):
    queries, bank, positives = problem()
    counts = count_ahead(queries, bank, positives)
    for found, of_parts, errors in run_distributed_test(on_rank, ranks, args=(PARTS[ranks],)):
        for k, (scores, index) in zip((1, 7, 60), found, strict=True):
            expected = cosine_topk(queries, bank, k)
            assert np.array_equal(scores, expected[0]) and np.array_equal(index, expected[1])
        for ours, theirs in zip(of_parts, counts, strict=True):
            assert np.array_equal(ours, theirs)
        assert "expected 1..60" in errors[0] and "expected 0..59" in errors[1]


def test_one_process_is_the_whole():
    queries, bank, positives = problem()
    for ours, theirs in zip(
        sharded_rank_counts(queries, bank, positives), count_ahead(queries, bank, positives), strict=True
    ):
        assert torch.equal(ours, theirs)
