"""The images a caption file names, in folders and uncompressed tars."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.shards import IMAGE_SUFFIXES
from mmd2v.data.tar_members import plain_members
from mmd2v.errors import UserError, nearest

logger = logging.getLogger(__name__)

_HINT_NAMES = 20_000  # names looked through for a hint


class Stamp(NamedTuple):
    """An input file as a resumed run must find it again."""

    path: str
    bytes: int
    modified_ns: int


def stamp(path: str | Path) -> Stamp:
    """The stamp of a file. Raises UserError: it is gone."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return Stamp(str(path), status.st_size, status.st_mtime_ns)


class ImageFiles(ABC):
    """Images by the name a caption file gives them; a name is also looked up without its folders."""

    name: str
    """What messages call them: the folder or tar."""

    @abstractmethod
    def find(self, name: str) -> str | None:
        """The stored name of an image, or None."""

    @abstractmethod
    def read(self, stored: str) -> bytes:
        """The bytes of an image that `find` returned. Safe to call from several threads.

        Raises:
            Damage: they cannot be read.
        """

    @abstractmethod
    def names(self) -> list[str]:
        """Some stored names, for hints."""

    @abstractmethod
    def stamps(self, stored: Iterable[str] | None = None) -> Iterator[Stamp]:
        """Stamps of the files that hold these images; none: all images there are."""

    def hint(self, name: str) -> str:
        """``" Did you mean …?"`` for an absent image, or an empty string."""
        return nearest(PurePosixPath(name).name, self.names())


