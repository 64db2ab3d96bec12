"""Labelled images in any form: class folders and archives of them, CIFAR's binary files, shards with `.cls` members."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from mmd2v.data.addresses import display, expand_shards, is_remote
from mmd2v.data.class_folders import ClassFolders
from mmd2v.data.damage import Damage
from mmd2v.data.shards import IMAGE_SUFFIXES
from mmd2v.data.tar_members import streamed_members
from mmd2v.errors import UserError

LABEL = "label"
"""Key in a sample's JSON that holds the number of its class."""

FORMS = (
    "a folder of class folders of images, or a .tar, .tar.gz or .zip of one; of an archive with several sets, one of "
    "them: cifar10.tar.gz/cifar10/train; CIFAR's binary files ('data_batch_*.bin', not the pickles for Python); or "
    "shards whose samples have a .cls member, or those that `mmd2v data labelled` wrote"
)
_PIXELS = 3 * 32 * 32  # bytes of an image of CIFAR
_RECORDS = {1 + _PIXELS: 0, 2 + _PIXELS: 1}  # bytes of CIFAR-10's and CIFAR-100's: place of the (fine) label
_NAMES = ("batches.meta.txt", "fine_label_names.txt")
_WILDCARDS = "*?["


class LabelledImages(Protocol):
    """Images with classes."""

    classes: list[str]
    """A label is a place in them."""
    name: str

    def __len__(self) -> int:
        """Images."""

    def images(self) -> Iterator[tuple[str, str, bytes | torch.Tensor]]:
        """Yield (name, class, encoded bytes or uint8 [3, H, W])."""

    def where(self, name: str) -> str:
        """What messages call an image."""


def open_labelled(path: str | Path, flag: str = "data") -> LabelledImages:
    """Open what ``path`` names, in one of `FORMS`. Raises UserError, starting with ``flag``, where it cannot."""
    text = str(Path(path).expanduser())
    is_pattern = any(mark in text for mark in _WILDCARDS) and not Path(text).exists()
    if text.endswith(".bin"):
        return CifarFiles(text, flag)
    if text.endswith(".tar") and (is_pattern or "{" in text):
        return LabelledShards(text, flag)
    place = Path(text)
    if place.is_dir() and not any(entry.is_dir() for entry in place.iterdir()):
        if any(place.glob("*.tar")):
            return LabelledShards(text, flag)
        if binary := sorted(file.name for file in place.glob("*.bin")):
            raise UserError(
                f"{flag}: {path} holds {', '.join(binary[:6])}; name those of one split: '{path}/{binary[0]}', or with "
                f"a wildcard in quotes"
            )
    if place.is_file() and text.endswith(".tar") and _has_labels(place):
        return LabelledShards(text, flag)
    return ClassFolders(path, flag)


