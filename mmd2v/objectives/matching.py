"""Image–text matching with hard negatives (ALBEF, Li et al. 2021; VLMo, Bao et al. 2022).

Image and text pass the layers from ``model.joint_from`` on as one sequence, and a head says whether they belong
together: each caption with its image, each image with a hard caption of another one, each caption with a hard image of
another one. Hard are those that the contrastive similarity takes for likely.

Negatives come from this rank's micro-batch alone: those of other ranks would have to be sent before the joint layers,
token by token. The loss so depends on the samples a rank has at once, as a contrastive loss depends on the batch.

Shapes: B images, N captions, P pairs (2 N + B), E width of the embedding, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from mmd2v.config.schema import MatchingConfig
from mmd2v.data.batch import Batch
from mmd2v.distributed.collectives import mean_over_ranks
from mmd2v.errors import UserError
from mmd2v.models.student import Student, StudentOutput
from mmd2v.models.teachers import Targets, Teacher
from mmd2v.objectives.base import Objective, weighted_mean


class Matching(Objective):
    """Mean cross-entropy over all pairs, matching and not."""

    def __init__(self, config: MatchingConfig, student: Student, teachers: Mapping[str, Teacher], where: str) -> None:
        super().__init__(config, student, teachers, where)
        self.where = where
        self.temperature = config.temperature
        self.image, self.text = (_only(student, kind, where) for kind in ("image", "text"))
        _check_layers(student, {self.image, self.text}, where)
        width = student.config.width
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))
        self._counted: torch.Tensor | None = None
        """[2], fp32: right answers and pairs since the last report."""

    def forward(self, output: StudentOutput, targets: Mapping[str, Targets], batch: Batch) -> dict[str, torch.Tensor]:
        """Return ``matching_loss``."""
        image_BE, text_NE = output.embedding[self.image], output.embedding[self.text]
        self._check(batch, len(image_BE), len(text_NE))
        assert output.pair is not None  # `joint_from` is set: the schema's condition
        owner_N = batch.caption_image
        text_B, image_N, found_B, found_N = hard_negatives(
            image_BE.detach(), text_NE.detach(), owner_N, batch.weights, self.temperature
        )
        rows_B = torch.arange(len(image_BE), device=owner_N.device)
        rows_N = torch.arange(len(text_NE), device=owner_N.device)
        # One call for all pairs: a second one would run the joint layers again for what they can do at once.
        cls_PD = output.pair(torch.cat([owner_N, rows_B, image_N]), torch.cat([rows_N, text_B, rows_N]))
        logits_P2 = self.head(cls_PD).float()
        matches_P = F.pad(torch.ones_like(owner_N), (0, len(rows_B) + len(rows_N)))
        weights_P = torch.cat([torch.ones_like(found_N), found_B, found_N])
        if batch.weights is not None and batch.caption_weights is not None:
            own = [batch.caption_weights, batch.weights, batch.caption_weights]
            weights_P = weights_P * torch.cat(own)
        self._count((logits_P2.detach().argmax(dim=1) == matches_P) * weights_P, weights_P)
        loss_P = F.cross_entropy(logits_P2, matches_P, reduction="none")
        return {"matching_loss": weighted_mean(loss_P, weights_P)}

    def metrics(self) -> dict[str, torch.Tensor]:
        """Return ``matching_accuracy``, the share of pairs told right on all ranks since the last report."""
        if self._counted is None:
            return {}
        right, pairs = mean_over_ranks(self._counted)
        self._counted = None
        return {"matching_accuracy": right / pairs.clamp(min=1)}

    def _count(self, right_P: torch.Tensor, weights_P: torch.Tensor) -> None:
        counted = torch.stack([right_P.sum(), weights_P.sum()])
        self._counted = counted if self._counted is None else self._counted + counted

    def _check(self, batch: Batch, images: int, texts: int) -> None:
        if len(batch) < 2:
            raise UserError(
                f"{self.where}: matching takes its negatives from the samples a rank has at once, found "
                f"{len(batch)}, expected at least 2; raise engine.micro_batch_size or engine.batch_size"
            )
        if images != len(batch) or texts != len(batch.caption_image):
            raise UserError(
                f"{self.where}: matching needs every image and text once and whole, found {images} and {texts} "
                f"sequences of {len(batch)} and {len(batch.caption_image)}"
            )


def hard_negatives(
    image_BE: torch.Tensor,
    text_NE: torch.Tensor,
    owner_N: torch.Tensor,
    weights_B: torch.Tensor | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw a text of another image for every image [B], and another image for every text [N].

    They are drawn from the softmax of similarity / ``temperature``. ``owner_N`` is the image of each text; an image of
    weight 0, and its texts, must not be drawn. Returns beside the draws fp32 [B] and [N]: 1, or 0 where there was
    nothing to draw. Nothing here waits for the device, and similarities that are no numbers draw something too: a rank
    must not stop alone while the others wait for it.
    """
    similarity_BN = (image_BE.float() @ text_NE.float().t()) / temperature
    other_BN = torch.arange(len(image_BE), device=owner_N.device)[:, None] != owner_N[None, :]
    of_image_BN, of_text_BN = other_BN, other_BN
    if weights_B is not None:
        usable_B = weights_B > 0
        of_image_BN = other_BN & usable_B[owner_N][None, :]
        of_text_BN = other_BN & usable_B[:, None]
    text_B, found_B = _draw(similarity_BN, of_image_BN)
    image_N, found_N = _draw(similarity_BN.t(), of_text_BN.t())
    return text_B, image_N, found_B, found_N


def _draw(logits_XY: torch.Tensor, allowed_XY: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a column for every row among those allowed; any column, and 0 beside it, where none is."""
    found_X1 = allowed_XY.any(dim=1, keepdim=True)
    # The greatest of logits with Gumbel noise is a draw from their softmax; `multinomial` would ask the device whether
    # its input is sound. Where u is 0 the noise would be -inf, as if the column were not allowed.
    u_XY = torch.rand(logits_XY.shape, device=logits_XY.device).clamp(min=torch.finfo(torch.float32).tiny)
    scores_XY = logits_XY.float().nan_to_num() - (-u_XY.log()).log()
    column_X = scores_XY.masked_fill(~allowed_XY & found_X1, -torch.inf).argmax(dim=1)
    return column_X, found_X1.squeeze(1).float()


def _only(student: Student, kind: str, where: str) -> str:
    names = [name for name, one in student.inputs.items() if one == kind]
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise UserError(f"{where}: matching needs one modality of {kind}, found {found} in {dict(student.inputs)}")
    return names[0]


def _check_layers(student: Student, names: set[str], where: str) -> None:
    """Without a layer that both pass, a text would never see its image."""
    first = student.config.joint_from
    if first is not None and not any(names <= set(layer.modalities) for layer in student.layers[first:]):
        raise UserError(
            f"{where}: matching needs a layer that {' and '.join(sorted(names))} both pass, found none from "
            f"model.joint_from {first} on"
        )
