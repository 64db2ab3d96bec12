"""Token embedding table with learned positions, trained from scratch."""

from __future__ import annotations

import numpy as np
from torch import nn

from mmd2v.config.schema import TokenEncoderConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.encoders.base import Encoded, EncoderContext, ModalityEncoder
from mmd2v.models.packed import Layout


class TokenEncoder(ModalityEncoder):
    """Token plus position embedding; the first token of a sequence is the tokenizer's own CLS."""

    def __init__(self, config: TokenEncoderConfig, context: EncoderContext) -> None:
        super().__init__(config)
        if context.vocab_size is None or context.max_length is None:
            raise UserError(f"{context.where}: a token encoder needs data.tokenizer")
        if config.positions == "sincos":
            raise UserError(f"{context.where}.positions: found 'sincos', expected learned or none for text")
        self.vocab_size = context.vocab_size
        self.max_length = context.max_length if config.positions == "learned" else None
        self.embedding = nn.Embedding(context.vocab_size, context.width)
        self.positions = nn.Embedding(context.max_length, context.width) if config.positions == "learned" else None
        self.norm = nn.LayerNorm(context.width) if config.norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        if config.frozen:
            self.requires_grad_(False)

    def lengths(self, batch: Batch) -> np.ndarray:
        """Return the tokens of every caption."""
        return batch.text_lengths.numpy().astype(np.int64)

    def forward(self, batch: Batch, layout: Layout, modality: str) -> Encoded:
        """Return [S, D] for the packed ids [S]."""
        x_SD = self.embedding(batch.text_ids)
        if self.positions is not None:
            x_SD = x_SD + self.positions(layout.position_of_row(modality))
        return Encoded(self.dropout(self.norm(x_SD)))
