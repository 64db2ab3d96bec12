"""The embedding module of a Hugging Face text encoder."""

from __future__ import annotations

import numpy as np
import torch

from mmd2v.config.schema import HFTextEncoderConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.encoders.base import Encoded, EncoderContext, ModalityEncoder
from mmd2v.models.hf_backbone import first_position, load_model, text_positions
from mmd2v.models.packed import Layout


class HFTextEncoder(ModalityEncoder):
    """Words, positions and norm of a pretrained encoder (BERT, RoBERTa and their kin)."""

    def __init__(self, config: HFTextEncoderConfig, context: EncoderContext) -> None:
        super().__init__(config)
        where = f"{context.where}.name"
        model = load_model(config.name, pretrained=context.pretrained, where=where)
        if not hasattr(model, "embeddings") or not hasattr(model.embeddings, "word_embeddings"):
            raise UserError(f"{where}: {type(model).__name__} has no text embedding module")
        if context.vocab_size is not None and context.vocab_size > model.config.vocab_size:
            raise UserError(
                f"data.tokenizer: has {context.vocab_size} ids, but the embedding table of '{config.name}' has "
                f"{model.config.vocab_size} rows: they do not belong together"
            )
        self.vocab_size = model.config.vocab_size
        self.embeddings = model.embeddings
        own_first = first_position(model)
        self.first_position = own_first if config.first_position is None else config.first_position
        limit = text_positions(model) + own_first - self.first_position
        if context.max_length is not None and context.max_length > limit:
            raise UserError(
                f"data.tokenizer.max_length: found {context.max_length}, '{config.name}' has {limit} positions"
            )
        self.max_length = limit
        self.embeddings.dropout.p = config.dropout
        own_width = self.embeddings.word_embeddings.embedding_dim
        self.bridge = torch.nn.Linear(own_width, context.width) if own_width != context.width else torch.nn.Identity()
        self.norm = torch.nn.LayerNorm(context.width, eps=config.norm_eps) if config.norm else torch.nn.Identity()
        if config.frozen:
            self.embeddings.requires_grad_(False)

    def lengths(self, batch: Batch) -> np.ndarray:
        """Return the tokens of every caption."""
        return batch.text_lengths.numpy().astype(np.int64)

    def forward(self, batch: Batch, layout: Layout, modality: str) -> Encoded:
        """Return [S, D] for the packed ids [S]."""
        positions = layout.position_of_row(modality) + self.first_position
        x_1SC = self.embeddings(input_ids=batch.text_ids[None].long(), position_ids=positions[None])
        return Encoded(self.norm(self.bridge(x_1SC[0])))
