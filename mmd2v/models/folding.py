"""Folding batch norm into the convolution before it: a frozen CNN's forward pass costs half as much on a CPU."""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-9  # relative, in float64: folding is exact algebra


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Return ``model`` (in eval mode, for good) with every batch norm folded that follows a convolution.

    Pairs are neighbours by registration, which is the order of execution in most models but not in all. Whether it is
    in this one is tried on a float64 copy with random statistics, so the answer depends on the architecture alone and
    is the same when the model is rebuilt for a checkpoint; a model that fails the trial stays as it is.
    """
    model.eval()
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    trial = _randomized(model)
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 64, 64))
    images = torch.rand(1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = trial.forward_features(images)
        found = _fold(trial).forward_features(images)
    if not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE * expected.abs().max().item()):
        logger.warning("batch norms of %s are not folded: they do not follow their convolutions", type(model).__name__)
        return model
    return _fold(model)


def _randomized(model: nn.Module) -> nn.Module:
    """Return a float64 copy whose batch norms do something: freshly made ones are the identity."""
    trial = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)
    for module in trial.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                tensor.data.uniform_(low, low + 1, generator=generator)
            module.running_var.data.uniform_(0.5, 1.5, generator=generator)
    return trial


def _fold(module: nn.Module) -> nn.Module:
    """Fold in place, children in order of registration."""
    from timm.layers import BatchNormAct2d  # slow to import: by whoever folds one of its models
    from timm.layers.conv2d_same import Conv2dSame

    # These use the weight as it is; a weight-standardising convolution cannot take a norm in.
    plain = (nn.Conv2d.forward, Conv2dSame.forward)
    before: tuple[str, nn.Conv2d] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and before is not None and _fits(before[1], child):
            setattr(module, before[0], fuse_conv_bn_eval(before[1], child))
            # timm's norm layers hold the activation that follows them.
            rest = nn.Sequential(child.drop, child.act) if isinstance(child, BatchNormAct2d) else nn.Identity()
            setattr(module, name, rest)
            before = None
        elif type(child).forward in plain:
            before = (name, child)
        else:
            before = None
            _fold(child)
    return module


def _fits(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    return convolution.out_channels == norm.num_features and norm.track_running_stats and norm.affine
