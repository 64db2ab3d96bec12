"""What a forward pass of the student gives, and what it keeps on the way if asked.

Shapes: S sequences of one modality, D width, E width of the embedding, C of a backbone's pooled feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch

from mmd2v.models.masking import Mask
from mmd2v.models.packed import Packed


@dataclass(frozen=True)
class Wanted:
    """What a forward pass is to keep besides the output of the last layer."""

    results: frozenset[str] = frozenset()
    """Modalities whose layer results are kept."""
    layers: frozenset[int] = frozenset()
    """Layers after which every modality's CLS is kept, counted from 0."""
    cls_attention: frozenset[str] = frozenset()
    """Modalities whose CLS attention in the last layer is kept."""

    def __or__(self, other: Wanted) -> Wanted:
        return Wanted(*(getattr(self, f.name) | getattr(other, f.name) for f in fields(self)))


NOTHING_MORE = Wanted()


@dataclass(frozen=True)
class StudentOutput:
    """What the objectives see, a modality each."""

    pooled: dict[str, torch.Tensor] = field(default_factory=dict)
    """[S, D], CLS or mean of the last layer after the final norm."""
    embedding: dict[str, torch.Tensor] = field(default_factory=dict)
    """[S, E], fp32, L2-normalised."""
    tokens: Packed | None = None
    """All rows after the last layer, before the final norm."""
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    """[S, C], fp32, the pooled feature of each frozen backbone."""
    encoded: dict[str, torch.Tensor] = field(default_factory=dict)
    """[rows, D], what entered the layers."""
    results: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """[rows, D] a layer that the modality passed: its MLP's output before the residual; where `Wanted.results`."""
    layer_cls: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Layer → modality → [S, D], where `Wanted.layers`."""
    cls_attention: dict[str, torch.Tensor] = field(default_factory=dict)
    """[S, tokens], fp32, where `Wanted.cls_attention`."""
    masks: dict[str, Mask] = field(default_factory=dict)
    """Modality → the masks it was seen with; its sequences, everywhere else in here, are clones then."""
    visible: dict[str, torch.Tensor] = field(default_factory=dict)
    """[rows, D], a masked modality's rows after the final norm."""
    pair: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """Rows of images and of texts [P] → the CLS of the text when both are one sequence, after the final norm [P, D];
    None where `joint_from` is."""
