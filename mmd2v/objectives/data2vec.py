"""data2vec 2.0's own loss (Baevski et al. 2022): what the teacher makes of the tokens that the student does not see.

The student's visible tokens go back to their places, noise stands at the hidden ones, and a small convolutional decoder
predicts there the teacher's layer results: each normalised per channel over the tokens of its sample, then averaged
over the last layers, then (images) a LayerNorm without weights.

Shapes: S samples, C clones of them, T tokens of the teacher, L tokens in the decoder (without the CLS of an image),
D width, V visible and H hidden tokens of all clones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from mmd2v.config.schema import Data2VecConfig
from mmd2v.data.batch import Batch
from mmd2v.distributed.collectives import mean_over_ranks
from mmd2v.distributed.coordination import shared_error
from mmd2v.errors import UserError
from mmd2v.models.draws import RANGE, draw
from mmd2v.models.masking import Mask
from mmd2v.models.packed import Layout
from mmd2v.models.student import Student, StudentOutput
from mmd2v.models.teachers import Needs, Targets, Teacher
from mmd2v.objectives.base import Objective, weighted_mean
from mmd2v.objectives.conv_decoder import ConvDecoder
from mmd2v_kernels import distill_target

_TABLE = 1 << 16
_NOISE = RANGE // 4
"""Counters of noise begin here: those of a mask count from 0 (blocks) and from RANGE // 2 (lots)."""


