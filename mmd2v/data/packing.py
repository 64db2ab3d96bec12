"""A source of captioned images or of text → a folder of shards, written whole or not at all, resumable.

torchvision is imported where images are decoded or encoded: it is slow to import, and whoever writes finished JPEGs, as
`mmd2v.data.generate` does, needs none of it.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from mmd2v import __version__
from mmd2v.data.captions import check_captions
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.image_header import MAX_PIXELS, check_pixels
from mmd2v.data.manifest import ManifestEntry
from mmd2v.data.partial import PackState, PartialFolder
from mmd2v.data.sources import Format, Record, Source, SourceOptions, open_source
from mmd2v.data.sources.base import stops
from mmd2v.data.writer import ShardFolder
from mmd2v.errors import UserError, disk_message
from mmd2v.files import atomic_path
from mmd2v.progress import Progress

logger = logging.getLogger(__name__)

JPEG_QUALITY = 95  # of images that must be encoded again: resized ones, and those that were no JPEG
_JPEG_START = b"\xff\xd8"

Item = TypeVar("Item")
Result = TypeVar("Result")


class Encoding(NamedTuple):
    """How images are stored."""

    resize: int | None
    """Pixels of the shorter side at most."""
    max_pixels: int
    """Larger images are damage."""


class Sample(NamedTuple):
    """One sample ready to be written."""

    id: str
    jpeg: bytes | None
    """None: a text without image."""
    meta: dict[str, Any]
    """Its JSON without the id; holds ``captions``."""


@dataclass(frozen=True)
class PackReport:
    """What was written."""

    samples: int
    captions: int
    shards: int
    bytes: int
    unit: str = "images"
    """What the samples are, in the plural."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Kind of damage → samples of the source that were left out."""
    examples: dict[str, str] = field(default_factory=dict)
    """Kind of damage → what was wrong with the first of them."""

    def __str__(self) -> str:
        captions = f", {self.captions:,} captions" if self.unit == "images" else ""
        text = f"{self.samples:,} {self.unit}{captions}, {self.shards:,} shards, {self.bytes / 1e6:,.1f} MB"
        if not self.skipped:
            return text
        kinds = sorted(self.skipped.items(), key=lambda item: (-item[1], item[0]))
        lines = [f"  {kind}: {count:,}, the first: {self.examples[kind]}" for kind, count in kinds]
        return "\n".join([f"{text}; left out {sum(self.skipped.values()):,} damaged ones:", *lines])


def pack(
    source: str | Path,
    out: str | Path,
    *,
    images: str | Path | Sequence[str | Path] | None = None,
    format: Format = "auto",
    splits: Sequence[str] = (),
    shard_size: int = 1000,
    resize: int | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    max_captions: int | None = None,
    passage_words: int | None = None,
    limit: int | None = None,
    max_pixels: int | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
) -> PackReport:
    """Pack a data set into shards; every image is decoded once to be sure of it.

    An interrupted pack leaves `mmd2v.data.partial`'s ``OUT.partial``; the same call goes on behind its last finished
    shard, and the result has the bytes of an uninterrupted one.

    Args:
        source: caption file, folder or archive, see `mmd2v.data.sources`.
        out: folder to create.
        images: folders or uncompressed tars of the images; none: the folder of ``source``.
        format: format of ``source``.
        splits: splits to take (karpathy).
        shard_size: samples a shard.
        resize: shrink images whose shorter side is longer than this, in pixels.
        image_column: CSV column with image names.
        caption_column: CSV column with captions.
        max_captions: take the first captions of an image alone.
        passage_words: most words of a passage (text).
        limit: write the first samples alone.
        max_pixels: images of more count as damaged (decompression bombs); none: as many as training takes by default.
        skip_bad: leave damaged samples out and count them, instead of stopping at the first.
        workers: threads that decode; none: one a core.

    Raises:
        UserError: anything wrong with the input; nothing is left behind then. Or the disk refuses; the finished
            shards are kept then.
    """
    import torchvision

    bounds = {"--shard-size": shard_size, "--resize": resize, "--max-captions": max_captions, "--limit": limit}
    for flag, value in {**bounds, "--passage-words": passage_words, "--max-pixels": max_pixels}.items():
        if value is not None and value < 1:
            raise UserError(f"{flag}: found {value}, expected at least 1")
    check_new_folder(out)
    places = () if images is None else (images,) if isinstance(images, (str, Path)) else tuple(images)
    paths = tuple(Path(place).expanduser() for place in places)
    options = SourceOptions(paths, tuple(splits), image_column, caption_column, passage_words, skip_bad)
    opened = open_source(source, format, options)
    arguments = {
        "SOURCE": os.path.abspath(opened.path),
        "--format": opened.format,
        "--images": [os.path.abspath(path) for path in paths],
        "--split": list(splits),
        "--shard-size": shard_size,
        "--resize": resize,
        "--image-column": image_column,
        "--caption-column": caption_column,
        "--max-captions": max_captions,
        "--passage-words": passage_words,
        "--limit": limit,
        "--max-pixels": max_pixels,
        "--skip-bad": skip_bad,
        # What the bytes depend on besides: texts are cut by the one, images encoded by the other.
        "mmd2v": __version__,
        "torchvision": torchvision.__version__,
    }
    try:
        partial = PartialFolder(out, arguments, opened.stamps())
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {disk_message(error)}") from None

    encoding = Encoding(resize, MAX_PIXELS if max_pixels is None else max_pixels)

    def prepare(record: Record) -> Sample | Damage:
        try:
            return _sample(record, opened, encoding, max_captions)
        except Damage as damage:
            if not skip_bad:
                raise stops(damage) from None
            return damage

    try:
        state = _write(partial, opened, prepare, shard_size, limit, workers or os.cpu_count() or 1)
        if not partial.written:
            raise UserError(f"{opened.path}: found no sample to pack{_first(state)}, expected at least one")
        partial.publish()
    except UserError:
        partial.remove()
        raise
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {disk_message(error)}{_kept(partial)}") from None
    except KeyboardInterrupt:
        logger.warning("%s: interrupted%s", out, _kept(partial))
        raise
    finally:
        partial.release()
    return _report(partial.written, state, opened.unit)


