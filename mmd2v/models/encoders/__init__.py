"""Modality encoders: raw input of one modality → token rows that enter the layers.

Adding a kind of encoder is a config class, an encoder class, and one call of `register_encoder`; it may live in any
module that `mmd2v.plugins` finds.
"""

from __future__ import annotations

from mmd2v.config.encoder_kinds import add_encoder_kind
from mmd2v.config.schema import EncoderConfig
from mmd2v.models.encoders.base import ArrayEncoder, Encoded, EncoderContext, FixedGrid, ModalityEncoder
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


def register_encoder(config: type[EncoderConfig], encoder: type[ModalityEncoder]) -> None:
    """Let configs name a further kind of encoder: ``config`` describes it, ``encoder(config, context)`` is one.

    ``config`` has a ``kind: Literal["NAME"] = Field("NAME", …)`` of its own. Doing it twice is fine.

    Raises:
        TypeError: ``config`` has no such kind, or one of the two is of another base class.
        ValueError: the kind is taken.
    """
    if not (isinstance(encoder, type) and issubclass(encoder, ModalityEncoder)):
        raise TypeError(f"found {encoder!r}, expected a subclass of ModalityEncoder")
    kind = add_encoder_kind(config)
    if ENCODERS.setdefault(kind, encoder) is not encoder:
        raise ValueError(f"encoder kind '{kind}': {ENCODERS[kind].__qualname__} is its encoder already")


__all__ = [
    "ENCODERS",
    "LIBRARY_PARTS",
    "ArrayEncoder",
    "Encoded",
    "EncoderContext",
    "FixedGrid",
    "ModalityEncoder",
    "register_encoder",
]