class Data2Vec(Objective):
    """Mean distance over a clone's hidden tokens, then over clones and samples; and of the CLS to the mean target."""

    def __init__(self, config: Data2VecConfig, student: Student, teachers: Mapping[str, Teacher], where: str) -> None:
        super().__init__(config, student, teachers, where)
        self.config = config
        self.where = where
        modality, width = config.modality, student.config.width
        self.kind = student.inputs[modality]
        image = self.kind != "text"
        masking = student.maskings[modality]
        self.noise = masking.config.noise
        self.final_norm = config.final_norm if config.final_norm is not None else image
        self.cls_weight = config.cls_weight if config.cls_weight is not None else 0.01 * image
        self.drops_cls = image and masking.has_cls
        """A text's first token is an ordinary one to the decoder, the CLS of an image has no place in the grid."""
        teacher = teachers[config.teacher]
        if teacher.modality != self.kind:
            raise UserError(f"{where}.teacher: '{config.teacher}' sees {teacher.modality}, {modality} is {self.kind}")
        if teacher.width != width:
            raise UserError(
                f"{where}.teacher: '{config.teacher}' has width {teacher.width}, the student {width}; they are "
                "compared without a head"
            )
        if self.cls_weight and not masking.has_cls:
            raise UserError(f"{where}.cls_weight: needs model.encoders.{modality}.cls; set it to 0")
        decoder = config.decoder.filled("text" if masking.grid is None else "image", width)
        self.decoder = ConvDecoder(decoder, width, masking.grid, f"{where}.decoder")
        # A row of noise is a window of a table, at an offset drawn by its sample: normal numbers for the price of a
        # copy, and the same ones on any rank.
        table = torch.randn(_TABLE + width, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise_table", table, persistent=False)
        self._moments: torch.Tensor | None = None

    @property
    def needs(self) -> dict[str, Needs]:
        """See `Objective.needs`."""
        return {self.config.teacher: Needs(layer_results=self.config.needs_layer_results)}

    def forward(self, output: StudentOutput, targets: Mapping[str, Targets], batch: Batch) -> dict[str, torch.Tensor]:
        """Return ``data2vec_loss/MODALITY`` and, weighted, ``data2vec_cls_loss/MODALITY``."""
        modality = self.config.modality
        if modality not in output.masks:
            raise ValueError(f"{self.where}: the student's forward pass of '{modality}' was not in training mode")
        mask, x_VD = output.masks[modality], output.visible[modality]
        if len(mask.lengths) == 0:
            return self._of_no_sample(x_VD)
        target_SLD, is_token_SL = self._target(targets[self.config.teacher], mask)
        length = target_SLD.shape[1]
        visible, hidden, rows_VD = self._places(mask, x_VD)
        is_token_CL = None if is_token_SL is None else is_token_SL.repeat_interleave(mask.clones, dim=0)

        # Back to their places, and noise at all others.
        full_RD = x_VD.new_zeros(len(mask.lengths) * length, x_VD.shape[1])
        full_RD = full_RD.index_copy(0, hidden, self._noise(mask, hidden, length).to(x_VD.dtype))
        full_RD = full_RD.index_copy(0, visible, rows_VD)
        prediction_HD = self.decoder(full_RD.unflatten(0, (-1, length)), hidden, is_token_CL).float()

        of_sample_H = hidden // length // mask.clones * length + hidden % length
        target_HD = target_SLD.flatten(0, 1).index_select(0, of_sample_H)
        self._observe(target_HD, prediction_HD.detach())
        loss_S = self._mean_of_samples(self._distance(prediction_HD, target_HD), mask, hidden, length)
        weights = batch.caption_weights if self.kind == "text" else batch.weights
        losses = {f"data2vec_loss/{modality}": weighted_mean(loss_S, weights, batch.mean_over)}
        if self.cls_weight:
            mean_SD = _token_average(target_SLD, is_token_SL)
            assert output.tokens is not None
            cls_CD = x_VD[output.tokens.layout.first_rows(modality)]
            cls_loss_C = self._distance(cls_CD.float(), mean_SD.repeat_interleave(mask.clones, dim=0))
            cls_loss_S = cls_loss_C.unflatten(0, (-1, mask.clones)).mean(dim=1)
            cls_loss = weighted_mean(cls_loss_S, weights, batch.mean_over)
            losses[f"data2vec_cls_loss/{modality}"] = self.cls_weight * cls_loss
        return losses

    def metrics(self) -> dict[str, torch.Tensor]:
        """Return how much targets and predictions varied since the last call; every rank must call it.

        Raises UserError, on every rank, when the targets have collapsed.
        """
        if self._moments is None:
            return {}
        count, total_2D, squares_2D = mean_over_ranks(self._moments).double().tensor_split((1, 3))
        self._moments = None
        count = count[:, :1].clamp(min=1e-9)
        variance_2D = squares_2D / count - (total_2D / count).square()
        target, prediction = (variance_2D.clamp(min=0) + 1e-6).sqrt().mean(dim=1)
        if target < self.config.min_target_var:
            raise shared_error(
                f"{self.where}: the targets have collapsed: they vary by {float(target):.4f} over tokens, expected at "
                f"least min_target_var {self.config.min_target_var:g}; try a lower optimizer.lr, a longer "
                "optimizer.warmup, or a slower teacher (a greater ema.decay)"
            )
        modality = self.config.modality
        return {f"data2vec/target_var/{modality}": target, f"data2vec/prediction_var/{modality}": prediction}

    def _of_no_sample(self, x_VD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return losses of 0 that depend on every weight as those of other batches do."""
        modality, grid = self.config.modality, self.decoder.grid
        nothing_CLD = x_VD[:, None].expand(-1, grid[0] * grid[1] if grid else 1, -1)
        prediction_HD = self.decoder(nothing_CLD, torch.zeros(0, dtype=torch.int64, device=x_VD.device)).float()
        self._observe(torch.zeros_like(prediction_HD), prediction_HD.detach())
        losses = {f"data2vec_loss/{modality}": prediction_HD.sum()}
        if self.cls_weight:
            losses[f"data2vec_cls_loss/{modality}"] = x_VD.float().sum()
        return losses

    def _target(self, teacher: Targets, mask: Mask) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, L, D] and which of them are real tokens (None: all)."""
        results, top_layers = teacher.layer_results, self.config.top_layers or 0
        if top_layers > len(results):
            raise UserError(
                f"{self.where}.top_layers: found {top_layers}, but '{self.config.teacher}' has {len(results)} layers; "
                "expected at most that, or null for all of them"
            )
        results = results[-top_layers:]
        found, expected = tuple(results[0].shape[:2]), (len(mask.lengths) // mask.clones, mask.longest)
        if found != expected:
            raise UserError(
                f"{self.where}: '{self.config.teacher}' gives {list(found)} (samples, tokens), the student has "
                f"{list(expected)}: they see different tokens"
            )
        first = int(self.drops_cls)
        is_token = None if teacher.is_token_BT is None else teacher.is_token_BT[:, first:]
        results = [result_STD[:, first:] for result_STD in results]
        return distill_target(results, mask_BT=is_token, final_layer_norm=self.final_norm), is_token

    def _places(self, mask: Mask, x_VD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the decoder's slots of visible and of hidden tokens, and the rows of the visible ones."""
        if not self.drops_cls:
            return mask.visible, mask.hidden, x_VD
        clones = len(mask.lengths)  # of images, which have equally many tokens
        visible = mask.visible.unflatten(0, (clones, -1))[:, 1:].flatten()
        rows = x_VD.unflatten(0, (clones, -1))[:, 1:].flatten(0, 1)
        # A clone and all before it have each lost their first slot.
        return (*(slots - slots // mask.longest - 1 for slots in (visible, mask.hidden)), rows)

    def _noise(self, mask: Mask, hidden: torch.Tensor, length: int) -> torch.Tensor:
        """[H, D], N(0, noise)."""
        if not self.noise:
            return self.noise_table.new_zeros(1, self.noise_table.shape[0] - _TABLE).expand(len(hidden), -1)
        offset_H = draw(mask.keys_C[hidden // length], hidden % length + _NOISE) % _TABLE
        return self.noise * self.noise_table.unfold(0, self.noise_table.shape[0] - _TABLE, 1)[offset_H]

    def _distance(self, prediction_ND: torch.Tensor, target_ND: torch.Tensor) -> torch.Tensor:
        """[N], mean over D."""
        if self.config.loss == "mse":
            return F.mse_loss(prediction_ND, target_ND, reduction="none").mean(dim=-1)
        beta = self.config.beta
        return F.smooth_l1_loss(prediction_ND, target_ND, reduction="none", beta=beta).mean(dim=-1)

    def _mean_of_samples(self, loss_H: torch.Tensor, mask: Mask, hidden: torch.Tensor, length: int) -> torch.Tensor:
        """[S]: mean over a clone's hidden tokens, then over clones.

        A mean a sample and not one over the tokens of a batch: it is the same however the samples lie on ranks.
        """
        loss_CL = loss_H.new_zeros(len(mask.lengths) * length).index_copy(0, hidden, loss_H).unflatten(0, (-1, length))
        counts = Layout({"": mask.hidden_lengths}, loss_H.device).lengths_on_device("")
        loss_C = loss_CL.sum(dim=1) / counts.clamp(min=1)
        return loss_C.unflatten(0, (-1, mask.clones)).mean(dim=1)

    @torch.no_grad()
    def _observe(self, target_HD: torch.Tensor, prediction_HD: torch.Tensor) -> None:
        """Add to the moments of this interval, [count; sums of target, prediction; sums of their squares] a channel."""
        both = (target_HD, prediction_HD)
        rows = [target_HD.new_full(target_HD.shape[1:], len(target_HD))]
        rows += [x.sum(dim=0) for x in both] + [x.square().sum(dim=0) for x in both]
        moments = torch.stack(rows)
        self._moments = moments if self._moments is None else self._moments + moments


def _token_average(x_SLD: torch.Tensor, is_token_SL: torch.Tensor | None) -> torch.Tensor:
    """Return the mean over the real tokens of each sample, [S, D]."""
    if is_token_SL is None:
        return x_SLD.mean(dim=1)
    real_SL1 = is_token_SL[..., None].to(x_SLD.dtype)
    return (x_SLD * real_SL1).sum(dim=1) / real_SL1.sum(dim=1).clamp(min=1)
