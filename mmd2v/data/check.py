"""Verifies shards: every member is read, every image decoded, ids are unique, indexes, manifests and checksums agree.

Samples without image are right where the whole data set has none (text alone); beside images they are damage.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mmd2v.data.addresses import display, is_remote
from mmd2v.data.draws import words
from mmd2v.data.image_header import MAX_PIXELS, check_pixels
from mmd2v.data.manifest import MANIFEST_NAME, ManifestEntry, read_manifest
from mmd2v.data.packing import ordered_map
from mmd2v.data.shards import INDEX_SUFFIX, ShardIndex, expand_shards
from mmd2v.data.transforms import decode_image
from mmd2v.errors import UserError
from mmd2v.progress import Progress

MOST_PROBLEMS = 1000
"""Problems whose text is kept: a set may have one a sample."""


@dataclass
class CheckReport:
    """What a check found."""

    shards: int = 0
    images: int = 0
    texts: int = 0
    """Samples without image, of a set that has none at all."""
    checksums: int = 0
    """Shards whose SHA-256 is the one of their manifest."""
    captions: int = 0
    fewest_captions: int = 0
    most_captions: int = 0
    bytes: int = 0
    problem_count: int = 0
    problems: list[str] = field(default_factory=list)
    """The first `MOST_PROBLEMS` of them, one line each, naming shard and sample."""

    def problem(self, message: str) -> None:
        """Note what is wrong."""
        self.problem_count += 1
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(message)

    def __str__(self) -> str:
        samples = f"{self.texts:,} texts without image" if self.texts else f"{self.images:,} readable images"
        each = "a text" if self.texts else "an image"
        checksums = f", {self.checksums:,} right checksums" if self.checksums else ""
        return (
            f"{self.shards:,} shards, {samples}, {self.captions:,} captions "
            f"({self.fewest_captions} to {self.most_captions} {each}), {self.bytes / 1e6:,.1f} MB{checksums}, "
            f"{self.problem_count:,} problems"
        )


def check_shards(spec: str | Sequence[str], workers: int | None = None) -> CheckReport:
    """Read everything a data set holds.

    Args:
        spec: see `mmd2v.data.shards.expand_shards`.
        workers: threads that decode; none: one a core.

    Raises:
        UserError: no such shards. Damage inside is reported, not raised.
    """
    _refuse_addresses([spec] if isinstance(spec, str) else spec)
    paths = expand_shards(spec)
    _refuse_addresses(paths)  # those that a list names
    report = CheckReport(shards=len(paths))
    manifests = {folder: _read_manifest(folder, report) for folder in sorted({os.path.dirname(path) for path in paths})}
    imageless = _Imageless(report)
    hashes: list[np.ndarray] = []
    with Progress("checking", unit="samples") as progress:
        for path in paths:
            folder, name = os.path.split(path)
            if entry := manifests[folder].get(name):
                _check_sum(path, entry, report)
            hashes.append(_check_shard(path, report, imageless, workers or os.cpu_count() or 1, progress))
    _check_manifests(paths, hashes, manifests, report)
    _check_duplicates(paths, hashes, report)
    return report


def _refuse_addresses(items: Sequence[str]) -> None:
    for item in items:
        if is_remote(item):
            raise UserError(
                f"shards: {display(item)} is no local file, expected local ones: a check reads every byte, with the "
                "index and the manifest beside the shard. Copy the whole folder here first; `mmd2v data stats` reads "
                "addresses and counts what is damaged"
            )


class _Imageless:
    """Samples without image: counted as long as no sample has one, problems from then on."""

    def __init__(self, report: CheckReport) -> None:
        self._report = report
        self._first = ""

    def found(self, message: str) -> None:
        """Note a sample without image that is right otherwise."""
        if self._report.images:
            self._report.problem(message)
            return
        self._first = self._first or message
        self._report.texts += 1

    def image(self) -> None:
        """Note a sample with an image: those before it are no text set then."""
        if self._report.texts:
            more = f", as have {self._report.texts - 1:,} more before the first image" if self._report.texts > 1 else ""
            self._report.problem(f"{self._first}{more}; expected an image everywhere or nowhere")
            self._report.texts = 0
        self._report.images += 1


def _check_sum(path: str, entry: ManifestEntry, report: CheckReport) -> None:
    """Compare a shard with the checksum of its manifest, or with its size where that has none."""
    try:
        size = os.path.getsize(path)
        if entry.sha256 is None:
            if size != entry.bytes:
                report.problem(
                    f"{path}: found {size:,} bytes, expected {entry.bytes:,} by the {MANIFEST_NAME} beside it: "
                    "the shard is incomplete or was replaced"
                )
            return
        with open(path, "rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        return  # told by the check of the shard itself
    if found == entry.sha256:
        report.checksums += 1
        return
    report.problem(
        f"{path}: found SHA-256 {found[:16]}…, expected {entry.sha256[:16]}… by the {MANIFEST_NAME} beside it: "
        "the shard is damaged or was replaced"
    )


def _check_shard(path: str, report: CheckReport, imageless: _Imageless, workers: int, progress: Progress) -> np.ndarray:
    """Check one shard; uint64 [R] hashes of the ids of all its samples."""
    try:
        index = ShardIndex.scan(path)
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        report.problem(f"{path}: cannot be read: {error.strerror}")
        return np.zeros(0, np.uint64)
    except UserError as error:
        report.problem(str(error))
        return np.zeros(0, np.uint64)
    report.bytes += index.size
    _check_index_file(index, report)
    has_image = index.spans[:, 0, 0] >= 0

    def examine(row: int) -> tuple[str, int, str | None]:
        """(id, captions, problem) of one sample."""
        sample_id, captions = index.keys[row], 0
        try:
            sample = index.read(row, handle, images=bool(has_image[row]))
            sample_id, captions = sample.id, len(sample.captions)
            if sample.image is not None:
                check_pixels(sample.image, MAX_PIXELS, sample.where, "the default of data.damage.max_pixels")
                decode_image(sample.image, sample.where)
        except UserError as error:
            return sample_id, captions, str(error)
        return sample_id, captions, None

    ids = np.zeros(len(index), np.uint64)
    try:
        for row, (sample_id, captions, problem) in enumerate(ordered_map(examine, range(len(index)), workers)):
            ids[row] = words(1, sample_id)[0]
            progress.advance()
            if problem is not None:
                report.problem(problem)
                continue
            if has_image[row]:
                imageless.image()
            else:
                imageless.found(f"{index.where(row)}: no image member")
            report.captions += captions
            report.fewest_captions = min(report.fewest_captions or captions, captions)
            report.most_captions = max(report.most_captions, captions)
    finally:
        os.close(handle)
    return ids


def _check_index_file(index: ShardIndex, report: CheckReport) -> None:
    if not os.path.exists(index.path + INDEX_SUFFIX):
        return
    try:
        stored = ShardIndex.open(index.path)
    except UserError as error:
        report.problem(str(error))
        return
    if stored.keys != index.keys or not np.array_equal(stored.spans, index.spans):
        report.problem(f"{index.path}{INDEX_SUFFIX}: does not describe the shard beside it; delete it")


def _read_manifest(folder: str, report: CheckReport) -> dict[str, ManifestEntry]:
    try:
        return read_manifest(folder)
    except UserError as error:
        report.problem(str(error))
        return {}


def _check_manifests(
    paths: list[str],
    hashes: list[np.ndarray],
    manifests: dict[str, dict[str, ManifestEntry]],
    report: CheckReport,
) -> None:
    found = {path: len(ids) for path, ids in zip(paths, hashes, strict=True)}
    for folder, manifest in manifests.items():
        where = os.path.join(folder, MANIFEST_NAME)
        for name, entry in manifest.items():
            path = os.path.join(folder, name)
            if not os.path.exists(path):
                report.problem(f"{where}: lists {name}, which is not there")
            elif path in found and found[path] != entry.samples:
                report.problem(f"{where}: lists {entry.samples:,} samples in {name}, found {found[path]:,}")


def _check_duplicates(paths: list[str], hashes: list[np.ndarray], report: CheckReport) -> None:
    """Compare 64-bit hashes of ids: 8 bytes a sample, whatever the ids look like."""
    ids = np.concatenate(hashes)
    order = np.argsort(ids, kind="stable")
    repeats = np.flatnonzero(ids[order][1:] == ids[order][:-1]) + 1
    ends = np.cumsum([len(part) for part in hashes])

    # Each shard is scanned once for the names of all its duplicates, of which it needs the keys alone.
    second = repeats[: max(0, MOST_PROBLEMS - len(report.problems))]
    wanted = sorted({*order[second].tolist(), *order[second - 1].tolist()})
    names: dict[int, str] = {}
    index: ShardIndex | None = None
    for position in wanted:
        shard = int(np.searchsorted(ends, position, side="right"))
        if index is None or index.path != paths[shard]:
            index = ShardIndex.scan(paths[shard])
        names[position] = index.where(int(position - ends[shard] + len(hashes[shard])))
    for place in second.tolist():
        report.problem(f"{names[int(order[place])]}: duplicate id, also of {names[int(order[place - 1])]}")
    report.problem_count += len(repeats) - len(second)