def _write(
    partial: PartialFolder,
    source: Source,
    prepare: Callable[[Record], Sample | Damage],
    shard_size: int,
    limit: int | None,
    workers: int,
) -> PackState:
    """Write the samples that no finished shard holds yet."""
    state = partial.state
    if partial.written:
        logger.warning(
            "%s: going on behind %s finished shards, %s %s",
            partial.path,
            f"{len(partial.written):,}",
            f"{state.samples:,}",
            source.unit,
        )
    total = source.total if limit is None else limit if source.total is None else min(limit, source.total)
    records = islice(source.records(), state.records, None)
    # Text needs no second thread: there is nothing to decode.
    results = ordered_map(prepare, records, workers) if source.has_images else map(prepare, records)
    with (
        ShardFolder(
            partial.shards,
            shard_size,
            written=partial.written,
            finished=lambda name, entry: partial.finished(name, entry, state),
        ) as folder,
        Progress("packing", total, unit=source.unit, done=state.records) as progress,
    ):
        while limit is None or state.samples < limit:
            result = next(results, None)
            if result is None:
                break
            if isinstance(result, Damage):
                state.skip(result.kind.value, str(result))
            else:
                # Counted before it is written: its shard may end with it.
                state.records += 1
                state.samples += 1
                state.captions += len(result.meta["captions"])
                folder.write(result.id, result.jpeg, result.meta)
            progress.advance()
    return state


def _sample(record: Record, source: Source, encoding: Encoding, max_captions: int | None) -> Sample:
    """Read, check and encode a record; runs in any thread. Raises `Damage`."""
    if record.damage is not None:
        raise record.damage
    name = f"{source.unit.removesuffix('s')} {record.id}" if record.image is None else f"image {record.image}"
    where = f"{source.path}: {name}"
    try:
        record.id.encode()
    except UnicodeEncodeError:
        raise Damage(DamageKind.BAD_ENCODING, f"{source.path}: the name {record.id!r} is not UTF-8") from None
    captions = list(check_captions(record.captions, where))[:max_captions]
    if record.read is None:
        return Sample(record.id, None, {"captions": captions, **record.extras})
    jpeg, height, width = _as_jpeg(record.read(), encoding, where)
    return Sample(record.id, jpeg, {"captions": captions, "width": width, "height": height, **record.extras})


def _first(state: PackState) -> str:
    return "".join(f" (the first damaged one: {message})" for message in list(state.examples.values())[:1])


def _kept(partial: PartialFolder) -> str:
    """Say what is kept; without a finished shard there is nothing to keep."""
    if not partial.written:
        partial.remove()
        return ""
    return f"; {partial.path} keeps {len(partial.written):,} finished shards, and the same command goes on behind them"


def _report(written: dict[str, ManifestEntry], state: PackState, unit: str) -> PackReport:
    size = sum(entry.bytes for entry in written.values())
    return PackReport(
        state.samples, state.captions, len(written), size, unit, dict(state.skipped), dict(state.examples)
    )


def write_shards(
    samples: Iterable[Sample], out: str | Path, *, total: int, shard_size: int, what: str, unit: str = "images"
) -> PackReport:
    """Write samples into a new folder of shards, atomically, with progress in ``unit``.

    Raises:
        UserError: the folder exists with something in it, or the disk refuses.
    """
    check_new_folder(out)
    state = PackState()
    try:
        with atomic_path(out) as temporary:
            temporary.mkdir()
            with ShardFolder(temporary, shard_size) as folder, Progress(what, total, unit=unit) as progress:
                for sample in samples:
                    folder.write(sample.id, sample.jpeg, sample.meta)
                    state.samples += 1
                    state.captions += len(sample.meta["captions"])
                    progress.advance()
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {disk_message(error)}") from None
    return _report(folder.written, state, unit)


def check_new_folder(out: str | Path) -> None:
    """Raise a UserError if ``out`` exists and is not an empty folder."""
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--out: {path} exists and is not an empty folder; name a new one or remove it")


def encode(image: torch.Tensor) -> bytes:
    """Encode uint8 [3, H, W] as JPEG."""
    from torchvision.io import encode_jpeg

    return encode_jpeg(image.contiguous(), quality=JPEG_QUALITY).numpy().tobytes()


def _as_jpeg(data: bytes, encoding: Encoding, where: str) -> tuple[bytes, int, int]:
    """Return (JPEG bytes, height, width); a JPEG that keeps its size is not encoded again."""
    from mmd2v.data.transforms import decode_image, shrink

    check_pixels(data, encoding.max_pixels, where, "--max-pixels")
    image = decode_image(data, where)
    smaller = image if encoding.resize is None else shrink(image, encoding.resize)
    if smaller is not image or not data.startswith(_JPEG_START):
        data = encode(smaller)
    return data, smaller.shape[1], smaller.shape[2]


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
