"""A transformer layer whose attention and MLP (each with its norm) are owned a modality or shared.

Shapes: T rows of all sequences ordered by modality, D width, F hidden width, H heads, K width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mmd2v.config.schema import LayerConfig
from mmd2v.models.attention import attend
from mmd2v.models.packed import Layout
from mmd2v_kernels import Expert, expert_mlp

SHARED = "shared"
"""Owner name of weights that all modalities use."""


class AttentionWeights(nn.Module):
    """Norm, query-key-value and output maps of one owner."""

    def __init__(self, width: int, eps: float, layer_scale: float | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.layer_scale = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))


class MLPWeights(nn.Module):
    """Norm and the two maps of one owner's MLP."""

    def __init__(self, width: int, hidden: int, eps: float, layer_scale: float | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.layer_scale = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))

    def expert(self) -> Expert:
        """Return the weights in the form the kernel takes."""
        return Expert(
            self.norm.weight,
            self.norm.bias,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            self.layer_scale,
        )


class Layer(nn.Module):
    """Self-attention within each sequence, then the MLP; all modalities go through in one packed call."""

    def __init__(self, config: LayerConfig, width: int, heads: int, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.modalities = modalities
        self.norm = config.norm
        self.eps = config.eps
        self.heads = config.heads or heads
        self.drop_path = config.drop_path
        self.dropout = config.dropout
        self.attention_owner = config.attention_owner
        self.mlp_owner = config.mlp_owner
        hidden = round(width * config.mlp_ratio)
        self.attention = nn.ModuleDict(
            {owner: AttentionWeights(width, config.eps, config.layer_scale) for owner in self._owners("attention")}
        )
        self.mlp = nn.ModuleDict(
            {owner: MLPWeights(width, hidden, config.eps, config.layer_scale) for owner in self._owners("mlp")}
        )

    def forward(self, x_TD: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Return the rows after this layer, [T, D]; ``layout`` holds no modality the layer does not know."""
        x_TD = self._attention(x_TD, layout)
        shared = self.mlp_owner == SHARED
        ranges = {SHARED: slice(0, layout.total)} if shared else layout.rows
        return expert_mlp(
            x_TD,
            [self.mlp[owner].expert() for owner in ranges],
            [(rows.start, rows.stop) for rows in ranges.values()],
            norm=self.norm,
            eps=self.eps,
            row_scale_T=self._row_scale(x_TD, layout),
            dropout=self.dropout if self.training else 0.0,
        )

    def _attention(self, x_TD: torch.Tensor, layout: Layout) -> torch.Tensor:
        pre = self.norm == "pre"
        x_of = self._by_owner(x_TD, layout)
        weights = {owner: self.attention[owner] for owner in x_of}
        qkv_TE = _concatenate([w.qkv(w.norm(x_of[owner]) if pre else x_of[owner]) for owner, w in weights.items()])
        q_THK, k_THK, v_THK = qkv_TE.unflatten(1, (3, self.heads, -1)).unbind(1)
        out_of = self._by_owner(attend(q_THK, k_THK, v_THK, layout).flatten(1), layout)
        row_scale_T = self._row_scale(x_TD, layout)
        scale_of = {} if row_scale_T is None else self._by_owner(row_scale_T[:, None], layout)
        parts = []
        for owner, w in weights.items():
            branch_RD = w.proj(out_of[owner])
            if self.training and self.dropout:
                branch_RD = F.dropout(branch_RD, self.dropout)
            if w.layer_scale is not None:
                branch_RD = branch_RD * w.layer_scale
            if owner in scale_of:
                branch_RD = branch_RD * scale_of[owner]
            x_RD = x_of[owner] + branch_RD
            parts.append(x_RD if pre else w.norm(x_RD))
        return _concatenate(parts)

    def _row_scale(self, x_TD: torch.Tensor, layout: Layout) -> torch.Tensor | None:
        """Stochastic depth: 0 for the rows of a dropped sequence, 1 / keep for the others; None when off."""
        if not (self.training and self.drop_path):
            return None
        keep = 1 - self.drop_path
        kept_S = torch.rand(len(layout.all_lengths), device=x_TD.device) < keep
        return (kept_S / keep).to(x_TD.dtype)[layout.sequence_of_row()]

    def _by_owner(self, x_TX: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
        """Return the rows of each owner of attention weights: one of all of them when shared."""
        return {SHARED: x_TX} if self.attention_owner == SHARED else layout.split(x_TX)

    def _owners(self, half: str) -> tuple[str, ...]:
        owner = self.attention_owner if half == "attention" else self.mlp_owner
        return (SHARED,) if owner == SHARED else self.modalities


def _concatenate(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
