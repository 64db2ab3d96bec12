"""torchscale's multiway encoder layer with the weights of ours, as BEiT-3 runs it on separate images and texts.

Shapes: B sequences, L tokens of one, D width.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from mmd2v.models.layers import Layer

if "fairscale" not in sys.modules:
    # The encoder's file imports two wrappers that the layer does not use, of a package that is no longer kept up.
    fairscale, wrappers = ModuleType("fairscale"), ModuleType("fairscale.nn")
    wrappers.checkpoint_wrapper = wrappers.wrap = lambda module, *_, **__: module
    sys.modules.update({"fairscale": fairscale, "fairscale.nn": wrappers})

from torchscale.architecture.encoder import EncoderLayer

_PARTS = {
    "attention": {"norm": "self_attn_layer_norm", "proj": "self_attn.out_proj"},
    "mlp": {"norm": "final_layer_norm", "fc1": "ffn.fc1", "fc2": "ffn.fc2"},
}


class TorchscaleLayer(nn.Module):
    """Images through the weights A, then texts, padded, through the weights B."""

    def __init__(self, ours: Layer, width: int, fused_attention: bool) -> None:
        super().__init__()
        arguments = Namespace(
            multiway=True,
            encoder_embed_dim=width,
            encoder_ffn_embed_dim=4 * width,
            encoder_attention_heads=ours.heads,
            encoder_normalize_before=True,
            encoder_layers=1,
            layernorm_eps=1e-6,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            activation_fn="gelu",
            drop_path_rate=0.0,
            subln=False,
            deepnorm=False,
            xpos_rel_pos=False,
        )
        self.layer = EncoderLayer(arguments, depth=0)
        if fused_attention:
            self.layer.self_attn.forward = self._fused_attention
        self.copy_weights(ours)

    def copy_weights(self, ours: Layer) -> None:
        """Take the weights of ``image`` as A, of ``text`` as B."""
        state = {}
        for letter, owner in (("A", "image"), ("B", "text")):
            for half, parts in _PARTS.items():
                weights = getattr(ours, half)[owner]
                for own, theirs in parts.items():
                    for kind in ("weight", "bias"):
                        state[self.name(theirs, letter, kind)] = getattr(getattr(weights, own), kind)
            for kind in ("weight", "bias"):
                for x, part in zip("qkv", getattr(ours.attention[owner].qkv, kind).chunk(3), strict=True):
                    state[self.name(f"self_attn.{x}_proj", letter, kind)] = part
        self.layer.load_state_dict(state)

    @staticmethod
    def name(part: str, letter: str, kind: str) -> str:
        """`ffn.fc1` of A is `ffn.A.fc1`; the others carry the letter last."""
        if part.startswith("ffn."):
            return f"ffn.{letter}.{part.removeprefix('ffn.')}.{kind}"
        return f"{part}.{letter}.{kind}"

    def forward(
        self, image_BLD: torch.Tensor, text_BLD: torch.Tensor, is_pad_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            self.layer(image_BLD, None, multiway_split_position=-1)[0],
            self.layer(text_BLD, is_pad_BL, multiway_split_position=0)[0],
        )

    def _fused_attention(self, query, key, value, key_padding_mask=None, **_):
        """Torch's attention in place of two products and a softmax; torchscale's maps around it."""
        attention = self.layer.self_attn
        q, k, v = (
            project(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for project, x in ((attention.q_proj, query), (attention.k_proj, key), (attention.v_proj, value))
        )
        mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
        dtype = q.dtype
        if dtype == torch.bfloat16 and q.device.type == "cpu":  # as ours does: torch's bf16 kernel is slow there
            q, k, v = q.float(), k.float(), v.float()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).to(dtype)
        return attention.out_proj(out.transpose(1, 2).flatten(2)), None
