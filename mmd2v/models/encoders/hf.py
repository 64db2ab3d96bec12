"""The embedding module of a Hugging Face text encoder."""

from __future__ import annotations

import numpy as np
import torch

from mmd2v.config.schema import HFTextEncoderConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.encoders.base import Encoded, EncoderContext, ModalityEncoder
from mmd2v.models.hf_backbone import load_model
from mmd2v.models.packed import Layout


class HFTextEncoder(ModalityEncoder):
    """Words, positions and norm of a pretrained encoder (BERT, RoBERTa and their kin)."""

    def __init__(self, config: HFTextEncoderConfig, context: EncoderContext) -> None:
        super().__init__(config)
        where = "model.encoders.text.name"
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
        # RoBERTa and its kin count positions from the padding index + 1.
        self.first_position = getattr(model.embeddings, "padding_idx", -1) + 1 if _offsets_positions(model) else 0
        limit = model.config.max_position_embeddings - self.first_position
        if context.max_length is not None and context.max_length > limit:
            raise UserError(
                f"data.tokenizer.max_length: found {context.max_length}, '{config.name}' has {limit} positions"
            )
        self.embeddings.dropout.p = config.dropout
        own_width = self.embeddings.word_embeddings.embedding_dim
        self.bridge = torch.nn.Linear(own_width, context.width) if own_width != context.width else torch.nn.Identity()
        self.norm = torch.nn.LayerNorm(context.width) if config.norm else torch.nn.Identity()
        if config.frozen:
            self.embeddings.requires_grad_(False)

    def lengths(self, batch: Batch) -> np.ndarray:
        """Return the tokens of every caption."""
        return batch.text_lengths.numpy().astype(np.int64)

    def forward(self, batch: Batch) -> Encoded:
        """Return [S, D] for the packed ids [S]."""
        layout = Layout.build({"text": self.lengths(batch)}, batch.text_ids.device)
        positions = layout.position_of_row("text") + self.first_position
        x_1SC = self.embeddings(input_ids=batch.text_ids[None].long(), position_ids=positions[None])
        return Encoded(self.norm(self.bridge(x_1SC[0])))


def _offsets_positions(model: torch.nn.Module) -> bool:
    return model.config.model_type in {"roberta", "xlm-roberta", "camembert", "data2vec-text"}
