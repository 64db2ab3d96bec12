"""A transformer layer whose attention and MLP (each with its norm) are owned a modality or shared.

Shapes: T rows of all sequences ordered by modality, D width, E another one, F hidden width, H heads, K width of a head.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from mmd2v.config.schema import LayerConfig
from mmd2v.models.attention import attend
from mmd2v.models.packed import Layout
from mmd2v_kernels import Expert, expert_mlp, leave_out, linear

SHARED = "shared"
"""Owner name of weights that all modalities use."""


JOINT = "joint"
"""Owner name of the expert that sees all rows when image and text are one sequence (VLMo's vision-language expert)."""


class Linear(nn.Linear):
    """`torch.nn.Linear` whose halves are multiplied in fp32 where a processor has no instructions for them."""

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return [T, E] of rows [T, D]."""
        return linear(x_TD, self.weight, self.bias)


class AttentionWeights(nn.Module):
    """Norm, query-key-value and output maps of one owner."""

    def __init__(self, width: int, config: LayerConfig, owner: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=config.eps_of(owner))
        self.qkv = Linear(width, 3 * width)
        self.inner_norm = nn.LayerNorm(width, eps=config.eps_of(owner)) if config.sub_norm else None
        self.proj = Linear(width, width)
        self.layer_scale = _layer_scale(width, config)


class MLPWeights(nn.Module):
    """Norm and the two maps of one owner's MLP."""

    def __init__(self, width: int, config: LayerConfig, owner: str) -> None:
        super().__init__()
        hidden = round(width * config.mlp_ratio)
        self.norm = nn.LayerNorm(width, eps=config.eps_of(owner))
        self.fc1 = nn.Linear(width, hidden)
        self.inner_norm = nn.LayerNorm(hidden, eps=config.eps_of(owner)) if config.sub_norm else None
        self.fc2 = nn.Linear(hidden, width)
        self.layer_scale = _layer_scale(width, config)

    def expert(self) -> Expert:
        """Return the weights in the form the kernel takes."""
        inner = self.inner_norm
        return Expert(
            self.norm.weight,
            self.norm.bias,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            self.layer_scale,
            None if inner is None else inner.weight,
            None if inner is None else inner.bias,
            self.norm.eps,
        )


def _layer_scale(width: int, config: LayerConfig) -> nn.Parameter | None:
    return None if config.layer_scale is None else nn.Parameter(torch.full((width,), config.layer_scale))


class Layer(nn.Module):
    """Self-attention within each sequence, then the MLP; all modalities go through in one packed call.

    ``recompute`` keeps in training the layer's input alone and computes it again in the backward pass, with the same
    draws.
    """

    def __init__(
        self, config: LayerConfig, width: int, heads: int, modalities: tuple[str, ...], recompute: bool = False
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.modalities = modalities
        self.norm = config.norm
        self.heads = config.heads or heads
        self.drop_path = config.drop_path
        self.dropout = config.dropout
        self.attention_owner = config.attention_owner
        self.mlp_owner = config.mlp_owner
        self.attention = nn.ModuleDict(
            {owner: AttentionWeights(width, config, owner) for owner in self._owners("attention")}
        )
        owners = self._owners("mlp") + ((JOINT,) if config.joint_expert else ())
        self.mlp = nn.ModuleDict({owner: MLPWeights(width, config, owner) for owner in owners})

    def forward(
        self, x_TD: torch.Tensor, layout: Layout, with_result: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the rows after this layer, [T, D]; ``layout`` holds no modality the layer does not know.

        ``with_result`` returns beside them the MLP's output before scales and residual [T, D], data2vec's layer result.
        """
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return self._compute(x_TD, layout, with_result)
        # Within this module's forward and not around it: ZeRO-3 would take the second pass for a forward pass, and
        # release the weights after it that the backward pass is about to need. Nor may that pass stop early, in the
        # middle of a module.
        with set_checkpoint_early_stop(False):
            return checkpoint(self._compute, x_TD, layout, with_result, use_reentrant=False)

    def _compute(
        self, x_TD: torch.Tensor, layout: Layout, with_result: bool
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x_TD = self._attention(x_TD, layout)
        if layout.joint and JOINT in self.mlp:
            ranges = {JOINT: slice(0, layout.total)}
        elif self.mlp_owner == SHARED:
            ranges = {SHARED: slice(0, layout.total)}
        else:
            ranges = layout.rows
        rows = [(rows.start, rows.stop) for rows in ranges.values()]
        kept_S, row_scale_T, index_R = self._kept_sequences(layout), None, None
        if kept_S is not None and self.norm == "pre" and not with_result and self._pays(kept_S, layout, x_TD.device):
            # Rows of dropped sequences do not even pass the products.
            index_R, rows = leave_out(rows, np.repeat(kept_S, layout.all_lengths), x_TD.device)
            row_scale_T = x_TD.new_full((1,), 1 / (1 - self.drop_path)).expand(layout.total)
        elif kept_S is not None:
            row_scale_T = self._row_scale(kept_S, x_TD, layout)
        return expert_mlp(
            x_TD,
            [self.mlp[owner].expert() for owner in ranges],
            rows,
            norm=self.norm,
            row_scale_T=row_scale_T,
            index_R=index_R,
            dropout=self.dropout if self.training else 0.0,
            with_branch=with_result,
        )

    def cls_attention(self, x_TD: torch.Tensor, layout: Layout, modality: str) -> torch.Tensor:
        """Return how much the CLS of every sequence attends to its tokens, mean over heads, fp32 [S, tokens].

        ``x_TD`` are the rows before this layer. Rows of padding get 0. Raises ValueError for sequences of different
        lengths.
        """
        if not layout.is_rectangular(modality):
            raise ValueError(f"cls_attention: the sequences of '{modality}' have different lengths")
        x_RD = layout.split(x_TD)[modality]
        if len(x_RD) == 0:
            return x_RD.new_zeros(0, 0, dtype=torch.float32)
        w = self.attention[SHARED if self.attention_owner == SHARED else modality]
        qkv_RE = w.qkv(w.norm(x_RD) if self.norm == "pre" else x_RD)
        q_SLHK, k_SLHK, _ = layout.unflatten(qkv_RE, modality).unflatten(2, (3, self.heads, -1)).unbind(2)
        logits_SHL = torch.einsum("shk,slhk->shl", q_SLHK[:, 0].float(), k_SLHK.float()) * q_SLHK.shape[-1] ** -0.5
        is_key_SL = layout.is_key(modality)
        if is_key_SL is not None:
            logits_SHL = logits_SHL.masked_fill(~is_key_SL[:, None], -torch.inf)
        return logits_SHL.softmax(dim=-1).mean(dim=1)

    def _attention(self, x_TD: torch.Tensor, layout: Layout) -> torch.Tensor:
        pre = self.norm == "pre"
        x_of = self._by_owner(x_TD, layout)
        weights = {owner: self.attention[owner] for owner in x_of}
        qkv_TE = _concatenate([w.qkv(w.norm(x_of[owner]) if pre else x_of[owner]) for owner, w in weights.items()])
        q_THK, k_THK, v_THK = qkv_TE.unflatten(1, (3, self.heads, -1)).unbind(1)
        out_of = self._by_owner(attend(q_THK, k_THK, v_THK, layout).flatten(1), layout)
        kept_S, scale_of = self._kept_sequences(layout), {}
        if kept_S is not None:
            scale_of = self._by_owner(self._row_scale(kept_S, x_TD, layout)[:, None], layout)
        parts = []
        for owner, w in weights.items():
            branch_RD = w.proj(out_of[owner] if w.inner_norm is None else w.inner_norm(out_of[owner]))
            if self.training and self.dropout:
                branch_RD = F.dropout(branch_RD, self.dropout)
            if w.layer_scale is not None:
                branch_RD = branch_RD * w.layer_scale
            if owner in scale_of:
                branch_RD = branch_RD * scale_of[owner]
            x_RD = x_of[owner] + branch_RD
            parts.append(x_RD if pre else w.norm(x_RD))
        return _concatenate(parts)

    def _kept_sequences(self, layout: Layout) -> np.ndarray | None:
        """Stochastic depth: bool [S], the sequences that are not dropped; None when off.

        Drawn on the host: which rows are left then is known without waiting for a device.
        """
        if not (self.training and self.drop_path):
            return None
        sequences = len(next(iter(layout.lengths.values()))) if layout.joint else len(layout.all_lengths)
        kept_S = (torch.rand(sequences) < 1 - self.drop_path).numpy()
        return np.tile(kept_S, len(layout.lengths)) if layout.joint else kept_S

    def _row_scale(self, kept_S: np.ndarray, x_TD: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Return [T]: 0 for the rows of a dropped sequence, 1 / keep for the others."""
        scale_S = layout.on_device(kept_S / (1 - self.drop_path))
        return scale_S.to(x_TD.dtype)[layout.sequence_of_row()]

    @staticmethod
    def _pays(kept_S: np.ndarray, layout: Layout, device: torch.device) -> bool:
        """Whether fewer products make up for the gather: on a CPU only where they are an eighth fewer."""
        return device.type != "cpu" or 8 * np.dot(kept_S, layout.all_lengths) <= 7 * layout.total

    def _by_owner(self, x_TX: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
        """Return the rows of each owner of attention weights: one of all of them when shared."""
        return {SHARED: x_TX} if self.attention_owner == SHARED else layout.split(x_TX)

    def _owners(self, half: str) -> tuple[str, ...]:
        owner = self.attention_owner if half == "attention" else self.mlp_owner
        return (SHARED,) if owner == SHARED else self.modalities


def _concatenate(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
