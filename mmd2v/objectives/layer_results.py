"""Regression of averaged layer results: the loss of unimodal distillation.

A layer result is the output of a block's MLP before the residual. Each is normalised per channel over the tokens of
its sample, then all are averaged, the student's over its own layers and the teacher's over its own, then (images) a
LayerNorm without weights follows. Source: data2vec 2.0 (Baevski et al. 2022) for the target; the distillation applies
the same to the prediction.

Shapes: B samples, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mmd2v.config.schema import LayerResultsConfig, TokenEncoderConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.student import Student, StudentOutput, Wanted
from mmd2v.models.teachers import Needs, Targets, Teacher
from mmd2v.objectives.base import Objective, token_mean, weighted_mean
from mmd2v_kernels import distill_loss, distill_target


class LayerResults(Objective):
    """Mean distance of the two averages over the tokens of a sample, then over samples."""

    def __init__(
        self, config: LayerResultsConfig, student: Student, teachers: Mapping[str, Teacher], where: str
    ) -> None:
        super().__init__(config, student, teachers, where)
        self.config = config
        self.where = where
        self.kind = student.inputs[config.modality]
        self.final_norm = config.final_norm if config.final_norm is not None else self.kind == "image"
        teacher = teachers[config.teacher]
        if teacher.modality != self.kind:
            raise UserError(
                f"{where}.teacher: '{config.teacher}' sees {teacher.modality}, {config.modality} is {self.kind}"
            )
        if teacher.width != student.config.width:
            raise UserError(
                f"{where}.teacher: '{config.teacher}' has width {teacher.width}, the student {student.config.width}; "
                "layer results are compared without a head"
            )
        if not any(config.modality in layer.modalities for layer in student.layers):
            raise UserError(
                f"{where}.modality: '{config.modality}' passes no layer, expected at least one in model.layers: there "
                "is no result to regress"
            )
        encoder = student.config.encoders[config.modality]
        if config.count_padding and not (isinstance(encoder, TokenEncoderConfig) and encoder.padding != "none"):
            raise UserError(
                f"{where}.count_padding: needs rows of padding; set model.encoders.{config.modality}.padding to "
                "longest or max_length (of a `tokens` encoder)"
            )

    @property
    def wanted(self) -> Wanted:
        """See `Objective.wanted`."""
        return Wanted(results=frozenset({self.config.modality}))

    @property
    def needs(self) -> dict[str, Needs]:
        """See `Objective.needs`."""
        layer_results = self.config.needs_layer_results
        return {self.config.teacher: Needs(layer_results=layer_results, cls_attention=self.config.keep < 1)}

    def forward(self, output: StudentOutput, targets: Mapping[str, Targets], batch: Batch) -> dict[str, torch.Tensor]:
        """Return ``layer_results_loss/MODALITY``."""
        assert output.tokens is not None
        modality, layout = self.config.modality, output.tokens.layout
        teacher = targets[self.config.teacher]
        if len(layout.lengths[modality]) == 0:
            nothing = torch.cat(output.results[modality]).float().sum()
            return {f"layer_results_loss/{modality}": nothing}
        own = [layout.rectangle(rows_RD, modality) for rows_RD in output.results[modality]]
        is_token_BT = None if self.config.count_padding else layout.is_token(modality)
        if own[0].shape != teacher.layer_results[0].shape:
            raise UserError(
                f"{self.where}: the student's layer results are {list(own[0].shape)} (samples, tokens, width), of "
                f"'{self.config.teacher}' {list(teacher.layer_results[0].shape)}: they see different tokens"
            )
        normalise = {"mask_BT": is_token_BT, "final_layer_norm": self.final_norm}
        prediction_BTD = distill_target(own, **normalise)
        loss_BT = distill_loss(teacher.layer_results, prediction_BTD, loss=self.config.loss, **normalise)
        counts_BT = self._kept(teacher, is_token_BT)
        weights = batch.caption_weights if self.kind == "text" else batch.weights
        loss = weighted_mean(token_mean(loss_BT, counts_BT), weights, batch.mean_over)
        return {f"layer_results_loss/{modality}": loss}

    def _kept(self, teacher: Targets, is_token_BT: torch.Tensor | None) -> torch.Tensor | None:
        """bool [B, T]: the tokens that count; None: all."""
        if self.config.keep >= 1:
            return is_token_BT
        attention_BT = teacher.cls_attention_BT
        assert attention_BT is not None
        if is_token_BT is None:
            is_token_BT = torch.ones_like(attention_BT, dtype=torch.bool)
        sign = 1 if self.config.keep_by == "most" else -1
        order_BP = (sign * attention_BT).masked_fill(~is_token_BT, -torch.inf)[:, 1:].argsort(dim=1, descending=True)
        kept_B1 = ((is_token_BT.sum(dim=1, keepdim=True) - 1) * self.config.keep).round()
        rank_BP = order_BP.argsort(dim=1)
        return torch.cat([is_token_BT[:, :1], rank_BP < kept_B1], dim=1)
