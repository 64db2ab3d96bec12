"""Masks of data2vec 2.0: every sample enters the layers several times, each time with other tokens hidden.

How many tokens a clone sees is known on the host; which ones is drawn on the device, a sample by itself, so that the
masks do not depend on how samples lie on ranks. Source: inverse block masking of Baevski et al. 2022.

Shapes: S samples, C clones of all samples (clone m of sample s is s · masks + m), L tokens of the longest, P tokens
without the CLS, V visible and H hidden tokens of all clones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmd2v.config.schema import MaskingConfig, ModelConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.draws import RANGE, draw, sequence_keys
from mmd2v.models.packed import Layout


@dataclass(frozen=True)
class Mask:
    """Which tokens of each clone enter the layers. Slots are places in the flattened rectangle [C · L]."""

    clones: int
    """Copies of each sample."""
    has_cls: bool
    """Whether the first token of a sequence is a CLS, which is never hidden."""
    lengths: np.ndarray
    """int64 [C], tokens of each clone before masking, CLS included."""
    visible_lengths: np.ndarray
    """int64 [C], tokens of each clone that it sees, CLS included."""
    longest: int
    """L"""
    visible: torch.Tensor
    """int64 [V], ascending: slots of the tokens that are seen, in the order of the rows that enter the layers."""
    hidden: torch.Tensor
    """int64 [H], ascending: slots of the tokens that are hidden."""
    keys_C: torch.Tensor
    """int64: a random key of each clone."""

    @property
    def hidden_lengths(self) -> np.ndarray:
        """int64 [C], tokens of each clone that are hidden."""
        return self.lengths - self.visible_lengths


class Masking:
    """Draws the masks of one modality, a grid of patches or (``grid`` is None) a line of tokens."""

    def __init__(self, config: MaskingConfig, kind: str, grid: tuple[int, int] | None, has_cls: bool) -> None:
        self.config = config
        self.kind = kind
        self.grid = grid
        self.has_cls = has_cls

    def __call__(self, batch: Batch, layout: Layout, modality: str) -> Mask:
        """Return new masks for the sequences of ``modality`` in ``layout``."""
        config, device = self.config, layout.device
        sequences = len(layout.lengths[modality])  # none where the samples have no image
        keys_S1 = sequence_keys(batch, self.kind)[:sequences, None]
        keys_C = draw(keys_S1, torch.arange(1, config.masks + 1, device=device)).flatten()
        lengths = np.repeat(layout.lengths[modality], config.masks)
        visible_lengths = self.visible_tokens(lengths)
        longest = int(lengths.max(initial=0))
        # The visible tokens are the first ones by: CLS, then (images) those in a block, then by lot.
        lot_CL = draw(keys_C[:, None], torch.arange(longest, device=device) + RANGE // 2)
        if config.block > 1 and sequences:
            assert self.grid is not None
            in_block_CP = draw_blocks(keys_C, self.grid, self._blocks(), config.block).flatten(1)
            lot_CL = lot_CL - RANGE * F.pad(in_block_CP.long(), (int(self.has_cls), 0))
        if self.has_cls and longest:
            lot_CL[:, 0] = -2 * RANGE
        clones = Layout({modality: lengths}, device)
        is_token_CL = clones.is_token(modality)
        if is_token_CL is not None:
            lot_CL = lot_CL.masked_fill(~is_token_CL, 2 * RANGE)
        rank_CL = lot_CL.argsort(dim=1, stable=True).argsort(dim=1)
        count_C1 = Layout({modality: visible_lengths}, device).lengths_on_device(modality)[:, None]
        visible_CL = rank_CL < count_C1
        hidden_CL = ~visible_CL if is_token_CL is None else ~visible_CL & is_token_CL
        total = int(visible_lengths.sum())
        return Mask(
            clones=config.masks,
            has_cls=self.has_cls,
            lengths=lengths,
            visible_lengths=visible_lengths,
            longest=longest,
            visible=_places(visible_CL, total),
            hidden=_places(hidden_CL, int(lengths.sum()) - total),
            keys_C=keys_C,
        )

    def visible_tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Return int64 [C]: how many of each clone's tokens it sees, its CLS included.

        At least one besides the CLS is hidden, and, where there are two, one is seen.
        """
        maskable = lengths - int(self.has_cls)
        # The small term: 100 · (1 - 0.8) is 19.99…, and 20 are meant.
        seen = np.floor(maskable * (1 - self.config.ratio) + 1e-6).astype(np.int64)
        seen = np.clip(seen, np.minimum(1, np.maximum(maskable - 1, 0)), np.maximum(maskable - 1, 0))
        return seen + (lengths - maskable)

    def _blocks(self) -> int:
        """Return how many blocks are drawn for a clone."""
        assert self.grid is not None
        tokens = self.grid[0] * self.grid[1]
        return max(1, int(tokens * (1 - self.config.ratio + self.config.adjust) / self.config.block**2))


