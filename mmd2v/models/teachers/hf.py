"""Any Hugging Face text or vision encoder as a teacher."""

from __future__ import annotations

import torch

from mmd2v.config.schema import TeacherConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.hf_backbone import bert_results, load_model, published_mean_std, text_positions
from mmd2v.models.images import Normalize
from mmd2v.models.packed import Layout
from mmd2v.models.teachers.base import Needs, Targets, Teacher
from mmd2v.models.teachers.results import ResultHooks


def hf_teacher(name: str, config: TeacherConfig, where: str) -> Teacher:
    """Return the teacher ``hf:NAME-or-folder`` for the modality the config names."""
    kind = HFTextTeacher if config.modality == "text" else HFImageTeacher
    return kind(name, config, where)


class HFTextTeacher(Teacher):
    """A BERT-like encoder over the student's own token ids; CLS or masked mean by ``pooling``."""

    def __init__(self, name: str, config: TeacherConfig, where: str) -> None:
        super().__init__(config)
        self.model = load_model(name, pretrained=True, where=where)
        if not hasattr(self.model.config, "vocab_size"):
            raise UserError(f"{where}: '{name}' is no text encoder; set modality: image")
        self.width = self.model.config.hidden_size
        self.results: ResultHooks | None = None
        self.vocab_size = self.model.config.vocab_size
        self.max_length = text_positions(self.model)

    def can_give(self, name: str) -> bool:
        """Tell whether the layer results can be caught: BERT-like encoders."""
        return name == "layer_results" and bool(bert_results(self.model))

    def prepare(self, needs: Needs, where: str) -> None:
        """See `Teacher.prepare`."""
        super().prepare(needs, where)
        if needs.layer_results and self.results is None:
            self.results = ResultHooks(bert_results(self.model))

    def encode(self, batch: Batch) -> Targets:
        """Return the pooled vector of every caption and its padded tokens."""
        layout = Layout.build({"text": batch.text_lengths}, batch.text_ids.device)
        padding = layout.padding("text")
        ids_NT = batch.text_ids.long()[padding.row_of_slot].masked_fill(
            ~padding.is_token, self.model.config.pad_token_id or 0
        )
        tokens_NTD = self.model(input_ids=ids_NT, attention_mask=padding.is_token.long()).last_hidden_state
        results = [] if self.results is None else self.results.take()
        cls_ND = tokens_NTD[:, 0]
        if self.config.pooling == "mean":
            mask = padding.is_token[..., None].to(tokens_NTD.dtype)
            cls_ND = (tokens_NTD * mask).sum(1) / mask.sum(1)
        return Targets(cls_ND, tokens_NTD, results, padding.is_token)


class HFImageTeacher(Teacher):
    """A ViT-like vision encoder; its CLS is the first token, or the mean of all by ``pooling``."""

    def __init__(self, name: str, config: TeacherConfig, where: str) -> None:
        super().__init__(config)
        model = load_model(name, pretrained=True, where=where)
        self.model = getattr(model, "vision_model", model)
        vision = self.model.config
        if not hasattr(vision, "hidden_size") or not hasattr(vision, "image_size"):
            raise UserError(f"{where}: '{name}' is no vision encoder; set modality: text")
        own_size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        mean, std = (config.mean, config.std) if config.mean and config.std else published_mean_std(name, where)
        self.normalize = Normalize(config.mean or mean, config.std or std, config.image_size or own_size)
        self.width = vision.hidden_size

    def encode(self, batch: Batch) -> Targets:
        """Return the pooled vector of every image and its tokens."""
        pixels: torch.Tensor = self.normalize(batch.images, self.dtype)
        tokens_BTD = self.model(pixel_values=pixels).last_hidden_state
        cls_BD = tokens_BTD[:, 0] if self.config.pooling == "cls" else tokens_BTD.mean(dim=1)
        return Targets(cls_BD, tokens_BTD)
