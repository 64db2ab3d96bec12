"""The files of a frozen teacher's stored outputs, one a shard and epoch: their names, and how they are written.

The folder of a teacher, ``DIR/TEACHER``::

    annotation.json                       see `mmd2v.data.annotation_record`
    [SET/]epoch-0000/SHARD.safetensors    cls [R, D], of a text teacher [R, c, D]; maybe tokens [R, T, E]; ids [R]
    [SET/]epoch-any/SHARD.safetensors     the same, of a shard whose outputs do not depend on the epoch

Shapes: R samples (rows) of a shard, b of a part of a shard, D the teacher's width, c captions an image, T tokens of
width E.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmd2v.data.addresses import display, is_remote, split_address
from mmd2v.data.annotation_record import Annotation, StoredDtype
from mmd2v.errors import UserError
from mmd2v.files import atomic_path

ANY_EPOCH = None
"""Stands for an epoch where the outputs are the same in all of them."""
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_SUFFIX = ".safetensors"


def id_hash(sample_id: str) -> int:
    """64 bits of a sample's id, never 0: that stands for a damaged sample."""
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "little") or 1


def shard_names(paths: Sequence[str]) -> list[str]:
    """Name the files of shards by as much of their paths as tells them apart, whatever folder the set lies in."""
    parts = [_parts(path) for path in paths]
    depth = 1
    while True:
        names = ["~".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names) or depth >= max(map(len, parts)):
            return [quote(name.removesuffix(".tar"), safe="~") for name in names]
        depth += 1


def _parts(path: str) -> list[str]:
    if not is_remote(path):
        return [part for part in path.split(os.sep) if part]
    folder, name, _ = split_address(path)
    return [part for part in display(folder).split("/") if part] + [name]


def epoch_folder(folder: Path, set_name: str, epoch: int | None) -> Path:
    """Where a teacher's outputs of a set and epoch lie."""
    own = folder / quote(set_name, safe="") if set_name else folder
    return own / ("epoch-any" if epoch is ANY_EPOCH else f"epoch-{epoch:04d}")


def stored_file(folder: Path, set_name: str, epoch: int | None, shard_name: str) -> Path:
    """The file of a teacher's outputs of a shard in an epoch."""
    return epoch_folder(folder, set_name, epoch) / f"{shard_name}{_SUFFIX}"


def stored_shards(folder: Path, set_name: str, epoch: int | None) -> set[str]:
    """Names of the shards of a set that have a file for an epoch (or for any)."""
    try:
        names = os.listdir(epoch_folder(folder, set_name, epoch))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    return {name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX) and not name.startswith(".")}


def stored_rows(path: Path, annotation: Annotation) -> int | None:
    """Samples whose outputs a file holds, by its header; None: it cannot be read, or is of another annotation."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("fingerprint") != annotation.fingerprint:
                return None
            return file.get_slice("ids").get_shape()[0]
    except (OSError, SafetensorError):
        return None


def is_finished(path: Path, annotation: Annotation, rows: int) -> bool:
    """Whether a file holds the outputs of at least ``rows`` samples and is of this annotation."""
    found = stored_rows(path, annotation)
    return found is not None and found >= rows


class ShardWriter:
    """Collects a teacher's outputs of one shard in one epoch; `write` makes the file, whole or not at all."""

    def __init__(self, path: Path, annotation: Annotation, rows: int) -> None:
        """``rows`` is R; all of it is held in memory until it is written."""
        dtype = DTYPES[annotation.dtype]
        self._path, self._annotation, self._next = path, annotation, 0
        self._tensors = {"cls": torch.zeros(rows, *annotation.cls_shape, dtype=dtype)}
        if annotation.tokens is not None:
            self._tensors["tokens"] = torch.zeros(rows, *annotation.tokens, dtype=dtype)
        self._ids_R = np.zeros(rows, np.uint64)

    def add(self, ids: Sequence[str | None], cls: torch.Tensor, tokens_bTE: torch.Tensor | None = None) -> None:
        """Add the next b samples: their ids (None: damaged), ``cls`` [b, D] or [b · c, D], and tokens if stored."""
        rows = slice(self._next, self._next + len(ids))
        self._next = rows.stop
        for row, sample_id in enumerate(ids, rows.start):
            self._ids_R[row] = 0 if sample_id is None else id_hash(sample_id)
        damaged = torch.tensor([sample_id is None for sample_id in ids])
        self._tensors["cls"][rows] = cls.reshape(len(ids), *self._annotation.cls_shape).cpu().to(DTYPES[self._dtype])
        self._tensors["cls"][rows][damaged] = 0
        if self._annotation.tokens is not None:
            assert tokens_bTE is not None  # the annotation says that there are
            self._tensors["tokens"][rows] = tokens_bTE.cpu().to(DTYPES[self._dtype])
            self._tensors["tokens"][rows][damaged] = 0

    @property
    def _dtype(self) -> StoredDtype:
        return self._annotation.dtype

    def write(self) -> None:
        """Write the file.

        Raises:
            UserError: outputs of fewer samples were added than the shard has.
            OSError, SafetensorError: the disk refuses it.
        """
        if self._next != len(self._ids_R):
            raise UserError(f"{self._path}: found outputs of {self._next} samples, expected {len(self._ids_R)}")
        with atomic_path(self._path) as temporary:
            # One entry of metadata: the order of several would change from run to run, and with it the file.
            save_file(
                {**self._tensors, "ids": torch.from_numpy(self._ids_R)},
                temporary,
                metadata={"fingerprint": self._annotation.fingerprint},
            )
