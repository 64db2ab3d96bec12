"""Sequences of all modalities end to end, without padding.

Shapes: T rows (tokens) of all sequences ordered by modality, D width, S sequences.
A layout is built on the host from host lengths, once a batch; what a device needs of it is copied there once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch


class Padding(NamedTuple):
    """How the rows of one modality map to a padded rectangle [S, longest]."""

    row_of_slot: torch.Tensor
    """int64 [S, longest]; padding slots point at row 0 of the modality."""
    is_token: torch.Tensor
    """bool [S, longest]"""
    slot_of_row: torch.Tensor
    """int64 [rows], index into the flattened rectangle."""


@dataclass(frozen=True)
class Layout:
    """Which rows belong to which sequence of which modality."""

    lengths: dict[str, np.ndarray]
    """modality → int64 [sequences], tokens of each sequence; the order of the keys is the order of the rows."""
    device: torch.device
    keys: dict[str, np.ndarray] = field(default_factory=dict)
    """modality → int64 [sequences], leading tokens that are real where the rows hold padding too; others have none."""
    key_masks: dict[str, torch.Tensor] = field(default_factory=dict)
    """modality → bool [sequences, tokens] on the device, in place of `keys` where the host does not know them."""
    joint: bool = False
    """The i-th sequences of all modalities are one: each token sees the tokens of every modality. Needs equally many
    sequences, of equal length within a modality."""
    _cache: dict = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def build(
        cls,
        lengths: dict[str, Sequence[int] | np.ndarray | torch.Tensor],
        device: torch.device,
        keys: Mapping[str, np.ndarray] | None = None,
    ) -> Layout:
        """Make a layout from host lengths; ``keys`` as in the attribute."""
        return cls(
            {name: np.asarray(value, dtype=np.int64) for name, value in lengths.items()}, device, dict(keys or {})
        )

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names in the order of the rows."""
        return tuple(self.lengths)

    @cached_property
    def rows(self) -> dict[str, slice]:
        """Modality → its rows."""
        found, start = {}, 0
        for name, lengths in self.lengths.items():
            stop = start + int(lengths.sum())
            found[name] = slice(start, stop)
            start = stop
        return found

    @property
    def total(self) -> int:
        """T, the number of rows."""
        return sum(int(lengths.sum()) for lengths in self.lengths.values())

    @cached_property
    def all_lengths(self) -> list[int]:
        """Tokens of every sequence, in the order of the rows."""
        return np.concatenate(list(self.lengths.values())).tolist()

    def select(self, modalities: Iterable[str]) -> Layout:
        """Return the layout of some of the modalities, in the same order (cached: one object a choice)."""
        chosen = tuple(name for name in self.lengths if name in set(modalities))
        if chosen == self.modalities:
            return self

        def build() -> Layout:
            lengths, keys, masks = ({n: of[n] for n in chosen if n in of} for of in self._per_modality)
            return Layout(lengths, self.device, keys, masks, self.joint)

        return self._once(("select", chosen), build)

    @property
    def _per_modality(self) -> tuple[dict, dict, dict]:
        return self.lengths, self.keys, self.key_masks

    def is_key(self, modality: str) -> torch.Tensor | None:
        """Return bool [S, tokens]: which tokens of a modality with padding rows are real; None where all are."""
        if modality in self.key_masks:
            return self.key_masks[modality]
        if modality not in self.keys:
            return None
        longest = int(self.lengths[modality].max(initial=0))
        return self._once(
            ("is_key", modality), lambda: self.on_device(np.arange(longest)[None, :] < self.keys[modality][:, None])
        )

    def split(self, x_TX: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return each modality's rows as a view. One node in the gradient graph: a slice each would fill zeros."""
        if len(self.lengths) == 1:
            return {self.modalities[0]: x_TX}
        sizes = [rows.stop - rows.start for rows in self.rows.values()]
        return dict(zip(self.lengths, x_TX.split(sizes), strict=True))

    def first_rows(self, modality: str) -> torch.Tensor:
        """Return int64 [S]: row, within the modality, of each sequence's first token (the CLS)."""

        def build() -> torch.Tensor:
            lengths = self.lengths[modality]
            return self.on_device(np.cumsum(lengths) - lengths)

        return self._once(("first_rows", modality), build)

    def lengths_on_device(self, modality: str) -> torch.Tensor:
        """Return int64 [S]: tokens of each sequence, on the device."""
        return self._once(("lengths", modality), lambda: self.on_device(self.lengths[modality]))

    def sequence_of_row(self, modality: str | None = None) -> torch.Tensor:
        """Return int64 [rows]: the sequence each row belongs to, of one modality or (None) of all."""

        def build() -> torch.Tensor:
            lengths = np.asarray(self.all_lengths, np.int64) if modality is None else self.lengths[modality]
            return self.on_device(np.repeat(np.arange(len(lengths)), lengths))

        return self._once(("sequence_of_row", modality), build)

    def position_of_row(self, modality: str) -> torch.Tensor:
        """Return int64 [rows]: place of each token in its sequence, from 0."""

        def build() -> torch.Tensor:
            lengths = self.lengths[modality]
            starts = np.cumsum(lengths) - lengths
            return self.on_device(np.arange(int(lengths.sum())) - np.repeat(starts, lengths))

        return self._once(("position_of_row", modality), build)

    def is_rectangular(self, modality: str) -> bool:
        """Tell whether all sequences of the modality are equally long, so that a view needs no padding."""
        lengths = self.lengths[modality]
        return bool(len(lengths) == 0 or (lengths == lengths[0]).all())

    def padding(self, modality: str) -> Padding:
        """Return the map between the modality's rows and a padded rectangle."""

        def build() -> Padding:
            lengths = self.lengths[modality]
            longest = int(lengths.max(initial=0))
            starts = np.cumsum(lengths) - lengths
            column = np.arange(longest)
            is_token = column[None, :] < lengths[:, None]
            row_of_slot = np.where(is_token, starts[:, None] + column[None, :], 0)
            return Padding(*(self.on_device(a) for a in (row_of_slot, is_token, np.flatnonzero(is_token))))

        return self._once(("padding", modality), build)

    def rectangle(self, x_TX: torch.Tensor, modality: str) -> torch.Tensor:
        """Return the modality's rows as [S, longest, …]; what fills a shorter sequence is without meaning."""
        rows_RX = self.split(x_TX)[modality] if len(x_TX) == self.total else x_TX
        if self.is_rectangular(modality):
            return self.unflatten(rows_RX, modality)
        return rows_RX[self.padding(modality).row_of_slot]

    def unflatten(self, rows_RX: torch.Tensor, modality: str) -> torch.Tensor:
        """Return the rows of a modality whose sequences are equally long as [S, tokens, …], a view."""
        # Not -1 for the tokens: of no sequence there is no telling.
        lengths = self.lengths[modality]
        return rows_RX.unflatten(0, (len(lengths), int(lengths.max(initial=0))))

    def without_rows(self) -> Layout:
        """Return the layout of no sequence of the same modalities (cached)."""

        def build() -> Layout:
            nothing = np.zeros(0, np.int64)
            keys = dict.fromkeys((*self.keys, *self.key_masks), nothing)
            return Layout(dict.fromkeys(self.lengths, nothing), self.device, keys, joint=self.joint)

        return self._once(("without_rows",), build)

    def is_token(self, modality: str) -> torch.Tensor | None:
        """Return bool [S, longest]: which slots of `rectangle` hold a real token; None where all do."""
        if modality in self.keys or modality in self.key_masks or self.is_rectangular(modality):
            return self.is_key(modality)
        return self.padding(modality).is_token

    def once(self, key: str, build):
        """Return what ``build()`` gave the first time ``key`` was asked for (masks and the like, once a batch)."""
        return self._once(("user", key), build)

    def _once(self, key, build):
        if key not in self._cache:
            self._cache[key] = build()
        return self._cache[key]

    def on_device(self, array: np.ndarray) -> torch.Tensor:
        """Copy a host array to the device without waiting for it."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor


@dataclass(frozen=True)
class Packed:
    """Rows of all sequences and the layout that says whose they are."""

    x_TD: torch.Tensor
    layout: Layout

    def __getitem__(self, modality: str) -> torch.Tensor:
        """Return the modality's rows, a view [rows, D]."""
        return self.x_TD[self.layout.rows[modality]]
