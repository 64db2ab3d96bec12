"""The tensors of the original implementations, and what turns their inputs into ours."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from mmd2v.data.batch import Batch
from mmd2v.distributed.environment import World
from mmd2v.models.checkpoints.convert import convert

CPU = World(0, 1, 0, torch.device("cpu"), "gloo")
FP32 = {"rtol": 0, "atol": 1e-5}
FP64 = {"rtol": 0, "atol": 1e-6}

BLOCK_PARTS = {
    "norm1": "attention.{owner}.norm",
    "attn.qkv": "attention.{owner}.qkv",
    "attn.proj": "attention.{owner}.proj",
    "norm2": "mlp.{owner}.norm",
    "mlp.fc1": "mlp.{owner}.fc1",
    "mlp.fc2": "mlp.{owner}.fc2",
}
"""Part of an original block → ours."""


class AsGiven(nn.Module):
    """In place of an encoder's normalisation: the originals' images are normalised already."""

    def forward(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return images.to(dtype)


class Golden:
    """One set: its tensors and its description."""

    def __init__(self, shared: Path, name: str) -> None:
        self.tensors = load_file(shared / "golden" / f"{name}.safetensors")
        self.about = json.loads((shared / "golden" / f"{name}.json").read_text())

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]


def converted(shared: Path, folder: Path, file: str) -> Path:
    """Convert a golden checkpoint into ``folder`` once."""
    out = folder / Path(file).stem
    if not out.exists():
        convert(shared / "golden" / file, out)
    return out


def image_batch(images: torch.Tensor) -> Batch:
    """A batch of normalised images alone."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return Batch(images, nothing.int(), nothing.int(), nothing)


def text_batch(ids_BT: torch.Tensor, padding_BT: torch.Tensor, images: torch.Tensor | None = None) -> Batch:
    """A batch of texts given as a padded rectangle, each belonging to the image of its row."""
    samples = len(ids_BT)
    if images is None:
        images = torch.zeros(samples, 3, 0, 0, dtype=torch.uint8)
    lengths = (~padding_BT).sum(dim=1)
    return Batch(images, ids_BT[~padding_BT].int(), lengths.int(), torch.arange(samples))


def rows(tensor_BTD: torch.Tensor, padding_BT: torch.Tensor) -> torch.Tensor:
    """The real tokens of a padded rectangle end to end, as ours are."""
    return tensor_BTD[~padding_BT]


def load_blocks(student: nn.Module, golden: Golden, owner: str, blocks: int) -> None:
    """Copy the blocks stored under ``w/`` into the student's layers."""
    state = {
        f"layers.{block}.{ours.format(owner=owner)}.{kind}": golden[f"w/blocks.{block}.{theirs}.{kind}"]
        for block in range(blocks)
        for theirs, ours in BLOCK_PARTS.items()
        for kind in ("weight", "bias")
    }
    missing = student.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys


class TokenizerOf:
    """Sizes of a golden text model, whose texts are given as ids."""

    def __init__(self, vocab_size: int, max_length: int) -> None:
        self.vocab_size, self.max_length = vocab_size, max_length