class CifarFiles:
    """CIFAR-10's or CIFAR-100's binary files; of the latter the fine classes."""

    def __init__(self, pattern: str, flag: str = "data") -> None:
        """Look at a file, or several by a wildcard. Raises UserError for none, or one of another size."""
        self.name = pattern
        exact = Path(pattern).is_file()
        self._files = [Path(pattern)] if exact else [Path(name) for name in sorted(glob.glob(pattern))]
        if not self._files:
            raise UserError(f"{flag}: {pattern} matches no file; expected {FORMS}")
        sizes = {file: file.stat().st_size for file in self._files}
        fitting = [record for record in _RECORDS if all(size and size % record == 0 for size in sizes.values())]
        if not fitting:
            raise UserError(
                f"{flag}: {pattern} of {', '.join(f'{size:,}' for size in sizes.values())} bytes, expected a multiple "
                f"of {' or '.join(f'{record:,}' for record in _RECORDS)}, the bytes of an image of CIFAR"
            )
        names = _class_names(self._files[0].parent)
        # A size that fits both is told apart by the names beside it.
        self._record = fitting[-1] if len(fitting) > 1 and len(names) == 100 else fitting[0]
        self._count = sum(size // self._record for size in sizes.values())
        largest = max(int(rows_NB[:, _RECORDS[self._record]].max()) for _, rows_NB in self._rows())
        self.classes = names if len(names) > largest else [str(label) for label in range(largest + 1)]

    def __len__(self) -> int:
        return self._count

    def images(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yield (name, class, uint8 [3, 32, 32])."""
        for file, rows_NB in self._rows():
            for place, row_B in enumerate(rows_NB):
                label = int(row_B[_RECORDS[self._record]])
                pixels = torch.from_numpy(row_B[-_PIXELS:].reshape(3, 32, 32).copy())
                yield f"{file.name}/{place:06}", self.classes[label], pixels

    def where(self, name: str) -> str:
        """What messages call an image."""
        return str(self._files[0].parent / name)

    def _rows(self) -> Iterator[tuple[Path, np.ndarray]]:
        for file in self._files:
            yield file, np.memmap(file, np.uint8, "r").reshape(-1, self._record)


def _class_names(folder: Path) -> list[str]:
    for name in _NAMES:
        file = folder / name
        if file.is_file():
            return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return []


class LabelledShards:
    """Local WebDataset shards in which a sample has an image and a class: the text of its ``.cls`` member, else the
    number in its JSON."""

    def __init__(self, spec: str, flag: str = "data") -> None:
        """Read all classes. Raises UserError for shards that are missing, remote or damaged, or samples without one."""
        self.name = spec
        self._flag = flag
        self._paths = expand_shards(spec)
        for path in self._paths:
            if is_remote(path):
                raise UserError(f"{flag}: {display(path)} is no local file; labelled shards are read from folders")
        labels: set[str] = set()
        self._count = 0
        for _, label, _ in self._samples(read=False):
            labels.add(label)
            self._count += 1
        if not self._count:
            raise UserError(f"{flag}: {spec} holds no sample; expected {FORMS}")
        numbers = all(label.isdecimal() for label in labels)
        self.classes = sorted(labels, key=int) if numbers else sorted(labels)

    def __len__(self) -> int:
        return self._count

    def images(self) -> Iterator[tuple[str, str, bytes]]:
        """Yield (name, class, encoded bytes)."""
        return self._samples(read=True)

    def where(self, name: str) -> str:
        """What messages call an image."""
        return name

    def _samples(self, read: bool) -> Iterator[tuple[str, str, bytes]]:
        for path in self._paths:
            try:
                with open(path, "rb") as stream:
                    yield from self._of_shard(path, stream, read)
            except Damage as damage:
                raise UserError(f"{self._flag}: {damage}") from None

    def _of_shard(self, path: str, stream: object, read: bool) -> Iterator[tuple[str, str, bytes]]:
        key, label, image = "", None, None
        for member, content in streamed_members(stream, path):  # type: ignore[arg-type]
            found, suffix = _key_and_suffix(member)
            if found != key:
                if key:
                    yield self._sample(path, key, label, image)
                key, label, image = found, None, None
            if suffix == "cls":
                label = content.read().decode("utf-8", "replace").strip()
            elif suffix == "json":
                label = label or _packed_label(content.read())
            elif suffix in IMAGE_SUFFIXES:
                image = content.read() if read else b""
        if key:
            yield self._sample(path, key, label, image)

    def _sample(self, path: str, key: str, label: str | None, image: bytes | None) -> tuple[str, str, bytes]:
        if not label or image is None:
            what = "no image" if image is None else "no class: no .cls member, and no number of one in its JSON"
            raise UserError(f"{self._flag}: {path}: sample {key} has {what}")
        return f"{path}: sample {key}", label, image


def _packed_label(meta: bytes) -> str | None:
    """Return the class that `mmd2v data labelled` wrote: its number, as an underscore in its name is lost there."""
    try:
        found = json.loads(meta)
    except ValueError:
        return None
    label = found.get(LABEL) if isinstance(found, dict) else None
    return str(label) if isinstance(label, int) and not isinstance(label, bool) else None


def _key_and_suffix(member: str) -> tuple[str, str]:
    folder, _, name = member.rpartition("/")
    stem, _, suffix = name.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def _has_labels(path: Path) -> bool:
    """Whether one of the first two samples of a tar has a class."""
    keys: set[str] = set()
    try:
        with open(path, "rb") as stream:
            for member, content in streamed_members(stream, str(path)):
                key, suffix = _key_and_suffix(member)
                keys.add(key)
                if suffix == "cls" or (suffix == "json" and _packed_label(content.read()) is not None):
                    return True
                if len(keys) > 2:
                    return False
    except (Damage, OSError):
        return False  # said by who reads it all
    return False
