"""Hugging Face text encoders that are measured on sentences alone: ``hf-text:FOLDER``.

Shapes: N texts, T tokens of the longest text of a batch, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from mmd2v.errors import UserError, unknown_name
from mmd2v.evaluation.models import TEXT_ALONE
from mmd2v.inference import ImageInput, Precision, resolve_device
from mmd2v.models.hf_backbone import load_model, text_positions

KIND = TEXT_ALONE
"""What its names begin with."""

MAX_LENGTH = 128
"""Tokens of a text, special ones included; longer ones are cut."""

HFPooling = Literal["embedding", "cls", "mean", "mean_padded"]
"""cls: the first token; mean: over real tokens; mean_padded: over all `MAX_LENGTH` rows, padding included, so that no
other text of the batch matters; embedding: as mean."""


class HFTextModel:
    """A BERT-like encoder with the tokenizer beside it."""

    def __init__(
        self,
        source: str,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        *,
        blocks: int | None = None,
        max_length: int = MAX_LENGTH,
    ) -> None:
        """Open a folder, or a name of the hub.

        Args:
            source: where weights (safetensors) and tokenizer are.
            device: where it computes.
            precision: "bf16" computes matrix products in bfloat16.
            blocks: use the first ones alone; 0: the embeddings.
            max_length: tokens of a text, at most.

        Raises:
            UserError: no encoder of texts, no tokenizer, or fewer blocks.
        """
        from transformers import AutoTokenizer  # slow to import, and every measured model has this class's module

        where = f"{KIND}:{source}"
        self.device = resolve_device(device)
        self.precision = precision
        model = load_model(source, pretrained=True, where=where)
        if not hasattr(model.config, "vocab_size") or not hasattr(model.config, "max_position_embeddings"):
            raise UserError(f"{where}: {type(model).__name__} is no encoder of texts")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: no tokenizer beside the weights: {str(error).splitlines()[0]}") from None
        self.name = Path(source).name
        if blocks is not None:
            layers = getattr(getattr(model, "encoder", None), "layer", None)
            if layers is None or not 0 <= blocks <= len(layers):
                has = "blocks that cannot be told apart" if layers is None else f"{len(layers)} blocks"
                raise UserError(f"{where}: {blocks} blocks were asked for, the encoder has {has}")
            model.encoder.layer = layers[:blocks]
            self.name += f", {blocks} blocks"
        self.width: int = model.config.hidden_size
        self.max_length = min(max_length, text_positions(model))
        self._model = model.eval().requires_grad_(False).to(self.device)

    def preprocessing(self) -> str:
        """Say in a line what happens to a text before the model."""
        kind = type(self._tokenizer).__name__
        return f"texts: {kind} tokens, at most {self.max_length}; arithmetic: {self.precision}"

    def encode_image(self, images: Sequence[ImageInput] | torch.Tensor, batch_size: int = 64) -> torch.Tensor:
        """Raise UserError: it sees none."""
        raise UserError(f"{KIND}: '{self.name}' encodes texts alone, no images")

    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """Return fp32 [N, D], L2-normalised: the mean of the last layer's real tokens."""
        return self.features(texts, "mean", batch_size)

    def features(self, texts: Sequence[str], pooling: HFPooling = "embedding", batch_size: int = 256) -> torch.Tensor:
        """Return fp32 [N, D], L2-normalised. Raises UserError for another pooling."""
        if pooling not in get_args(HFPooling):
            raise unknown_name("pooling", pooling, get_args(HFPooling))
        if batch_size < 1:
            raise UserError(f"batch_size: found {batch_size}, expected at least 1")
        pads = pooling == "mean_padded"
        rows_ND = torch.zeros(len(texts), self.width, device=self.device)
        # Of like length together: padding costs as much as text.
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = self._tokenizer(
                [texts[place] for place in chosen],
                padding="max_length" if pads else True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")
            with torch.no_grad(), autocast:
                tokens_NTD = self._model(**batch).last_hidden_state.float()
            rows_ND[chosen] = _pool(tokens_NTD, batch["attention_mask"], pooling)
        return F.normalize(rows_ND, dim=-1)


def _pool(tokens_NTD: torch.Tensor, is_token_NT: torch.Tensor, pooling: HFPooling) -> torch.Tensor:
    if pooling == "cls":
        return tokens_NTD[:, 0]
    if pooling == "mean_padded":
        return tokens_NTD.mean(dim=1)
    weight_NT1 = is_token_NT[..., None].to(tokens_NTD.dtype)
    return (tokens_NTD * weight_NT1).sum(dim=1) / weight_NT1.sum(dim=1)
