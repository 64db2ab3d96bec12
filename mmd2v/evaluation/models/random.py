"""``random[:WIDTH]``: embeddings drawn from a hash of the content, which score at chance.

Shapes: B images, N texts, E width of an embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from mmd2v.errors import UserError
from mmd2v.evaluation.models.measured import MeasuredModel
from mmd2v.inference import Precision

_USUAL_WIDTH = 512
_WIDEST = 65_536


class RandomModel(MeasuredModel):
    """A point of the unit sphere for every image and text: equal content, equal point; uniform over contents."""

    def __init__(self, width: int, device: torch.device, precision: Precision) -> None:
        super().__init__(f"random:{width}", width, device, precision)

    def prepare_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return [E]: the point of the pixels and the size of the image."""
        return self._point(b"image", str(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes())

    def embed_images(self, prepared: torch.Tensor) -> torch.Tensor:
        """Return [B, E] as they are."""
        return prepared

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """Return [N, E], the points of the texts."""
        return torch.stack([self._point(b"text", text.encode("utf-8", "surrogatepass")) for text in texts])

    def embed_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [N, E] as they are, on the device."""
        return tokens.to(self.device)

    def encode_ids(self, ids: Sequence[str]) -> torch.Tensor:
        """Return [B, E], L2-normalised: the points of images of which only the ids are there, as of public sets."""
        points = torch.stack([self._point(b"id", name.encode("utf-8", "surrogatepass")) for name in ids])
        return F.normalize(points, dim=-1).to(self.device)

    def image_preprocessing(self) -> str:
        """Say what happens to an image."""
        return "a hash of the pixels, or of the id where none are read"

    def text_preprocessing(self) -> str:
        """Say what happens to a text."""
        return "a hash of the characters"

    def _point(self, kind: bytes, content: bytes) -> torch.Tensor:
        seed = int.from_bytes(hashlib.blake2b(content, digest_size=16, person=kind).digest(), "little")
        return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(self.width, np.float32))


def open_random(rest: str, device: torch.device, precision: Precision) -> RandomModel:
    """Open the model of that width. Raises UserError when it is no width."""
    if rest and not (rest.isascii() and rest.isdigit() and 1 <= int(rest) <= _WIDEST):
        raise UserError(f"model: found 'random:{rest}', expected random or random:WIDTH from 1 to {_WIDEST}")
    return RandomModel(int(rest) if rest else _USUAL_WIDTH, device, precision)
