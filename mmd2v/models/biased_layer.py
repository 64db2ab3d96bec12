"""A layer whose attention has a learned bias a pair of positions (VLMo, BEiT), for inference.

Shapes: T rows of all sequences ordered by modality, S sequences, L tokens of one, H heads, K width of a head,
R rows of the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mmd2v.config.schema import LayerConfig
from mmd2v.models.layers import SHARED, Layer
from mmd2v.models.packed import Layout


@dataclass(frozen=True)
class BiasedLayout(Layout):
    """Sequences of equal length within a modality, rows of padding included; one modality, or all as one (`joint`)."""

    bias_index: torch.Tensor | None = None
    """int64 [L, L] on the device: the row of the table for what a token (first) sees of another (second)."""


class BiasedLayer(Layer):
    """A pre-norm `Layer` of shared attention with ``bias_table`` [R, H]; without rows it has none."""

    def __init__(
        self, config: LayerConfig, width: int, heads: int, modalities: tuple[str, ...], table_rows: int = 0
    ) -> None:
        super().__init__(config, width, heads, modalities)
        if self.norm != "pre" or self.attention_owner != SHARED:
            raise ValueError("a biased layer is pre-norm and shares its attention")
        self.bias_table = nn.Parameter(torch.zeros(table_rows, self.heads)) if table_rows else None

    def _attention(self, x_TD: torch.Tensor, layout: Layout) -> torch.Tensor:
        w = self.attention[SHARED]
        qkv_THK = w.qkv(w.norm(x_TD)).unflatten(1, (3, self.heads, -1)).unbind(1)
        index_LL = getattr(layout, "bias_index", None)
        bias_HLL = None
        if self.bias_table is not None and index_LL is not None:
            bias_HLL = self.bias_table[index_LL].permute(2, 0, 1)
        branch_TD = w.proj(_attend(*qkv_THK, layout, bias_HLL).flatten(1))
        return x_TD + (branch_TD if w.layer_scale is None else branch_TD * w.layer_scale)


def _attend(
    q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, layout: Layout, bias_HLL: torch.Tensor | None
) -> torch.Tensor:
    """Return softmax(q kᵀ / √K + bias) v within every sequence, [T, H, K]."""
    dtype = q_THK.dtype
    if q_THK.device.type == "cpu":
        q_THK, k_THK, v_THK = q_THK.float(), k_THK.float(), v_THK.float()
    lengths = [int(layout.lengths[name].max(initial=0)) for name in layout.modalities]

    def together(x_THK: torch.Tensor) -> torch.Tensor:
        parts = [layout.unflatten(rows, name) for name, rows in layout.split(x_THK).items()]
        return torch.cat(parts, dim=1).transpose(1, 2)

    q_SHLK = together(q_THK)
    mask = None if bias_HLL is None else bias_HLL[None].to(q_SHLK.dtype)
    real = [layout.is_key(name) for name in layout.modalities]
    if any(is_key_SL is not None for is_key_SL in real):
        sequences = len(q_SHLK)
        is_key_SL = torch.cat(
            [
                q_SHLK.new_ones(sequences, length, dtype=torch.bool) if one is None else one
                for one, length in zip(real, lengths, strict=True)
            ],
            dim=1,
        )[:, None, None]
        mask = is_key_SL if mask is None else mask.masked_fill(~is_key_SL, -torch.inf)
    with torch.autocast(q_SHLK.device.type, enabled=False):
        out_SHLK = F.scaled_dot_product_attention(q_SHLK, together(k_THK), together(v_THK), attn_mask=mask)
    parts = out_SHLK.transpose(1, 2).split(lengths, dim=1)
    return torch.cat([part.flatten(0, 1) for part in parts]).to(dtype)
