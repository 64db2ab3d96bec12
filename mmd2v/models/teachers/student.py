"""A model of our own architecture as a teacher: what exports and converted data2vec 2.0 checkpoints share.

Shapes: B sequences, T tokens, D width, R rows of all sequences.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from mmd2v.config.schema import TeacherConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.encoders import Encoded
from mmd2v.models.images import resize
from mmd2v.models.student import Student, StudentOutput, Wanted
from mmd2v.models.teachers.base import Targets, Teacher


class StudentTeacher(Teacher):
    """The modality ``name`` of ``model``; ``image_size`` is the side of its input, None for text."""

    takes_nothing = True

    def __init__(self, model: Student, name: str, image_size: int | None, config: TeacherConfig) -> None:
        super().__init__(config)
        self.model = model
        self.name = name
        self.image_size = image_size
        self.width = model.config.width
        encoder = model.encoders[name]
        self.vocab_size = getattr(encoder, "vocab_size", None)
        self.max_length = getattr(encoder, "max_length", None)

    def can_give(self, name: str) -> bool:
        """Tell whether the model has layers that the modality passes."""
        return any(self.name in layer.modalities for layer in self.model.layers)

    def share_encoder(self, encoder: nn.Module, where: str) -> None:
        """See `Teacher.share_encoder`. Raises UserError when the weights are not the teacher's own."""
        own, shared = self.model.encoders[self.name].state_dict(), encoder.state_dict()
        differ = [name for name, value in shared.items() if name not in own or not _begins_with(own[name], value)]
        if differ or len(own) != len(shared):
            raise UserError(
                f"{where}: found '{self.config.shared_encoder}', whose weights are not those of the encoder of "
                f"'{self.config.name}' ({', '.join(differ[:3]) or 'other parts'}); start it from the same source and "
                "freeze it"
            )
        # The student's is on the host until the engine takes it.
        device = next(self.model.parameters()).device
        shared_copy = copy.deepcopy(encoder).to(device=device, dtype=self.dtype)
        self.model.encoders[self.name] = shared_copy.requires_grad_(False).eval()

    def _encoded(self, output: StudentOutput) -> Encoded | None:
        if self.config.shared_encoder is None:
            return None
        return Encoded(output.encoded[self.name], output.features.get(self.name))

    def encode(self, batch: Batch) -> Targets:
        """Return CLS, tokens and what is needed besides."""
        if self.image_size is not None and self.config.shared_encoder is None and batch.image_count:
            batch = replace(batch, images=resize(batch.images, self.image_size).round().to(torch.uint8))
        only = frozenset({self.name})
        wanted = Wanted(
            results=only if self.needs.layer_results else frozenset(),
            cls_attention=only if self.needs.cls_attention else frozenset(),
        )
        output = self.model(batch, (self.name,), wanted=wanted)
        assert output.tokens is not None
        layout = output.tokens.layout
        return Targets(
            output.pooled[self.name],
            layout.rectangle(output.tokens.x_TD, self.name),
            [layout.rectangle(rows, self.name) for rows in output.results.get(self.name, [])],
            layout.is_token(self.name),
            output.cls_attention.get(self.name),
            self._encoded(output),
        )


def _begins_with(own: torch.Tensor, value: torch.Tensor) -> bool:
    """Tell whether ``value``, in the teacher's dtype, is ``own``; of a position table it may be the first rows."""
    return torch.equal(own if own.ndim == 0 else own[: len(value)], value.to(own))
