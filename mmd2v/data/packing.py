"""Caption files and images → a folder of shards, checked beforehand, written whole or not at all."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torchvision.io import encode_jpeg

from mmd2v.data.image_files import ImageFiles, open_images
from mmd2v.data.sources import Format, Record, read_source
from mmd2v.data.transforms import decode_image, shrink
from mmd2v.data.writer import ShardFolder
from mmd2v.errors import UserError
from mmd2v.files import atomic_path
from mmd2v.progress import Progress

JPEG_QUALITY = 95  # of images that must be encoded again: resized ones, and those that were no JPEG
_JPEG_START = b"\xff\xd8"

Item = TypeVar("Item")
Result = TypeVar("Result")


class Sample(NamedTuple):
    """One sample ready to be written."""

    id: str
    jpeg: bytes
    meta: dict[str, Any]
    """Its JSON without the id; holds ``captions``."""


@dataclass(frozen=True)
class PackReport:
    """What was written."""

    images: int
    captions: int
    shards: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.images:,} images, {self.captions:,} captions, {self.shards:,} shards, {self.bytes / 1e6:,.1f} MB"


def pack(
    source: str | Path,
    out: str | Path,
    *,
    images: str | Path | None = None,
    format: Format = "auto",
    splits: tuple[str, ...] = (),
    shard_size: int = 1000,
    resize: int | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    workers: int | None = None,
) -> PackReport:
    """Pack a captioned data set into shards; every image is decoded once to be sure of it.

    Args:
        source: caption file or folder, see `mmd2v.data.sources`.
        out: folder to create.
        images: folder or uncompressed tar of the images; none: the folder of ``source``.
        format: format of ``source``.
        splits: splits to take (karpathy).
        shard_size: samples a shard.
        resize: shrink images whose shorter side is longer than this, in pixels.
        image_column: CSV column with image names.
        caption_column: CSV column with captions.
        workers: threads that decode; none: one a core.

    Raises:
        UserError: anything wrong with the input or the disk; nothing is left behind then.
    """
    for flag, value in (("--shard-size", shard_size), ("--resize", resize)):
        if value is not None and value < 1:
            raise UserError(f"{flag}: found {value}, expected at least 1")
    check_new_folder(out)
    records = read_source(source, format, splits, image_column, caption_column)
    path = Path(source).expanduser()
    files = open_images(images if images is not None else path if path.is_dir() else path.parent)
    stored = _find_all(path, records, files)

    def prepare(item: tuple[Record, str]) -> Sample:
        record, name = item
        where = f"{files.root}: image {record.image}"
        jpeg, height, width = _as_jpeg(files.read(name), resize, where)
        meta = {"captions": record.captions, "width": width, "height": height, **record.extras}
        return Sample(record.id, jpeg, meta)

    samples = ordered_map(prepare, zip(records, stored, strict=True), workers or os.cpu_count() or 1)
    return write_shards(samples, out, total=len(records), shard_size=shard_size, what="packing")


def write_shards(samples: Iterable[Sample], out: str | Path, *, total: int, shard_size: int, what: str) -> PackReport:
    """Write samples into a new folder of shards, atomically, with progress.

    Raises:
        UserError: the folder exists with something in it, or the disk refuses.
    """
    check_new_folder(out)
    captions = 0
    try:
        with atomic_path(out) as temporary:
            temporary.mkdir()
            with ShardFolder(temporary, shard_size) as folder, Progress(what, total, unit="images") as progress:
                for sample in samples:
                    folder.write(sample.id, sample.jpeg, sample.meta)
                    captions += len(sample.meta["captions"])
                    progress.advance()
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None
    counts = list(folder.written.values())
    return PackReport(sum(n for n, _ in counts), captions, len(counts), sum(size for _, size in counts))


def check_new_folder(out: str | Path) -> None:
    """Raise a UserError if ``out`` exists and is not an empty folder."""
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--out: {path} exists and is not an empty folder; name a new one or remove it")


def encode(image: torch.Tensor) -> bytes:
    """Encode uint8 [3, H, W] as JPEG."""
    return encode_jpeg(image.contiguous(), quality=JPEG_QUALITY).numpy().tobytes()


def _as_jpeg(data: bytes, resize: int | None, where: str) -> tuple[bytes, int, int]:
    """Return (JPEG bytes, height, width); a JPEG that keeps its size is not encoded again."""
    image = decode_image(data, where)
    smaller = image if resize is None else shrink(image, resize)
    if smaller is not image or not data.startswith(_JPEG_START):
        data = encode(smaller)
    return data, smaller.shape[1], smaller.shape[2]


def _find_all(path: Path, records: list[Record], files: ImageFiles) -> list[str]:
    """The stored name of every record's image, or a UserError that counts and names the absent ones."""
    found = [files.find(record.image) for record in records]
    absent = [record.image for record, name in zip(records, found, strict=True) if name is None]
    if absent:
        more = f" and {len(absent) - 3:,} more" if len(absent) > 3 else ""
        raise UserError(
            f"{path}: {len(absent):,} of its {len(records):,} images are not in {files.root}: "
            f"{', '.join(absent[:3])}{more}.{files.hint(absent[0])}"
        )
    return [name for name in found if name is not None]


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Map in threads, results in order, a bounded number of items ahead."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
