"""What a teacher gives and how it is kept frozen.

Shapes: B samples, T tokens, D the teacher's width.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from mmd2v.config.schema import TeacherConfig
from mmd2v.data.batch import Batch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Targets:
    """Outputs of a teacher, without gradient."""

    cls_BD: torch.Tensor
    """fp32; a CNN's is its pooled feature. B is captions for a text teacher."""
    tokens_BTD: torch.Tensor | None = None
    layer_results: list[torch.Tensor] = field(default_factory=list)


def teacher_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a teacher's forward pass; ``auto`` takes the half precision the device has, else fp32."""
    if precision != "auto":
        return _DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


class Teacher(nn.Module):
    """A frozen model. Subclasses implement :meth:`encode` and set :attr:`width`."""

    width: int
    """D"""
    vocab_size: int | None = None
    """Rows of its token embedding table; None for a teacher of images."""
    max_length: int | None = None
    """Positions it has, in tokens; None: any number, or a teacher of images."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32

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
        self.dtype = teacher_dtype(self.config.precision, device)
        logger.info("teacher %s: %s on %s", self.config.name, str(self.dtype).removeprefix("torch."), device)
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
