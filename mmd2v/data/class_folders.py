"""Labelled images: a folder with a folder a class, as torchvision's ImageFolder reads it, or a tar or zip of one.

The classes are the folders below the deepest one that holds all images, so a wrapping folder does not matter. An
archive may be followed by a folder inside it: ``cifar10.tar.gz/cifar10/train``.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from mmd2v.data.damage import Damage
from mmd2v.data.shards import IMAGE_SUFFIXES
from mmd2v.data.tar_members import READ_ERRORS, streamed_members
from mmd2v.errors import UserError, nearest

_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "eval", "dev"})
_HINT = "expected a folder of class folders of images, or a .tar, .tar.gz or .zip of one"

_ZIP_ERRORS = (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError)
"""What zipfile raises at damaged, encrypted and unknown archives."""


class ClassFolders:
    """Which images there are and of which class; they are read in the order in which they lie there."""

    def __init__(self, path: str | Path, flag: str = "data") -> None:
        """Look at the names.

        Args:
            path: a folder, an archive, or a folder inside an archive.
            flag: what messages call it.

        Raises:
            UserError: it does not exist, holds no image, fewer than two classes, or splits instead of classes.
        """
        self._flag = flag
        self._place, self._inside = _split_archive(Path(path).expanduser(), flag)
        self.name = str(path)
        found = [name for name, _ in self._files(self._is_inside, read=False)]
        if not found:
            raise UserError(f"{flag}: {path} holds no image; {_HINT}{self._hint()}")
        parents = [PurePosixPath(name).parent for name in found]
        root = PurePosixPath(os.path.commonpath(parents))
        flat = sum(parent == root for parent in parents)
        if flat == len(found) and len(root.parts) > len(self._inside):  # the folder of one class
            root, flat = root.parent, 0
        self._depth = len(root.parts)
        if flat:
            raise UserError(f"{flag}: {path} has {flat:,} images in no class folder; {_HINT}")
        self.classes: list[str] = sorted({self._class(name) for name in found})
        """Sorted names; a label is a place in them."""
        splits = [name for name in self.classes if name.lower() in _SPLITS]
        if splits and len(splits) == len(self.classes):
            raise UserError(
                f"{flag}: {path} holds the splits {', '.join(splits)} and no classes; name one of them: "
                f"{self._place / root / splits[0]}"
            )
        self._count = len(found)

    def __len__(self) -> int:
        return self._count

    def images(self) -> Iterator[tuple[str, str, bytes]]:
        """Yield (path inside, class, bytes of the file). Raises UserError where a file cannot be read."""
        for name, data in self._files(self._is_inside, read=True):
            yield name, self._class(name), data

    def where(self, name: str) -> str:
        """What messages call an image."""
        return str(self._place / name)

    def _class(self, name: str) -> str:
        return PurePosixPath(name).parts[self._depth]

    def _is_inside(self, name: str) -> bool:
        return PurePosixPath(name).parts[: len(self._inside)] == self._inside

    def _hint(self) -> str:
        """The folder of the archive with the nearest name."""
        if not self._inside:
            return ""
        names = [PurePosixPath(name) for name, _ in self._files(lambda name: True, read=False)]
        return nearest("/".join(self._inside), {str(parent) for name in names for parent in name.parents} - {"."})

    def _files(self, wanted: Callable[[str], bool], read: bool) -> Iterator[tuple[str, bytes]]:
        """Yield (path inside, bytes or nothing) of every image with a wanted path."""
        if self._place.is_dir():
            yield from self._of_folder(wanted, read)
        elif zipfile.is_zipfile(self._place):
            yield from self._of_zip(wanted, read)
        else:
            yield from self._of_tar(wanted, read)

    def _of_folder(self, wanted: Callable[[str], bool], read: bool) -> Iterator[tuple[str, bytes]]:
        for path in sorted(self._place.rglob("*")):
            name = path.relative_to(self._place).as_posix()
            if _is_image(name) and wanted(name) and path.is_file():
                try:
                    yield name, path.read_bytes() if read else b""
                except OSError as error:
                    raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None

    def _of_zip(self, wanted: Callable[[str], bool], read: bool) -> Iterator[tuple[str, bytes]]:
        last = ""
        try:
            with zipfile.ZipFile(self._place) as archive:
                for entry in archive.infolist():
                    name = str(PurePosixPath(entry.filename))
                    last = f" at {name}"
                    if not entry.is_dir() and _is_image(name) and wanted(name):
                        yield name, archive.read(entry) if read else b""
        except _ZIP_ERRORS as error:
            raise UserError(f"{self._flag}: {self._place} is no readable zip{last}: {error}") from None

    def _of_tar(self, wanted: Callable[[str], bool], read: bool) -> Iterator[tuple[str, bytes]]:
        last = ""
        try:
            with open(self._place, "rb") as stream:
                for member, content in streamed_members(stream, str(self._place)):
                    name = str(PurePosixPath(member))
                    last = f" at {name}"
                    if _is_image(name) and wanted(name):
                        yield name, content.read() if read else b""
        except Damage as damage:
            raise UserError(f"{self._flag}: {damage}; {_HINT}") from None
        except READ_ERRORS as error:
            raise UserError(f"{self._flag}: {self._place} cannot be read{last}: {error}") from None


def _is_image(name: str) -> bool:
    """Whether a file is an image by its name; what begins with a dot, and macOS's own folder, is none."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return not hidden and path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES


def _split_archive(path: Path, flag: str) -> tuple[Path, tuple[str, ...]]:
    """Return (folder or archive, parts of the folder inside the archive)."""
    if path.is_dir() or path.is_file():
        return path, ()
    for parent in path.parents:
        if parent.is_file():
            return parent, path.relative_to(parent).parts
        if parent.is_dir():
            missing = path.relative_to(parent).parts[0]
            hint = nearest(missing, [entry.name for entry in parent.iterdir()])
            raise UserError(f"{flag}: {path} not found: {parent} has no '{missing}'; {_HINT}.{hint}")
    raise UserError(f"{flag}: {path} not found; {_HINT}")
