"""Folding batch norms: the same function, no norm left, and no folding where it would be wrong."""

import pytest
import timm
import torch
from torch import nn

from mmd2v.models.folding import fold_batch_norms


def shake(model: nn.Module) -> nn.Module:
    """Give every norm statistics that matter."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("name", ["mobilenetv2_100", "resnet10t", "resnetv2_50", "convnext_atto"])
def test_the_function_stays_the_same(name):
    model = shake(timm.create_model(name)).double()
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    expected, before = model.forward_features(images), norms(model)
    folded = fold_batch_norms(model)
    torch.testing.assert_close(folded.forward_features(images), expected)
    assert norms(folded) < before or before == 0


class NormFirst(nn.Module):
    """Registered convolution first, run norm first: folding would change the function."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.convolution(self.norm(images))


@torch.no_grad()
def test_a_norm_that_runs_before_is_left_alone(caplog):
    model = NormFirst()
    assert fold_batch_norms(model) is model and norms(model) == 1
    assert "not folded" in caplog.text
