"""What every measured model offers, ours and those it is set beside.

Shapes: B images, N texts, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from mmd2v.inference import ImageInput


class RetrievalModel(Protocol):
    """An image and a text encoder with one embedding space; `mmd2v.inference.Encoder` is one.

    Embeddings are fp32, L2-normalised and on ``device``.
    """

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def width(self) -> int:
        """E"""

    def encode_image(self, images: Sequence[ImageInput] | torch.Tensor, batch_size: int = 64) -> torch.Tensor:
        """Return [B, E] of decoded images or paths, with the model's own resizing and normalisation."""

    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """Return [N, E] of sentences, with the model's own tokenizer and context length."""

    def preprocessing(self) -> str:
        """Say in a line what happens to an image and a text before the model."""
