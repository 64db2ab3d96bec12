"""The images a caption file names, in a folder or in an uncompressed tar."""

from __future__ import annotations

import os
import tarfile
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath

from mmd2v.errors import UserError, nearest


class ImageFiles(ABC):
    """Images by the name a caption file gives them; a name is also looked up without its folders."""

    root: Path

    @abstractmethod
    def find(self, name: str) -> str | None:
        """The stored name of an image, or None."""

    @abstractmethod
    def read(self, stored: str) -> bytes:
        """The bytes of an image that `find` returned. Safe to call from several threads."""

    @abstractmethod
    def names(self) -> list[str]:
        """Some stored names, for hints."""

    def hint(self, name: str) -> str:
        """``" Did you mean …?"`` for an absent image, or an empty string."""
        return nearest(PurePosixPath(name).name, self.names())


class FolderImages(ImageFiles):
    """Images in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

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
            raise UserError(f"{stored}: cannot be read: {error.strerror}") from None

    def names(self) -> list[str]:
        """See `ImageFiles.names`."""
        return sorted(os.listdir(self.root))[:20_000]


class TarImages(ImageFiles):
    """Images in an uncompressed tar, read by their offsets."""

    def __init__(self, root: Path) -> None:
        """Raises UserError: no readable, uncompressed tar."""
        self.root = root
        self._spans: dict[str, tuple[int, int]] = {}
        self._by_base: dict[str, str | None] = {}
        try:
            with tarfile.open(root, "r:") as tar:
                for member in tar:
                    if member.isfile():
                        self._add(str(PurePosixPath(member.name)), member.offset_data, member.size)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UserError(f"--images: {root} is no readable, uncompressed tar: {error}") from None
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
        try:
            data = os.pread(self._handle, size, offset)
        except OSError as error:
            raise UserError(f"{self.root}: cannot be read at {stored}: {error.strerror}") from None
        if len(data) < size:
            raise UserError(f"{self.root}: the tar ends inside {stored}: incomplete copy?")
        return data

    def names(self) -> list[str]:
        """See `ImageFiles.names`."""
        return list(self._by_base)[:20_000]

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


def open_images(path: str | Path) -> ImageFiles:
    """Open a folder or tar of images.

    Raises:
        UserError: it does not exist or is neither.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        return FolderImages(root)
    if root.is_file():
        return TarImages(root)
    siblings = os.listdir(root.parent) if root.parent.is_dir() else []
    raise UserError(f"--images: {root} not found, expected a folder or a .tar.{nearest(root.name, siblings)}")
