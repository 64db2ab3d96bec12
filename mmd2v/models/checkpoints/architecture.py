"""What is known of a public checkpoint besides its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

FAMILIES = ("data2vec2-image", "data2vec2-text", "beit2")
"""Kinds of checkpoints that are converted; also the prefixes under which configs name their folders."""


class Architecture(BaseModel):
    """Sizes of a transformer encoder, read from its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    eps: float = Field(gt=0, description="of the layer norms")
    mlp_ratio: float = Field(gt=0, description="hidden width of an MLP / width")
    image_size: PositiveInt | None = Field(None, description="side of the square image, in pixels")
    patch_size: PositiveInt | None = Field(None, description="side of a square patch, in pixels")
    vocab_size: PositiveInt | None = Field(None, description="rows of the embedding table")
    positions: PositiveInt | None = Field(None, description="rows of the position table, fairseq's first two included")


@dataclass(frozen=True)
class Conversion:
    """A checkpoint in our names."""

    family: str
    architecture: Architecture
    state: dict[str, torch.Tensor]
    """fp32"""
    ignored: dict[str, int]
    """Pattern of keys that were left out on purpose → how many there were."""
