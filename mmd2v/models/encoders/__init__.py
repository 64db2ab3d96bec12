"""Modality encoders: raw input of one modality → token rows that enter the layers.

Adding a modality is one file here and one line in ``ENCODERS``.
"""

from __future__ import annotations

from mmd2v.models.encoders.base import Encoded, EncoderContext, ModalityEncoder
from mmd2v.models.encoders.hf import HFTextEncoder
from mmd2v.models.encoders.patch import PatchEncoder
from mmd2v.models.encoders.timm import TimmEncoder
from mmd2v.models.encoders.tokens import TokenEncoder

ENCODERS: dict[str, type[ModalityEncoder]] = {
    "patch": PatchEncoder,
    "timm": TimmEncoder,
    "tokens": TokenEncoder,
    "hf": HFTextEncoder,
}

LIBRARY_PARTS = ("backbone", "embeddings")
"""Children of an encoder that a library builds, initialises and may fill with pretrained weights."""

__all__ = ["ENCODERS", "LIBRARY_PARTS", "Encoded", "EncoderContext", "ModalityEncoder"]
