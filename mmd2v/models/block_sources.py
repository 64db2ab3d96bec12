"""Pretrained blocks of every source in our names, with what their weights do not say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from mmd2v.config.schema import InitConfig, ModelConfig
from mmd2v.errors import UserError, nearest, unknown_name
from mmd2v.models.checkpoints.converted import FAMILIES, block, read_architecture
from mmd2v.models.hf_backbone import bert_block, load_model
from mmd2v.models.layers import JOINT, SHARED


@dataclass(frozen=True)
class Block:
    """A pretrained block, or one half of it.

    Its weights fit any number of heads, any place of the norms and any epsilon, and compute something else there.
    """

    weights: dict[str, torch.Tensor]
    """``attention.qkv.weight`` … ``mlp.fc2.bias``."""
    heads: int
    norm: str
    """``pre`` or ``post``."""
    eps: dict[str, float]
    """``attention`` and ``mlp`` → epsilon of that half's norms."""


class BlockReader:
    """Reads blocks of the sources that a model's layers name; a library's model is loaded once."""

    def __init__(self, config: ModelConfig) -> None:
        self.sources = config.sources
        self._models: dict[str, nn.Module] = {}

    def read(self, init: InitConfig, index: int, owner: str, halves: Iterable[str], where: str) -> Block:
        """Return block ``index`` of a source as ``owner`` takes it over; it has ``halves`` at least.

        Raises UserError, beginning with ``where``, for a source that is none, or has no such block or owner.
        """
        kind, _, path = self.sources.get(init.source, init.source).partition(":")
        if not path:
            kinds = [f"{kind}:FOLDER" for kind in ("hf", "mmd2v", *FAMILIES)]
            raise UserError(
                f"{where}: found '{init.source}', expected {', '.join(kinds)} or a name in model.sources "
                f"({', '.join(sorted(self.sources)) or 'which is empty'}).{nearest(init.source, self.sources)}"
            )
        if kind == "hf":
            if path not in self._models:
                self._models[path] = load_model(path, pretrained=True, where=where)
            model = self._models[path]
            weights = bert_block(model, index, where)
            return Block(weights, model.config.num_attention_heads, "post", _both(model.config.layer_norm_eps))
        if kind == "mmd2v":
            from mmd2v.models.exported import exported_block

            # What nobody owns alone may come from any single owner: an image model's attention may become shared.
            anyone = init.modality is None and owner in (SHARED, JOINT)
            return exported_block(path, index, init.modality or owner, halves, where, anyone=anyone)
        if kind in FAMILIES:
            source = read_architecture(path, kind, where)
            norm = "pre" if kind == "beit2" else "post"
            return Block(block(path, kind, index, where), source.heads, norm, _both(source.eps))
        raise unknown_name(where, kind, ["hf", "mmd2v", *FAMILIES])


def _both(eps: float) -> dict[str, float]:
    return {"attention": eps, "mlp": eps}
