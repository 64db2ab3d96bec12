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
from mmd2v.errors import UserError
from mmd2v.models.encoders.base import Encoded
from mmd2v_kernels.half_products import half_of

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_STAND_IN_SIZE = 32  # pixels; teachers resize what they are given

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Targets:
    """Outputs of a teacher, without gradient."""

    cls_BD: torch.Tensor
    """fp32; a CNN's is its pooled feature. B is captions for a text teacher."""
    tokens_BTD: torch.Tensor | None = None
    """Of the last layer, the CLS in front where the model has one."""
    layer_results: list[torch.Tensor] = field(default_factory=list)
    """[B, T, D] a layer: its MLP's output before the residual; where `Needs.layer_results`."""
    is_token_BT: torch.Tensor | None = None
    """bool, False for padding; None: every token is real."""
    cls_attention_BT: torch.Tensor | None = None
    """fp32: how much the CLS attends to each token in the last layer; where `Needs.cls_attention`."""
    encoded: Encoded | None = None
    """What entered the layers, of a teacher that runs the student's own encoder."""


@dataclass(frozen=True)
class Needs:
    """What the objectives need of a teacher besides CLS and tokens."""

    layer_results: bool = False
    cls_attention: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(self.layer_results or other.layer_results, self.cls_attention or other.cls_attention)


def teacher_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a teacher's forward pass; ``auto`` takes the half precision the device has, else fp32.

    Each rank decides for its own device: a teacher is no part of what ranks must agree in.
    """
    return _DTYPES[precision] if precision != "auto" else half_of(device) or torch.float32


class Teacher(nn.Module):
    """A frozen model. Subclasses implement :meth:`encode` and set :attr:`width`."""

    width: int
    """D"""
    vocab_size: int | None = None
    """Rows of its token embedding table; None for a teacher of images."""
    max_length: int | None = None
    """Positions it has, in tokens; None: any number, or a teacher of images."""
    takes_nothing = False
    """Whether `encode` can take a batch that lacks what the teacher sees; a library's model is seldom able to."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        self.needs = Needs()

    def prepare(self, needs: Needs, where: str) -> None:
        """Get ready to give what is needed. Raises UserError, beginning with ``where``, when this teacher cannot."""
        for name in ("layer_results", "cls_attention"):
            if getattr(needs, name) and not self.can_give(name):
                raise UserError(
                    f"{where}: the teacher '{self.config.name}' gives no {name.replace('_', ' ')}; BERT-like text "
                    "encoders, ViTs of timm (the results alone), data2vec 2.0 and exports do"
                )
        self.needs = needs

    def can_give(self, name: str) -> bool:
        """Tell whether the model has ``layer_results`` or ``cls_attention``."""
        return False

    def share_encoder(self, encoder: nn.Module, where: str) -> None:
        """Run ``encoder``, a copy of the student's own, in place of the teacher's and give its rows to the student.

        Raises UserError, beginning with ``where``, when this teacher has none that could be replaced.
        """
        raise UserError(
            f"{where}: found '{self.config.shared_encoder}', but '{self.config.name}' has no modality encoder of ours; "
            "converted data2vec 2.0 checkpoints and exports do"
        )

    @property
    def token_width(self) -> int | None:
        """Width of its tokens; None if it gives none."""
        return self.width

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
        """Return the targets of a batch on the teacher's device, of no row where it lacks what the teacher sees."""
        sequences = len(batch.text_lengths) if self.modality == "text" else batch.image_count
        # A surrounding autocast must not change the precision that the config asks for.
        with torch.autocast(batch.images.device.type, enabled=False):
            if sequences or self.takes_nothing:
                targets = self.encode(batch)
            else:
                targets = _without_rows(self.encode(_stand_in(batch)))
        return replace(targets, cls_BD=targets.cls_BD.float())

    def encode(self, batch: Batch) -> Targets:
        """Return the raw outputs in the teacher's precision."""
        raise NotImplementedError  # an abstract method


def _stand_in(batch: Batch) -> Batch:
    """Return a batch of one black image with a text of one token."""
    device = batch.images.device
    return Batch(
        images=torch.zeros(1, 3, _STAND_IN_SIZE, _STAND_IN_SIZE, dtype=torch.uint8, device=device),
        text_ids=torch.zeros(1, dtype=torch.int32, device=device),
        text_lengths=torch.ones(1, dtype=torch.int32),
        caption_image=torch.zeros(1, dtype=torch.int64, device=device),
    )


def _without_rows(targets: Targets) -> Targets:
    """Return the targets' form without any row."""
    return Targets(
        targets.cls_BD[:0],
        None if targets.tokens_BTD is None else targets.tokens_BTD[:0],
        [result_BTD[:0] for result_BTD in targets.layer_results],
        None if targets.is_token_BT is None else targets.is_token_BT[:0],
        None if targets.cls_attention_BT is None else targets.cls_attention_BT[:0],
    )
