"""Running statistics of batch norms that saw different images are the same on every rank afterwards."""

import torch
from harness import run_distributed_test
from torch import nn

from mmd2v.distributed.buffers import average_buffers
from mmd2v.distributed.collectives import rank


def _module() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    module.register_buffer("constant", torch.tensor([0.1, 1 / 3]), persistent=False)
    return module


def _buffers(module: nn.Module) -> dict[str, list[float]]:
    return {name: buffer.tolist() for name, buffer in module.named_buffers()}


def _statistics() -> tuple[dict, dict]:
    module = _module()
    images = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(rank()))
    module(images)
    before = _buffers(module)
    average_buffers(module)
    return before, _buffers(module)


def test_buffers_of_two_ranks_become_their_mean():
    (first, after), (second, after_on_other) = run_distributed_test(_statistics, 2)
    assert first["1.running_mean"] != second["1.running_mean"]
    assert after == after_on_other
    for name in ("1.running_mean", "1.running_var", "3.running_mean", "3.running_var"):
        mean = (torch.tensor(first[name]) + torch.tensor(second[name])) / 2
        torch.testing.assert_close(torch.tensor(after[name]), mean)
    assert after["constant"] == first["constant"]
    assert after["1.num_batches_tracked"] == 1


def test_one_rank_keeps_its_buffers():
    module = _module()
    module(torch.randn(6, 3, 5, 5))
    before = _buffers(module)
    average_buffers(module)
    assert _buffers(module) == before