def draw_blocks(keys_C: torch.Tensor, grid: tuple[int, int], count: int, side: int) -> torch.Tensor:
    """Return bool [C, rows, columns]: the union of ``count`` blocks at random places, cut at the border."""
    rows, columns = grid
    centres = draw(keys_C[:, None], torch.arange(count, device=keys_C.device)) % (rows * columns)
    is_centre_CP = torch.zeros(len(keys_C), rows * columns, device=keys_C.device).scatter_(1, centres, 1.0)
    # A block reaches side // 2 up and left of its centre: a patch looks for centres the other way round.
    before, after = side - 1 - side // 2, side // 2
    padded = F.pad(is_centre_CP.view(-1, 1, rows, columns), (before, after, before, after))
    return F.max_pool2d(padded, side, stride=1)[:, 0] > 0


def gather_visible(rows_RD: torch.Tensor, layout: Layout, modality: str, mask: Mask) -> torch.Tensor:
    """Return the rows [V, D] that enter the layers, of a modality's rows before masking [R, D]."""
    clone_V, place_V = mask.visible // mask.longest, mask.visible % mask.longest
    return rows_RD[layout.first_rows(modality)[clone_V // mask.clones] + place_V]


def _places(is_chosen: torch.Tensor, count: int) -> torch.Tensor:
    """Return int64 [count], the places of the ``count`` True values in order; `nonzero` would wait for the device."""
    flat = is_chosen.flatten()
    target = torch.where(flat, flat.long().cumsum(0) - 1, count)
    places = torch.arange(len(flat), device=flat.device)
    return places.new_empty(count + 1).scatter_(0, target, places)[:count]


def build_maskings(config: ModelConfig, encoders: Mapping[str, nn.Module]) -> dict[str, Masking]:
    """Build what ``model.masking`` asks for. Raises UserError for a modality that cannot be masked so."""
    found = {}
    for name, masking in config.masking.items():
        where, encoder = f"model.masking.{name}", config.encoders[name]
        if getattr(encoder, "padding", "none") != "none":
            raise UserError(f"{where}: needs model.encoders.{name}.padding: none, found {encoder.padding}")
        if encoder.token_drop:
            raise UserError(f"{where}: needs model.encoders.{name}.token_drop: 0, found {encoder.token_drop:g}")
        grid = None
        if encoder.input != "text":
            fixed = getattr(encoders[name], "grid", None)
            grid = getattr(fixed, "shape", None)
            if grid is None:
                raise UserError(f"{where}: the encoder of '{name}' ({encoder.kind}) has no grid of tokens")
        if masking.block > 1 and grid is None:
            raise UserError(f"{where}.block: found {masking.block}, expected 1: a text has no square blocks")
        if grid is not None and masking.block > min(grid):
            raise UserError(f"{where}.block: found {masking.block}, the grid has {grid[0]} × {grid[1]} tokens")
        found[name] = Masking(masking, encoder.input, grid, encoder.input == "text" or encoder.cls)
    return found
