"""What a teacher gives and how it is kept frozen.

Shapes: B samples, T tokens, D the teacher's width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from mmd2v.config.schema import TeacherConfig
from mmd2v.data.batch import Batch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Targets:
    """Outputs of a teacher, without gradient."""

    cls_BD: torch.Tensor
    """fp32; a CNN's is its pooled feature. B is captions for a text teacher."""
    tokens_BTD: torch.Tensor | None = None
    layer_results: list[torch.Tensor] = field(default_factory=list)


class Teacher(nn.Module):
    """A frozen model. Subclasses implement :meth:`encode` and set :attr:`width`."""

    width: int
    """D"""
    vocab_size: int | None = None
    """Rows of its token embedding table; None for a teacher of images."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.dtype = _DTYPES[config.precision]

    @property
    def modality(self) -> str:
        """``"image"`` or ``"text"``: which part of a sample it sees."""
        return self.config.modality

    @property
    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def freeze(self, device: torch.device) -> Teacher:
        """Move to ``device`` in the configured precision, fixed and in eval mode."""
        return self.to(device=device, dtype=self.dtype).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode: an engine that sets train mode would wake up dropout and batch statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Targets:
        """Return the targets of a batch on the teacher's device."""
        # A surrounding autocast must not change the precision that the config asks for.
        with torch.autocast(batch.images.device.type, enabled=False):
            targets = self.encode(batch)
        return replace(targets, cls_BD=targets.cls_BD.float())

    def encode(self, batch: Batch) -> Targets:
        """Return the raw outputs in the teacher's precision."""
        raise NotImplementedError  # an abstract method
