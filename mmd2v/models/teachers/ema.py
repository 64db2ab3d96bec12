"""An average of the student itself over the steps so far as a teacher: data2vec's.

It lives outside the training engine like every teacher, in fp32 and in eval mode, sees the whole input, and is moved
after each optimiser step.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping

import torch
from torch import nn

from mmd2v.config.schema import EMAConfig, TeacherConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.student import Student
from mmd2v.models.teachers.base import Targets, teacher_dtype
from mmd2v.models.teachers.student import StudentTeacher

logger = logging.getLogger(__name__)

_ENCODERS = "encoders."


class EMATeacher(StudentTeacher):
    """The modality ``name`` of a student as it averages over time; it starts as a copy of ``student``."""

    def __init__(self, student: Student, name: str, config: TeacherConfig) -> None:
        super().__init__(_part(student, name), name, None, config)
        self.ema = config.ema or EMAConfig()
        self.arithmetic = torch.float32

    def freeze(self, device: torch.device) -> EMATeacher:
        """Move to ``device``, without gradient and in eval mode; the weights stay fp32.

        An average in half precision would stand still: a step changes it by less than its last bit.
        """
        self.arithmetic = teacher_dtype(self.config.precision, device)
        said = str(self.arithmetic).removeprefix("torch.")
        logger.info("teacher %s: fp32, products in %s on %s", self.config.name, said, device)
        self.to(device=device, dtype=torch.float32).requires_grad_(False).eval()
        return self

    def encode(self, batch: Batch) -> Targets:
        """See `StudentTeacher.encode`."""
        half = self.arithmetic != torch.float32
        with torch.autocast(batch.images.device.type, dtype=self.arithmetic if half else None, enabled=half):
            return super().encode(batch)

    def followed(self, student: nn.Module) -> list[nn.Parameter]:
        """Return the student's parameters that this teacher averages; `update` needs them whole."""
        own = dict(self.model.named_parameters())
        return [parameter for name, parameter in student.named_parameters() if name in own]

    @torch.no_grad()
    def update(self, student: nn.Module, decay: float) -> None:
        """Move towards the student: own ← decay · own + (1 - decay) · student; buffers are the student's."""
        theirs = dict(student.named_parameters())
        averaged, targets = [], []
        for name, own in self.model.named_parameters():
            if name.startswith(_ENCODERS) and not self.ema.encoder:
                own.copy_(theirs[name])
            else:
                averaged.append(own)
                targets.append(theirs[name].detach().to(own.dtype))
        torch._foreach_lerp_(averaged, targets, 1 - decay)
        buffers = dict(student.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])

    def average(self) -> dict[str, torch.Tensor]:
        """Return the weights by their names in the student."""
        return self.model.state_dict()

    @torch.no_grad()
    def load_average(self, state: Mapping[str, torch.Tensor], where: str) -> None:
        """Go on from what `average` returned. Raises UserError, beginning with ``where``, when it does not fit."""
        own = self.model.state_dict()
        differ = [name for name in {*own, *state} if name not in own or name not in state]
        differ = differ or [name for name, value in own.items() if value.shape != state[name].shape]
        if differ:
            raise UserError(f"{where}: holds another model's average; {sorted(differ)[0]} does not fit")
        for name, value in own.items():
            value.copy_(state[name])


def _part(student: Student, name: str) -> Student:
    """Return a copy of what one modality passes through."""
    others = [other for other in student.encoders if other != name]
    # What is left out is not copied first: it may be as large as what is kept.
    skipped = {id(student.encoders[other]): None for other in others}
    for layer in student.layers:
        for half in (layer.attention, layer.mlp):
            skipped |= {id(half[other]): None for other in others if other in half}
        if name not in layer.modalities:
            skipped |= {id(half): None for half in (layer.attention, layer.mlp)}
    part = copy.deepcopy(student, skipped)
    for module in list(part.modules()):
        if isinstance(module, nn.ModuleDict):
            for gap in [child for child, value in module.items() if value is None]:
                del module[gap]
    return part
