"""Token embedding table with learned positions."""

from __future__ import annotations

import numpy as np
import torch
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
        self.first_position = config.first_position
        self.padded = config.padding
        self.longest = context.max_length
        rows = config.position_rows or context.max_length + config.first_position
        if config.positions == "learned" and rows < context.max_length + config.first_position:
            raise UserError(
                f"{context.where}.position_rows: found {rows}, expected at least {context.max_length} "
                f"(data.tokenizer.max_length) + {config.first_position} (first_position)"
            )
        self.max_length = rows - config.first_position if config.positions == "learned" else None
        self.embedding = nn.Embedding(context.vocab_size, context.width)
        self.positions = nn.Embedding(rows, context.width) if config.positions == "learned" else None
        self.norm = nn.LayerNorm(context.width, eps=config.norm_eps) if config.norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        if config.frozen:
            self.requires_grad_(False)

    def lengths(self, batch: Batch) -> np.ndarray:
        """Return the tokens of every caption, or of the longest (or greatest possible) with ``padding``."""
        lengths = batch.text_lengths.numpy().astype(np.int64)
        if self.padded == "none":
            return lengths
        return np.full_like(lengths, self.longest if self.padded == "max_length" else lengths.max(initial=0))

    def keys(self, batch: Batch) -> np.ndarray | None:
        """Return the real tokens of every caption where there are rows of padding."""
        return None if self.padded == "none" else batch.text_lengths.numpy().astype(np.int64)

    def forward(self, batch: Batch, layout: Layout, modality: str) -> Encoded:
        """Return [rows, D] for the packed ids [S]; a row of padding is the norm of 0, as in fairseq's models."""
        x_SD = self.embedding(batch.text_ids)
        real = layout
        if self.padded != "none":
            real = layout.once("real", lambda: Layout.build({modality: batch.text_lengths}, layout.device))
        if self.positions is not None:
            x_SD = x_SD + self.positions(real.position_of_row(modality) + self.first_position)
        if self.padded != "none":
            is_key_SL = layout.is_key(modality)
            assert is_key_SL is not None
            x_RD = x_SD.new_zeros(is_key_SL.numel(), x_SD.shape[1])
            x_SD = x_RD.index_copy(0, _real_rows(layout, modality), x_SD)
        return Encoded(self.dropout(self.norm(x_SD)))


def _real_rows(layout: Layout, modality: str) -> torch.Tensor:
    """int64: the rows of a modality that are no padding; computed on the host, once a batch."""

    def build() -> torch.Tensor:
        longest = int(layout.lengths[modality].max(initial=0))
        is_key = np.arange(longest)[None, :] < layout.keys[modality][:, None]
        return layout.on_device(np.flatnonzero(is_key))

    return layout.once(("real_rows", modality), build)