class FolderImages(ImageFiles):
    """Images in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = str(root)

    def find(self, name: str) -> str | None:
        """See `ImageFiles.find`; names that lead out of the folder are not found."""
        for candidate in (name, PurePosixPath(name).name):
            path = os.path.normpath(os.path.join(self.root, candidate))
            inside = os.path.commonpath([os.path.abspath(path), os.path.abspath(self.root)])
            if inside == os.path.abspath(self.root) and os.path.isfile(path):
                return path
        return None

    def read(self, stored: str) -> bytes:
        """See `ImageFiles.read`."""
        try:
            return Path(stored).read_bytes()
        except OSError as error:
            raise Damage(DamageKind.NO_IMAGE, f"{stored}: cannot be read: {error.strerror}") from None

    def names(self) -> list[str]:
        """See `ImageFiles.names`."""
        return sorted(os.listdir(self.root))[:_HINT_NAMES]

    def stamps(self, stored: Iterable[str] | None = None) -> Iterator[Stamp]:
        """See `ImageFiles.stamps`: one for each image."""
        yield from map(stamp, stored if stored is not None else sorted(self._tree()))

    def _tree(self) -> Iterator[str]:
        """Paths of all images in the folder and its subfolders."""
        for folder, _, files in os.walk(self.root):
            for base in files:
                if base.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
                    yield os.path.join(folder, base)


class TreeImages(FolderImages):
    """Images in a folder and its subfolders, by their base names alone."""

    @cached_property
    def _by_base(self) -> dict[str, str | None]:
        """Base name → path, listed once; None for a name that occurs in two folders."""
        found: dict[str, str | None] = {}
        for path in self._tree():
            base = os.path.basename(path)
            found[base] = path if base not in found else None
        return found

    def find(self, name: str) -> str | None:
        """See `ImageFiles.find`."""
        return self._by_base.get(PurePosixPath(name).name)

    def names(self) -> list[str]:
        """See `ImageFiles.names`."""
        return list(islice(self._by_base, _HINT_NAMES))


class TarImages(ImageFiles):
    """Images in an uncompressed tar, read by their offsets."""

    def __init__(self, root: Path, *, tolerant: bool = False) -> None:
        """Raises UserError: no readable, uncompressed tar; ``tolerant``: not even its beginning."""
        self.root = root
        self.name = str(root)
        self._spans: dict[str, tuple[int, int]] = {}
        self._by_base: dict[str, str | None] = {}
        try:
            for member in plain_members(str(root)):
                self._add(str(PurePosixPath(member.name)), member.offset_data, member.size)
        except Damage as damage:
            if not (tolerant and self._spans):
                raise UserError(f"--images: {damage}") from None
            logger.warning("--images: %s; the %s images in front of that are used", damage, f"{len(self._spans):,}")
        self._handle = os.open(root, os.O_RDONLY | os.O_CLOEXEC)

    def _add(self, name: str, offset: int, size: int) -> None:
        self._spans[name] = (offset, size)
        base = PurePosixPath(name).name
        # A base name that occurs in two folders names no image by itself.
        self._by_base[base] = name if base not in self._by_base else None

    def find(self, name: str) -> str | None:
        """See `ImageFiles.find`."""
        exact = str(PurePosixPath(name))
        return exact if exact in self._spans else self._by_base.get(PurePosixPath(name).name)

    def read(self, stored: str) -> bytes:
        """See `ImageFiles.read`."""
        offset, size = self._spans[stored]
        if not 0 <= size <= os.fstat(self._handle).st_size - offset:
            # Asked first: a damaged header may name more bytes than there is memory.
            message = f"{self.root}: the tar ends inside {stored}: incomplete copy?"
            raise Damage(DamageKind.SHARD_TRUNCATED, message)
        try:
            data = os.pread(self._handle, size, offset)
        except OSError as error:
            message = f"{self.root}: cannot be read at {stored}: {error.strerror}"
            raise Damage(DamageKind.SHARD_UNREADABLE, message) from None
        if len(data) < size:
            message = f"{self.root}: the tar ends inside {stored}: incomplete copy?"
            raise Damage(DamageKind.SHARD_TRUNCATED, message)
        return data

    def names(self) -> list[str]:
        """See `ImageFiles.names`."""
        return list(islice(self._by_base, _HINT_NAMES))

    def stamps(self, stored: Iterable[str] | None = None) -> Iterator[Stamp]:
        """See `ImageFiles.stamps`: one, of the tar."""
        yield stamp(self.root)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


class SeveralImages(ImageFiles):
    """Images in several places, looked up in their order."""

    def __init__(self, places: Sequence[ImageFiles]) -> None:
        self.places = places
        self.name = ", ".join(place.name for place in places)

    def find(self, name: str) -> str | None:
        """See `ImageFiles.find`; the number of the place stands before the stored name."""
        for number, place in enumerate(self.places):
            stored = place.find(name)
            if stored is not None:
                return f"{number}:{stored}"
        return None

    def read(self, stored: str) -> bytes:
        """See `ImageFiles.read`."""
        number, _, inside = stored.partition(":")
        return self.places[int(number)].read(inside)

    def names(self) -> list[str]:
        """See `ImageFiles.names`."""
        return [name for place in self.places for name in place.names()][:_HINT_NAMES]

    def stamps(self, stored: Iterable[str] | None = None) -> Iterator[Stamp]:
        """See `ImageFiles.stamps`."""
        if stored is None:
            for place in self.places:
                yield from place.stamps()
            return
        inside: list[list[str]] = [[] for _ in self.places]
        for name in stored:
            number, _, rest = name.partition(":")
            inside[int(number)].append(rest)
        for place, names in zip(self.places, inside, strict=True):
            yield from place.stamps(names)


def open_images(paths: Sequence[str | Path], *, tree: bool = False, tolerant: bool = False) -> ImageFiles:
    """Open folders and tars of images, at least one.

    Args:
        paths: where they are.
        tree: whether an image is looked up by its base name in subfolders too.
        tolerant: whether a tar that is damaged serves as far as it is whole.

    Raises:
        UserError: one does not exist, is neither a folder nor a tar, or is damaged.
    """
    places: list[ImageFiles] = []
    for path in paths:
        root = Path(path).expanduser()
        if root.is_dir():
            places.append(TreeImages(root) if tree else FolderImages(root))
        elif root.is_file():
            places.append(TarImages(root, tolerant=tolerant))
        else:
            siblings = os.listdir(root.parent) if root.parent.is_dir() else []
            hint = nearest(root.name, siblings)
            raise UserError(f"--images: {root} not found, expected a folder or a .tar.{hint}")
    return places[0] if len(places) == 1 else SeveralImages(places)
