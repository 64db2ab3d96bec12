"""Verifies shards: every member is read, every image decoded, ids are unique, indexes and manifests agree."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mmd2v.data.draws import words
from mmd2v.data.packing import ordered_map
from mmd2v.data.shards import INDEX_SUFFIX, MANIFEST_NAME, ShardIndex, expand_shards, read_manifest
from mmd2v.data.transforms import decode_image
from mmd2v.errors import UserError
from mmd2v.progress import Progress


@dataclass
class CheckReport:
    """What a check found."""

    shards: int = 0
    images: int = 0
    captions: int = 0
    fewest_captions: int = 0
    most_captions: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    """One line each, naming shard and sample."""

    def __str__(self) -> str:
        return (
            f"{self.shards:,} shards, {self.images:,} readable images, {self.captions:,} captions "
            f"({self.fewest_captions} to {self.most_captions} an image), {self.bytes / 1e6:,.1f} MB, "
            f"{len(self.problems):,} problems"
        )


def check_shards(spec: str | Sequence[str], workers: int | None = None) -> CheckReport:
    """Read everything a data set holds.

    Args:
        spec: see `mmd2v.data.shards.expand_shards`.
        workers: threads that decode; none: one a core.

    Raises:
        UserError: no such shards. Damage inside is reported, not raised.
    """
    paths = expand_shards(spec)
    report = CheckReport(shards=len(paths))
    hashes: list[np.ndarray] = []
    with Progress("checking", unit="images") as progress:
        for path in paths:
            hashes.append(_check_shard(path, report, workers or os.cpu_count() or 1, progress))
    _check_manifests(paths, hashes, report)
    _check_duplicates(paths, hashes, report)
    return report


def _check_shard(path: str, report: CheckReport, workers: int, progress: Progress) -> np.ndarray:
    """Check one shard; uint64 [R] hashes of the ids of all its samples."""
    try:
        index = ShardIndex.scan(path)
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        report.problems.append(f"{path}: cannot be read: {error.strerror}")
        return np.zeros(0, np.uint64)
    except UserError as error:
        report.problems.append(str(error))
        return np.zeros(0, np.uint64)
    report.bytes += index.size
    _check_index_file(index, report)

    def examine(row: int) -> tuple[str, int, str | None]:
        """(id, captions, problem) of one sample."""
        sample_id, captions = index.keys[row], 0
        try:
            sample = index.read(row, handle)
            sample_id, captions = sample.id, len(sample.captions)
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
                report.problems.append(problem)
                continue
            report.images += 1
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
        report.problems.append(str(error))
        return
    if stored.keys != index.keys or not np.array_equal(stored.spans, index.spans):
        report.problems.append(f"{index.path}{INDEX_SUFFIX}: does not describe the shard beside it; delete it")


def _check_manifests(paths: list[str], hashes: list[np.ndarray], report: CheckReport) -> None:
    found = {path: len(ids) for path, ids in zip(paths, hashes, strict=True)}
    for folder in sorted({os.path.dirname(path) for path in paths}):
        where = os.path.join(folder, MANIFEST_NAME)
        try:
            manifest = read_manifest(folder)
        except UserError as error:
            report.problems.append(str(error))
            continue
        for name, (samples, _) in manifest.items():
            path = os.path.join(folder, name)
            if not os.path.exists(path):
                report.problems.append(f"{where}: lists {name}, which is not there")
            elif path in found and found[path] != samples:
                report.problems.append(f"{where}: lists {samples:,} samples in {name}, found {found[path]:,}")


def _check_duplicates(paths: list[str], hashes: list[np.ndarray], report: CheckReport) -> None:
    """Compare 64-bit hashes of ids: 8 bytes a sample, whatever the ids look like."""
    ids = np.concatenate(hashes)
    order = np.argsort(ids, kind="stable")
    repeats = np.flatnonzero(ids[order][1:] == ids[order][:-1]) + 1
    ends = np.cumsum([len(part) for part in hashes])

    def where(position: int) -> str:
        shard = int(np.searchsorted(ends, position, side="right"))
        row = int(position - ends[shard] + len(hashes[shard]))
        return ShardIndex.scan(paths[shard]).where(row)

    for place in repeats.tolist():
        report.problems.append(f"{where(int(order[place]))}: duplicate id, also of {where(int(order[place - 1]))}")
