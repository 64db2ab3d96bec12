"""Contrastive loss between images and captions with negatives from all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mmd2v.config.schema import ContrastiveConfig
from mmd2v.data.batch import Batch
from mmd2v.distributed.collectives import all_gather_with_gradient, rank
from mmd2v.errors import UserError
from mmd2v.models.student import Student, StudentOutput
from mmd2v.models.teachers import Targets, Teacher
from mmd2v.objectives.base import Objective
from mmd2v_kernels import ContrastiveWeights, contrastive

_LARGEST_LOG_SCALE = math.log(100)


class _ClampInward(torch.autograd.Function):
    """Clamp whose gradient dies outside the bounds only where a descent step would lead further out.

    With a plain clamp a temperature that once passed a bound would stay there for good.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (x,), (low, high), (gradient,) = ctx.saved_tensors, ctx.bounds, gradients
        outward = ((x > high) & (gradient < 0)) | ((x < low) & (gradient > 0))
        return gradient.masked_fill(outward, 0), None, None


class Contrastive(Objective):
    """Symmetric InfoNCE with a learned temperature (Radford et al. 2021)."""

    def __init__(
        self, config: ContrastiveConfig, student: Student, teachers: Mapping[str, Teacher], where: str
    ) -> None:
        super().__init__(config, student, teachers, where)
        if set(student.inputs.values()) != {"image", "text"}:
            raise UserError(f"{where}: contrastive needs an image and a text modality, found {dict(student.inputs)}")
        self.config = config
        self.names = {kind: name for name, kind in student.inputs.items()}
        # One element and not a scalar: ZeRO-3 shards parameters by rows.
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(config.temperature)), requires_grad=config.learned)

    def scale(self) -> torch.Tensor:
        """Return the inverse temperature, within [1, 100]."""
        return _ClampInward.apply(self.log_scale.float(), 0.0, _LARGEST_LOG_SCALE).exp()

    def forward(self, output: StudentOutput, targets: Mapping[str, Targets], batch: Batch) -> dict[str, torch.Tensor]:
        """Return ``contrastive_loss``."""
        if batch.mean_over is not None:
            raise UserError(
                "contrastive: the ranks must have equally many samples; data.batch_tokens does not give that"
            )
        image_bD = output.embedding[self.names["image"]]
        text_nD = output.embedding[self.names["text"]]
        offset = rank() * len(batch)
        owner_n = batch.caption_image + offset
        owner_N = all_gather_with_gradient(owner_n)
        loss = contrastive(
            image_bD,
            text_nD,
            all_gather_with_gradient(image_bD),
            all_gather_with_gradient(text_nD),
            owner_n,
            owner_N,
            offset,
            self.scale(),
            self.config.label_smoothing,
            _weights(batch, owner_N),
        )
        return {"contrastive_loss": loss}

    def metrics(self) -> dict[str, torch.Tensor]:
        """Return the temperature's inverse."""
        return {"contrastive_scale": self.scale().detach()}


def _weights(batch: Batch, owner_N: torch.Tensor) -> ContrastiveWeights | None:
    """A damaged sample is neither query nor negative, on any rank; a caption counts as its image does."""
    image_b, text_n = batch.weights, batch.caption_weights
    if image_b is None or text_n is None:
        return None
    image_B = all_gather_with_gradient(image_b)
    return ContrastiveWeights(image_b, text_n, image_B, image_B[owner_N])
