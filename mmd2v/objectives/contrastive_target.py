"""Contrast of each modality with the teacher's CLS of its own sample, against a memory bank of teacher CLS.

Shapes: B samples, N captions, R rows of the teacher on this rank and M on all ranks, q queries, D student width, C
teacher width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mmd2v.config.schema import ContrastiveTargetConfig
from mmd2v.data.batch import Batch
from mmd2v.distributed.collectives import all_gather_with_gradient, rank
from mmd2v.models.student import Student, StudentOutput
from mmd2v.models.teachers import Targets, Teacher
from mmd2v.objectives.base import Objective, weighted_mean
from mmd2v.objectives.heads import regression_head
from mmd2v.objectives.memory_bank import UNKNOWN, MemoryBank, sample_numbers
from mmd2v.objectives.pairs import paired, same_number_on_ranks
from mmd2v.objectives.temperature import log_scales, scales
from mmd2v_kernels import candidate_logsumexp

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class _Keys:
    """The teacher's rows of this step."""

    own_RC: torch.Tensor
    """fp32, L2-normalised."""
    all_MC: torch.Tensor
    owners_B: torch.Tensor
    """Number of each sample of this rank."""
    all_owners_M: torch.Tensor
    all_counts_M: torch.Tensor
    """bool, False for a damaged sample."""


class ContrastiveTarget(Objective):
    """InfoNCE of head(pooled) with the teacher's CLS, one loss a modality; the gradient goes to the student alone.

    Candidates are the query's own target, those of the other samples of the step on all ranks (``in_batch``) and the
    bank. A candidate of the query's own sample that is not its target is none: it would be a false negative, and is
    known by its sample's id. That is how a sample whose vector of the epoch before is still in the bank, and the other
    captions of an image under a text teacher, are left out. Rows of damaged samples take a place in the bank, so that
    the host knows the next one without asking the device, and do not count.
    """

    def __init__(
        self, config: ContrastiveTargetConfig, student: Student, teachers: Mapping[str, Teacher], where: str
    ) -> None:
        super().__init__(config, student, teachers, where)
        self.config = config
        teacher = teachers[config.teacher]
        self.teacher_is_text = teacher.modality == "text"
        self.modalities = config.modalities or list(student.inputs)
        self.inputs = [student.inputs[name] for name in self.modalities]
        self.is_text = {name: student.inputs[name] == "text" for name in self.modalities}
        owners = ["shared"] if config.shared_head else self.modalities
        self.heads = nn.ModuleDict(
            {owner: regression_head("norm_linear", student.config.width, teacher.width, where) for owner in owners}
        )
        self.log_scale = log_scales(config.temperature, config.learned)
        self.bank = MemoryBank(config.bank_size, teacher.width, _DTYPES[config.bank_precision], f"{where}.bank_size")

    def scale(self) -> torch.Tensor:
        """Return the inverse temperature, within [1, 100]."""
        return scales(self.log_scale)

    def forward(self, output: StudentOutput, targets: Mapping[str, Targets], batch: Batch) -> dict[str, torch.Tensor]:
        """Return ``contrastive_target_loss/MODALITY``; in training, put the step's targets into the bank."""
        cls_RC = targets[self.config.teacher].cls_BD
        unseen = [] if len(cls_RC) else ["text" if self.teacher_is_text else "image"]  # it had nothing to see
        same_number_on_ranks(batch, "contrastive_target", [*self.inputs, *unseen])
        keys = self._keys(cls_RC, batch)
        scale = self.scale()
        losses = {}
        for modality in self.modalities:
            loss = self._loss(modality, output.pooled[modality], scale, keys, batch)
            losses[f"contrastive_target_loss/{modality}"] = loss
        if self.training:
            self.bank.push(keys.all_MC, keys.all_owners_M.clamp(min=UNKNOWN), keys.all_counts_M)
        return losses

    def metrics(self) -> dict[str, torch.Tensor]:
        """Return the temperature's inverse, and how full the bank is."""
        filled = min(1.0, self.bank.inserted / self.bank.size) if self.bank.size else 0.0
        return {
            "contrastive_target_scale": self.scale().detach(),
            "contrastive_target_bank(%)": torch.tensor(100 * filled),
        }

    def rank_state(self) -> dict[str, torch.Tensor]:
        """See `Objective.rank_state`."""
        return self.bank.state()

    def load_rank_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `Objective.load_rank_state`."""
        self.bank.load_state(state)

    def dealt_state(self, states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """See `Objective.dealt_state`."""
        return self.bank.dealt(states)

    @torch.no_grad()
    def _keys(self, cls_RC: torch.Tensor, batch: Batch) -> _Keys:
        owners_B = sample_numbers(batch)
        if not batch.sample_ids:  # told apart within the step, and from nothing in the bank
            first = rank() * len(batch) + 1
            owners_B = -torch.arange(first, first + len(batch), device=cls_RC.device)
        owners_R = owners_B[batch.caption_image] if self.teacher_is_text else owners_B
        weights_R = batch.caption_weights if self.teacher_is_text else batch.weights
        if weights_R is None:
            weights_R = torch.ones(len(owners_R), device=cls_RC.device)
        own_RC = F.normalize(cls_RC.float(), dim=-1)
        gathered = (all_gather_with_gradient(tensor) for tensor in (own_RC, owners_R, weights_R))
        all_MC, all_owners_M, all_weights_M = gathered
        return _Keys(own_RC, all_MC, owners_B, all_owners_M, all_weights_M > 0)

    def _loss(
        self, modality: str, pooled_SD: torch.Tensor, scale: torch.Tensor, keys: _Keys, batch: Batch
    ) -> torch.Tensor:
        head = self.heads["shared" if self.config.shared_head else modality]
        query_qC = scale * F.normalize(head(pooled_SD).float(), dim=-1)
        texts = self.is_text[modality], self.teacher_is_text
        query_qC, key_qC, weights_q = paired(query_qC, keys.own_RC, *texts, batch)
        owner_q = keys.owners_B[batch.caption_image] if any(texts) else keys.owners_B
        positive_q = (query_qC * key_qC).sum(dim=-1)
        terms = [positive_q]
        if self.config.in_batch:
            step = keys.all_MC, keys.all_counts_M, owner_q, keys.all_owners_M
            terms.append(candidate_logsumexp(query_qC, *step))
        if self.bank.size:
            terms.append(self.bank.logsumexp(query_qC, owner_q))
        return weighted_mean(torch.stack(terms).logsumexp(dim=0) - positive_q, weights_q)
