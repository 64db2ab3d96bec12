"""Log-sum-exp over candidates against the dense form: values, gradients, blocks, what does not count."""

import pytest
import torch

from mmd2v_kernels import candidate_logsumexp


def inputs(queries=5, candidates=23, width=6, dtype=torch.float64):
    torch.manual_seed(0)
    query = (3 * torch.randn(queries, width, dtype=dtype)).requires_grad_()
    candidate = torch.randn(candidates, width, dtype=dtype)
    counts = torch.rand(candidates) > 0.3
    owners = torch.randint(1, 6, (candidates,))
    return query, candidate, counts, torch.arange(1, queries + 1), owners


def dense(query, candidate, counts, query_owner, candidate_owner):
    hidden = (query_owner[:, None] == candidate_owner) | ~counts
    return (query @ candidate.to(query.dtype).T).masked_fill(hidden, -torch.inf).logsumexp(dim=1)


@pytest.mark.parametrize("block", [1, 7, 23, 100])
def test_blocks_do_not_matter(block):
    arguments = inputs()
    found, expected = candidate_logsumexp(*arguments, block=block), dense(*arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn(5, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(x @ weight, arguments[0])[0] for x in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_gradient_is_that_of_differences():
    query, *rest = inputs()
    assert torch.autograd.gradcheck(lambda q: candidate_logsumexp(q, *rest, block=4), query)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_that_counts_adds_nothing(dtype):
    query, candidate, _, owner, owners = inputs(dtype=dtype)
    for arguments in (
        (candidate, torch.zeros(23, dtype=torch.bool), owner, owners),
        (candidate, owners > 0, owner, owner[:1].expand(23)),
    ):
        negatives = candidate_logsumexp(query, *arguments, block=4)
        other = query.sum(dim=1)
        total = torch.logaddexp(negatives, other)
        alone = slice(0, 1) if arguments[3] is not owners else slice(None)
        torch.testing.assert_close(total[alone], other[alone], rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(total[alone].sum(), query)
        torch.testing.assert_close(gradient[alone], torch.ones_like(query[alone]), rtol=0, atol=0)
    empty = candidate_logsumexp(query, candidate[:0], owners[:0] > 0, owner, owners[:0])
    assert (empty < -1e8).all()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_candidates_are_multiplied_in_fp32_whatever_autocast_says(half):
    query, candidate, counts, owner, owners = inputs(dtype=torch.float32)
    expected = dense(query.double(), candidate.to(half), counts, owner, owners)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = candidate_logsumexp(query, candidate.to(half), counts, owner, owners)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


def test_candidates_may_be_replaced_before_the_backward_pass():
    arguments = inputs()
    expected = torch.autograd.grad(candidate_logsumexp(*arguments).sum(), arguments[0])[0]
    total = candidate_logsumexp(*arguments).sum()
    arguments[1].zero_()
    torch.testing.assert_close(torch.autograd.grad(total, arguments[0])[0], expected, rtol=0, atol=0)
