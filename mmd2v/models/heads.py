"""Small parts around the layers: token types before them, the projection to the embedding after them.

Shapes: T rows of all sequences ordered by modality, R of one, S sequences of one modality, D width, E of the embedding.
"""

from __future__ import annotations

import torch
from torch import nn

from mmd2v.config.schema import ProjectionConfig
from mmd2v.models.packed import Layout


class TokenTypes(nn.Module):
    """A learned vector a modality (BERT's token types, which VLMo uses to tell image from text)."""

    def __init__(self, names: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.index = {name: i for i, name in enumerate(names)}
        self.embedding = nn.Embedding(len(names), width)

    def forward(self, x_TD: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Return the rows with their modality's vector added, [T, D]."""
        parts = [x_RD + self.embedding.weight[self.index[name]] for name, x_RD in layout.split(x_TD).items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Projection(nn.Module):
    """From the pooled vector to the embedding that is compared by cosine."""

    def __init__(self, config: ProjectionConfig, width: int, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.shared = config.shared
        owners = ("shared",) if config.shared else modalities
        self.maps = nn.ModuleDict({owner: _projection(config, width) for owner in owners})

    def forward(self, pooled_SD: torch.Tensor, modality: str) -> torch.Tensor:
        """Return [S, E]."""
        return self.maps["shared" if self.shared else modality](pooled_SD)


def _projection(config: ProjectionConfig, width: int) -> nn.Module:
    dim = config.dim or width
    if config.kind == "none":
        return nn.Identity() if dim == width else nn.Linear(width, dim, bias=False)
    if config.kind == "linear":
        return nn.Sequential(nn.Dropout(config.dropout), nn.Linear(width, dim, bias=False))
    return nn.Sequential(
        nn.Linear(width, width), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(width, dim, bias=False)
    )
