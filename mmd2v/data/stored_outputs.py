"""Stored outputs of frozen teachers as the loader processes read them into batches.

Shapes: B samples of a batch, R of a shard, D the teacher's width, c captions an image, T tokens of width E.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mmd2v.data.addresses import display
from mmd2v.data.annotation_files import ANY_EPOCH, DTYPES, id_hash, shard_names, stored_file
from mmd2v.data.annotation_record import RECORD_NAME, Annotation
from mmd2v.data.cursor import Position
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.errors import UserError


def tokens_key(teacher: str) -> str:
    """Key of a teacher's tokens in `Batch.teacher_outputs`; its CLS lies under its name."""
    return f"{teacher}:tokens"


class _File(NamedTuple):
    """An open file of outputs; its tensors stay on the disk, rows are read as they are asked for."""

    path: Path
    ids_R: np.ndarray
    slices: dict[str, Any]


class StoredOutputs:
    """A teacher's stored outputs, for the loader processes: rows by (set, epoch, shard, row).

    Attributes:
        teacher: its name in the config.
        annotation: what is stored.
        epochs: for how many epochs; None: for all.
    """

    def __init__(
        self, teacher: str, folder: Path, annotation: Annotation, sets: Mapping[str, Sequence[str]], *, files: int
    ) -> None:
        """Describe what is read.

        Args:
            teacher: its name in the config.
            folder: of the teacher, see `mmd2v.data.annotation_files`.
            annotation: what lies there.
            sets: data set → paths of its shards, in the order of the config.
            files: how many are kept open.
        """
        self.teacher, self.folder, self.annotation = teacher, folder, annotation
        self._sets = [(name, shard_names(paths), list(paths)) for name, paths in sets.items()]
        self._most = max(1, files)
        self._open: OrderedDict[tuple[int, int, int], _File] = OrderedDict()

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored numbers."""
        return DTYPES[self.annotation.dtype]

    def keep_open(self, files: int) -> None:
        """Set how many files are kept open."""
        self._most = max(1, files)

    def check(self, place: Position, sample_id: str) -> None:
        """Make sure that what is stored for a place is of the sample that lies there.

        Raises:
            Damage: the sample was damaged when the outputs were stored.
            UserError: it is another sample; the file is missing, damaged or of another annotation.
        """
        file = self._file(place)
        stored = int(file.ids_R[place.row]) if place.row < len(file.ids_R) else None
        if stored == id_hash(sample_id):
            return
        _, _, paths = self._sets[place.set]
        where = f"{display(paths[place.shard])}: sample '{sample_id}' (row {place.row})"
        if stored == 0:
            raise Damage(
                DamageKind.NOT_ANNOTATED,
                f"{where} has no stored output of teacher {self.teacher}: it was damaged when {file.path} was written",
            )
        if stored is None:
            raise UserError(
                f"{where} is beyond the {len(file.ids_R)} samples of {file.path}: `mmd2v data annotate` was "
                "interrupted, or the shard has grown; run it again"
            )
        raise UserError(
            f"{where} is another one than teachers.{self.teacher}.outputs was stored for ({file.path}): the shard was "
            "replaced; annotate it again into a new folder, or leave teachers."
            f"{self.teacher}.outputs out to run the teacher"
        )

    def read(self, places: Sequence[Position | None]) -> dict[str, torch.Tensor]:
        """Read the outputs of a batch.

        Args:
            places: of its B samples; None: damaged, its outputs are zeros.

        Returns:
            key in `Batch.teacher_outputs` → [B, D], of a text teacher [B · c, D]; of tokens [B, T, E].
        """
        shapes = {"cls": self.annotation.cls_shape}
        if self.annotation.tokens is not None:
            shapes["tokens"] = self.annotation.tokens
        found = {kind: torch.zeros(len(places), *shape, dtype=self.dtype) for kind, shape in shapes.items()}
        for row, place in enumerate(places):
            if place is not None:
                slices = self._file(place).slices
                for kind, tensor in found.items():
                    tensor[row] = slices[kind][place.row]
        keys = {"cls": self.teacher, "tokens": tokens_key(self.teacher)}
        found["cls"] = found["cls"].view(-1, self.annotation.width)
        return {keys[kind]: tensor for kind, tensor in found.items()}

    def zeros(self, images: int) -> dict[str, torch.Tensor]:
        """Outputs of the form of real ones, for ``images`` images."""
        return self.read([None] * images)

    def _file(self, place: Position) -> _File:
        key = (place.set, place.epoch, place.shard)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        while len(self._open) >= self._most:
            self._open.popitem(last=False)
        self._open[key] = self._open_file(place)
        return self._open[key]

    def _open_file(self, place: Position) -> _File:
        set_name, names, _ = self._sets[place.set]
        own = stored_file(self.folder, set_name, place.epoch, names[place.shard])
        of_all = stored_file(self.folder, set_name, ANY_EPOCH, names[place.shard])
        # Where both exist, the file of every epoch is of fewer samples, whose captions alone were always the same.
        path = of_all if of_all.exists() and not own.exists() else own
        where = f"teachers.{self.teacher}.outputs: {path}"
        try:
            file = safe_open(path, "pt")
            if (file.metadata() or {}).get("fingerprint") != self.annotation.fingerprint:
                raise UserError(f"{where} belongs to another annotation than the {RECORD_NAME} of its folder")
            kinds = ["cls"] if self.annotation.tokens is None else ["cls", "tokens"]
            return _File(path, file.get_tensor("ids").numpy(), {kind: file.get_slice(kind) for kind in kinds})
        except FileNotFoundError:
            raise UserError(f"{where} is missing; run `mmd2v data annotate` again") from None
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{where} cannot be read ({error}); delete it and run `mmd2v data annotate` again"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay in their process; a spawned worker opens its own.
        return {**self.__dict__, "_open": OrderedDict()}
