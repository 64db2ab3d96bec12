"""Stored outputs of frozen teachers: a file a shard and epoch, and what decides whether a run may replay them.

What a sample looks like in an epoch is a function of (data.image, seed, epoch, sample id), so a frozen teacher gives
the same for it in every run. The folder of a teacher, ``DIR/TEACHER``::

    annotation.json                       the settings behind the outputs, their shapes, sets and shards
    [SET/]epoch-0000/SHARD.safetensors    cls [R, D], of a text teacher [R, c, D]; maybe tokens [R, T, E]; ids [R]
    [SET/]epoch-any/SHARD.safetensors     the same, of a shard whose outputs do not depend on the epoch

Shapes: R samples (rows) of a shard, B of a batch, b of a part of a shard, D the teacher's width, c captions an image,
T tokens of width E.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmd2v.config.schema import DataConfig, ImageTransformConfig
from mmd2v.data.addresses import display, is_remote, split_address
from mmd2v.data.cursor import Position
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.shards import ShardSet
from mmd2v.data.tokenizers import Tokenizer
from mmd2v.errors import UserError
from mmd2v.files import atomic_path, write_text

RECORD_NAME = "annotation.json"
ANY_EPOCH = None
"""Stands for an epoch where the outputs are the same in all of them."""
StoredDtype = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_FORMAT = 1
_SUFFIX = ".safetensors"
_HASHED_AT_ONCE = 1 << 24  # bytes
_READ_AT_ONCE = 256  # samples
_SHOWN = 3  # differences


def tokens_key(teacher: str) -> str:
    """Key of a teacher's tokens in `Batch.teacher_outputs`; its CLS lies under its name."""
    return f"{teacher}:tokens"


def id_hash(sample_id: str) -> int:
    """64 bits of a sample's id, never 0: that stands for a damaged sample."""
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "little") or 1


# -------------------------------------------------------------------------------------------- settings


def is_fixed(image: ImageTransformConfig) -> bool:
    """Whether an image looks the same in every epoch of training."""
    return image.crop_scale == (1.0, 1.0) and image.flip in (0.0, 1.0)


def image_settings(data: DataConfig, seed: int) -> dict[str, Any]:
    """Config key → value, of all that decides how training shows an image to a teacher."""
    image = data.image
    return {
        "data.decode": data.decode,
        "data.image.size": image.size,
        "data.image.interpolation": image.interpolation,
        "data.image.crop_scale": list(image.crop_scale),
        "data.image.crop_ratio": None if image.crop_scale == (1.0, 1.0) else list(image.crop_ratio),
        "data.image.flip": image.flip,
        "seed": None if is_fixed(image) else seed,
    }


def text_settings(data: DataConfig, tokenizer: Tokenizer, seed: int) -> dict[str, Any]:
    """Config key → value, of all that decides which captions training shows to a teacher, and as which tokens."""
    return {
        "data.captions_per_image": data.captions_per_image,
        "data.tokenizer.max_length": tokenizer.max_length,
        "data.tokenizer.append_end": tokenizer.append_end,
        "data.tokenizer (sha256 of its files)": tokenizer.fingerprint,
        "seed": seed,
    }


def digest(files: Iterable[str | Path]) -> str:
    """SHA-256 of some files' contents one after another, in hexadecimal: their names and folders do not matter."""
    whole = hashlib.sha256()
    for file in files:
        own = hashlib.sha256()
        with open(file, "rb") as handle:
            while part := handle.read(_HASHED_AT_ONCE):
                own.update(part)
        whole.update(own.digest())
    return whole.hexdigest()


