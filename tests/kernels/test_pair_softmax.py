"""Both directions of a softmax over pairs, in chunks: against the dense form, its gradients, and its memory."""

import json
import subprocess
import sys

import pytest
import torch

from mmd2v_kernels.pair_softmax import Positives, pair_softmax

SEVERAL_CHUNKS = 1  # of 128 rows, the fewest


def inputs(rows=300, columns=70, width=6, dtype=torch.float64, in_rows=True):
    torch.manual_seed(0)
    row, column = (torch.randn(n, width, dtype=dtype, requires_grad=True) for n in (rows, columns))
    scale = torch.tensor([1.7], dtype=dtype, requires_grad=True)
    size, bound = (rows, columns) if in_rows else (columns, rows)
    positives = Positives(torch.randint(-5, bound + 5, (size,)), torch.rand(size).to(dtype), in_rows)
    weights = torch.rand(rows).to(dtype), torch.rand(columns).to(dtype)
    seen = (torch.rand(rows) > 0.3).to(dtype), (torch.rand(columns) > 0.3).to(dtype)
    return row, column, scale, positives, weights, seen


def dense(row, column, scale, positives, row_weight, column_weight=None, row_seen=None, column_seen=None):
    logits = scale * row @ column.T
    hidden = [logits, logits]
    if row_seen is not None:
        hidden[0] = logits.masked_fill(row_seen[:, None] == 0, -torch.inf)
    if column_seen is not None:
        hidden[1] = logits.masked_fill(column_seen[None] == 0, -torch.inf)
    total = row_weight @ hidden[1].logsumexp(1)
    if column_weight is not None:
        total = total + column_weight @ hidden[0].logsumexp(0)
    own, index, weight = torch.arange(len(positives.index)), positives.index, positives.weight
    row, column = (own, index) if positives.in_rows else (index, own)
    inside = (index >= 0) & (index < logits.shape[1 if positives.in_rows else 0])
    return total - (weight[inside] * logits[row[inside], column[inside]]).sum()


@pytest.mark.parametrize("chunk", [SEVERAL_CHUNKS, 1 << 22])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("in_rows", [False, True])
def test_chunks_are_the_dense_form(chunk, both, hides, in_rows):
    row, column, scale, positives, weights, seen = inputs(in_rows=in_rows)
    arguments = (row, column, scale, positives, weights[0], weights[1] if both else None)
    arguments += seen if hides else (None, None)
    found, expected = pair_softmax(*arguments, chunk=chunk), dense(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        *(torch.autograd.grad(3 * total, [row, column, scale]) for total in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_large_logits_stay_finite():
    row, column, scale, positives, weights, _ = inputs(dtype=torch.float32)
    arguments = row, column, 200 * scale.detach(), positives, *weights
    found = pair_softmax(*arguments, chunk=SEVERAL_CHUNKS)
    torch.testing.assert_close(found, dense(*arguments), rtol=1e-5, atol=1e-3)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(found, [row, column]))


def test_no_gradient_is_computed_where_none_is_wanted():
    row, column, scale, positives, weights, _ = inputs()
    with torch.no_grad():
        found = pair_softmax(row, column, scale, positives, *weights, chunk=SEVERAL_CHUNKS)
    torch.testing.assert_close(found, dense(row, column, scale, positives, *weights))


MEMORY = """
import json, resource, sys
import torch
import torch.nn.functional as F
from mmd2v_kernels import contrastive, siglip
loss_name, batch = sys.argv[1], int(sys.argv[2])
def peak():  # the highest mark since it was last put back to the present
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]), int(status.split("VmRSS:")[1].split()[0])
def run(image, text):
    owner, scale = torch.arange(len(image)), torch.tensor([20.0], requires_grad=True)
    if loss_name == "contrastive":
        loss = contrastive(image, text, image, text, owner, owner, 0, scale)
    else:
        loss = siglip(image, text, owner, 0, scale, torch.tensor([-10.0], requires_grad=True), len(image))
    loss.backward()
    return loss
small = [F.normalize(torch.randn(256, 64), dim=1).requires_grad_() for _ in range(2)]
run(*small)
image, text = (F.normalize(torch.randn(batch, 64), dim=1).requires_grad_() for _ in range(2))
open("/proc/self/clear_refs", "w").write("5")
_, before = peak()
run(image, text)
print(json.dumps({"megabytes": (peak()[0] - before) / 1e3}))
"""


@pytest.mark.parametrize("loss", ["contrastive", "siglip"])
def test_memory_does_not_grow_with_the_square_of_the_batch(loss):
    """All logits of 8,192 pairs would be 268 MB, and plain autograd keeps several such matrices."""
    output = subprocess.run(
        [sys.executable, "-c", MEMORY, loss, "8192"], check=True, capture_output=True, text=True, timeout=600
    ).stdout
    assert json.loads(output)["megabytes"] < 150