def differences(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """``KEY differs: stored X, now Y`` for every setting that is not the same."""
    keys = [*present, *(key for key in stored if key not in present)]
    return [
        f"{key} differs: stored {_shown(stored.get(key))}, now {_shown(present.get(key))}"
        for key in keys
        if stored.get(key) != present.get(key)
    ]


def listed(found: Sequence[str]) -> str:
    """Join differences to a part of a sentence, the first few of many."""
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def _shown(value: Any) -> str:
    is_digest = isinstance(value, str) and len(value) == hashlib.sha256().digest_size * 2
    return f"{value[:12]}…" if is_digest else json.dumps(value, ensure_ascii=False)


def captions_fixed(shards: ShardSet, shard: int, count: int) -> bool:
    """Whether every epoch takes the same ``count`` captions of each sample of a shard: all, or all several times.

    Stops to read at the first sample of which it does not.
    """
    rows = range(int(shards.counts[shard]))
    for start in range(0, len(rows), _READ_AT_ONCE):
        places = [(shard, row) for row in rows[start : start + _READ_AT_ONCE]]
        for sample in shards.read_many(places, images=False):
            # A damaged sample is left out in every epoch.
            if not isinstance(sample, Damage) and count % len(sample.captions):
                return False
    return True


# -------------------------------------------------------------------------------------------- record


@dataclass(frozen=True)
class Annotation:
    """What ``annotation.json`` of a teacher's folder says."""

    settings: dict[str, Any]
    """Name → value, of all that decides the outputs."""
    width: int
    """D"""
    captions: int | None
    """c of a text teacher; None: of images."""
    tokens: tuple[int, ...] | None
    """(T, E) of a sample's tokens; None: not stored."""
    dtype: StoredDtype
    sets: dict[str, SetRecord] = field(default_factory=dict)
    """Name of a data set (empty: the only one) → what of it is stored."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings and of the form of the outputs, in hexadecimal."""
        form = [self.settings, self.width, self.captions, self.tokens, self.dtype]
        return hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()

    @property
    def form(self) -> dict[str, Any]:
        """Name → value, of what the outputs look like."""
        return {"width": self.width, "tokens": self.tokens, "dtype": self.dtype}

    @property
    def cls_shape(self) -> tuple[int, ...]:
        """Shape of one sample's CLS: (D,) or (c, D)."""
        return (self.width,) if self.captions is None else (self.captions, self.width)


@dataclass(frozen=True)
class SetRecord:
    """What is stored of a data set once the command that writes it has finished."""

    epochs: int
    """Epochs of which something is stored; the last may be stored in part."""
    shards: dict[str, int]
    """Name of a shard's files, without suffix → its samples, R."""


def teacher_folder(folder: str | Path, teacher: str) -> Path:
    """Where the outputs of a teacher lie in the folder of all."""
    return Path(folder) / quote(teacher, safe="")


def read_record(folder: Path) -> Annotation | None:
    """Read a teacher's ``annotation.json``; None when there is none.

    Raises:
        UserError: it is damaged or of another format.
    """
    path = folder / RECORD_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    found = values.get("format") if isinstance(values, dict) else None
    if found != _FORMAT:
        raise UserError(f"{path}: found format {found!r}, this version reads {_FORMAT}; annotate into another folder")
    try:
        return Annotation(
            settings=dict(values["settings"]),
            width=values["width"],
            captions=values["captions"],
            tokens=None if values["tokens"] is None else tuple(values["tokens"]),
            dtype=values["dtype"],
            sets={name: SetRecord(**record) for name, record in values["sets"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a record of stored outputs: {error!r}") from None


def write_record(folder: Path, annotation: Annotation, version: str) -> None:
    """Write a teacher's ``annotation.json``; ``version`` is mmd2v's, for people."""
    values = {
        "format": _FORMAT,
        "mmd2v": version,
        "fingerprint": annotation.fingerprint,
        **asdict(annotation),
    }
    write_text(folder / RECORD_NAME, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


# -------------------------------------------------------------------------------------------- files


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


def is_finished(path: Path, annotation: Annotation, rows: int) -> bool:
    """Whether a file holds the outputs of at least ``rows`` samples and is of this annotation."""
    try:
        with safe_open(path, "pt") as file:
            same = (file.metadata() or {}).get("fingerprint") == annotation.fingerprint
            return same and file.get_slice("ids").get_shape()[0] >= rows
    except (OSError, SafetensorError):
        return False


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
            folder: of the teacher, see the top of this file.
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
        path = stored_file(self.folder, set_name, ANY_EPOCH, names[place.shard])
        if not path.exists():
            path = stored_file(self.folder, set_name, place.epoch, names[place.shard])
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
