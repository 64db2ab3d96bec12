"""How many tokens every text of some shards has: a small file a shard, counted once and read in place of the text.

Counts are of the text alone, without special tokens and before truncation, so that one file serves every
``max_length`` and ``append_end``. A file belongs to one tokenizer: its name carries the first 8 hexadecimal digits of
the tokenizer's fingerprint, ``NAME.tar.1a2b3c4d.lengths``. It is a safetensors file: int32 ``lengths`` [N], uint32
``starts`` [R + 1] (the first text of each row), and in its metadata the whole fingerprint and the bytes of the tar.

A row that cannot be read (no caption, twice the same key) counts as one text without tokens, as in a batch.

Shapes: S shards, R rows (samples) of a shard, N texts (captions) of a shard.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmd2v.config.schema import DataConfig, SourceConfig, TokenizerConfig
from mmd2v.data.addresses import PIPE, display, is_remote, without_secrets
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.shards import ShardSet
from mmd2v.data.tokenizers import Tokenizer, load_tokenizer
from mmd2v.errors import UserError, disk_message
from mmd2v.files import atomic_path

LENGTHS_SUFFIX = ".lengths"
_METADATA = "mmd2v_token_lengths"
_VERSION = 1
_FEW_SAMPLES = 20_000  # starting processes takes longer
_TOGETHER = 4096  # texts that are read and tokenised together
_WHOLE_SHARD = (DamageKind.SHARD_UNREADABLE, DamageKind.SHARD_TRUNCATED)


class Counts(NamedTuple):
    """What the file of one shard says."""

    lengths_N: np.ndarray
    """int32 [N], tokens of each text, without special tokens and before truncation."""
    starts_R: np.ndarray
    """int64 [R + 1], the first text of each row; the last is N."""


@dataclass(frozen=True)
class LengthFiles:
    """Where the files of a set's shards are, for one tokenizer.

    Attributes:
        paths: S shards, as `ShardSet.paths`.
        names: S, what tells the shards apart for as long as they stay where they are.
        fingerprint: of the tokenizer.
        folder: see `DataConfig.lengths_dir`.
        cache: folder for what cannot be written beside its shard.
    """

    paths: Sequence[str]
    names: Sequence[str]
    fingerprint: str
    folder: str | None
    cache: str

    @classmethod
    def of(cls, paths: Sequence[str], tokenizer: Tokenizer, folder: str | None, source: SourceConfig) -> LengthFiles:
        """Describe the files of a set and a loaded tokenizer."""
        from mmd2v.data.shard_cache import default_folder

        # A folder of their own: what lies beside the shards is the cache's to evict.
        cache = os.path.join(source.cache_dir or default_folder(), "lengths")
        # A signature changes from day to day, but some servers tell files apart by nothing but the query.
        names = [without_secrets(path) for path in paths]
        names = names if len(set(names)) == len(paths) else paths
        return cls(paths, names, tokenizer.fingerprint, folder, cache)

    def candidates(self, shard: int) -> list[Path]:
        """Where the file of a shard may be, first choice first."""
        path = self.paths[shard]
        ending = f".{self.fingerprint[:8]}{LENGTHS_SUFFIX}"
        # Shards of several folders may have one name. A command may hold secrets anywhere.
        readable = "pipe" if path.startswith(PIPE) else without_secrets(path).rpartition("/")[2][-80:]
        apart = f"{hashlib.sha256(self.names[shard].encode()).hexdigest()[:8]}-{readable}{ending}"
        if self.folder is not None:
            return [Path(self.folder) / apart]
        beside = [] if is_remote(path) else [Path(path + ending)]
        return [*beside, Path(self.cache) / apart]

    def find(self, shard: int) -> Path | None:
        """The file of a shard; None when there is none, or only of a tar that has since been replaced."""
        for path in self.candidates(shard):
            if path.exists() and _belongs(path, self.fingerprint, self.paths[shard]):
                return path
        return None

    def target(self, shard: int) -> Path:
        """Where the file of a shard is to be written."""
        *earlier, last = self.candidates(shard)
        return next((path for path in earlier if os.access(path.parent, os.W_OK)), last)

    def read(self, shard: int) -> Counts:
        """Read the file of a shard.

        Raises:
            UserError: there is none of the tar as it is now, or it is damaged.
        """
        path = self.find(shard)
        if path is None:
            raise UserError(
                f"{display(self.paths[shard])}: its file of token lengths is gone, or of another tar; expected "
                f"{self.target(shard)}"
            )
        return read_counts(path)


def read_counts(path: Path) -> Counts:
    """Read one file; raises a UserError that names it when it is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
        counts = Counts(tensors["lengths"], tensors["starts"].astype(np.int64))
        if counts.lengths_N.dtype != np.int32 or counts.starts_R[-1] != len(counts.lengths_N):
            raise ValueError("another version")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (SafetensorError, KeyError, ValueError, IndexError):
        raise UserError(f"{path}: not a file of token lengths of this version; delete it to count anew") from None
    return counts


def _write(path: Path, counts: Counts, fingerprint: str, size: int) -> None:
    from safetensors.numpy import save_file

    record = {"version": _VERSION, "fingerprint": fingerprint, "bytes": size}
    tensors = {"lengths": counts.lengths_N.astype(np.int32), "starts": counts.starts_R.astype(np.uint32)}
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {_METADATA: json.dumps(record)})
    except OSError as error:
        raise UserError(f"{path}: {disk_message(error)}") from None


def _belongs(path: Path, fingerprint: str, shard: str) -> bool:
    """Whether a file was made by this version, with this tokenizer, of the tar as it is now."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            record = json.loads((handle.metadata() or {})[_METADATA])
    except (OSError, SafetensorError, KeyError, ValueError):
        return False
    if (record.get("version"), record.get("fingerprint")) != (_VERSION, fingerprint):
        return False
    if is_remote(shard) or not os.path.exists(shard):
        return True
    # Tars are padded to 10 kB: another one may well have as many bytes.
    tar = os.stat(shard)
    return tar.st_size == record.get("bytes") and tar.st_mtime_ns <= path.stat().st_mtime_ns


# ------------------------------------------------------------------------------------------ counting


def count_shard(shards: ShardSet, shard: int, tokenizer: Tokenizer) -> Counts:
    """Tokenise the texts of one shard; images are not read.

    Raises:
        Damage: the shard as a whole cannot be read, or it ends early.
    """
    lengths: list[np.ndarray] = []
    texts_of_row: list[int] = []
    rows = len(shards.index(shard))
    for first in range(0, rows, _TOGETHER):
        texts: list[str] = []
        places = [(shard, row) for row in range(first, min(first + _TOGETHER, rows))]
        for sample in shards.read_many(places, images=False):
            if isinstance(sample, Damage):
                if sample.kind in _WHOLE_SHARD:
                    raise sample
                texts.append("")
                texts_of_row.append(1)
            else:
                texts += sample.captions
                texts_of_row.append(len(sample.captions))
        lengths.append(np.fromiter(map(len, tokenizer.encode_text(texts)), np.int32, len(texts)))
    starts_R = np.concatenate([[0], np.cumsum(texts_of_row, dtype=np.int64)])
    return Counts(np.concatenate([np.zeros(0, np.int32), *lengths]), starts_R)


@dataclass(frozen=True)
class LengthReport:
    """What there is after counting."""

    shards: int
    counted: int
    """Shards that were counted now; the others' files were there."""
    texts: int
    tokens: int
    longest: int
    shortest: int
    cut: int
    """Texts that ``max_length`` cuts."""
    max_length: int
    """Special tokens included."""
    example: Path

    def __str__(self) -> str:
        return (
            f"{self.shards:,} shards ({self.counted:,} counted now), {self.texts:,} texts, {self.tokens:,} tokens "
            f"without special ones: {self.shortest:,} to {self.longest:,} a text, "
            f"mean {self.tokens / max(1, self.texts):.1f}; "
            f"max_length {self.max_length} cuts {self.cut:,} texts; files such as {self.example}"
        )


def missing_lengths(shards: ShardSet, files: LengthFiles) -> list[int]:
    """The used shards whose token lengths are not there."""
    return [shard for shard in np.flatnonzero(shards.counts).tolist() if files.find(shard) is None]


def make_lengths(
    shards: ShardSet, files: LengthFiles, tokenizer: TokenizerConfig, *, workers: int | None = None
) -> Iterator[int]:
    """Count the shards that are missing, and yield the number of each when its file is written.

    May be stopped and started again at any time. Closing the iterator ends the processes.

    Args:
        shards: the data set.
        files: where the files go.
        tokenizer: its settings, from which every process loads its own.
        workers: processes; None: one for each core this process may use, or this one alone for what takes a second.

    Raises:
        UserError: a shard cannot be read, or a file cannot be written.
    """
    left = missing_lengths(shards, files)
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 1 if int(shards.counts[left].sum()) < _FEW_SAMPLES else cores
    workers = min(len(left), workers)
    if workers <= 1:
        loaded = load_tokenizer(tokenizer)
        for shard in left:
            _make_one(shards, files, loaded, shard)
            yield shard
        return
    # Spawned: a training process has threads, and locks that a fork would copy.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(shards, files, tokenizer))
    try:
        waiting = iter(left)
        running = {pool.submit(_work, shard) for shard in islice(waiting, 2 * workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(_work, shard) for shard in islice(waiting, len(done))}
            for future in done:
                shard, error = future.result()
                if error is not None:
                    raise UserError(error)
                yield shard
    except BrokenProcessPool:
        raise UserError(
            "token lengths: a counting process died (out of memory?), or this program starts without the line "
            "`if __name__ == '__main__':` and cannot start processes; what is counted is kept, try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[ShardSet, LengthFiles, Tokenizer]


def _start_worker(shards: ShardSet, files: LengthFiles, tokenizer: TokenizerConfig) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core: threads in each would only fight
    _worker = (shards, files, load_tokenizer(tokenizer))


def _work(shard: int) -> tuple[int, str | None]:
    """The shard and what is wrong: an exception of another process would bring its traceback."""
    try:
        _make_one(*_worker, shard)
    except UserError as error:
        return shard, str(error)
    return shard, None


def _make_one(shards: ShardSet, files: LengthFiles, tokenizer: Tokenizer, shard: int) -> None:
    counts = count_shard(shards, shard, tokenizer)
    _write(files.target(shard), counts, files.fingerprint, shards.index(shard).size)


def open_texts(config: DataConfig, tokenizer: Tokenizer, cache: int = 2) -> tuple[ShardSet, LengthFiles]:
    """The one data set of a config and the files of its token lengths."""
    one = next(iter(config.train.named_sets.values()))
    shards = ShardSet(one.shards, one.limit, cache=cache, source=config.source, tolerant=config.damage.limit > 0)
    return shards, LengthFiles.of(shards.paths, tokenizer, config.lengths_dir, config.source)


def command(paths: Sequence[str] | str, tokenizer: TokenizerConfig, folder: str | None) -> str:
    """The command line that makes the files of a run, for messages."""
    named = [paths] if isinstance(paths, str) else paths
    kind = "" if tokenizer.kind == "hf" else f" --kind {tokenizer.kind}"
    out = "" if folder is None else f" --out {folder}"
    return f"mmd2v data lengths {' '.join(map(display, named))} --tokenizer {tokenizer.path}{kind}{out}"


def write_lengths(
    spec: Sequence[str] | str,
    tokenizer: TokenizerConfig,
    *,
    out: str | None = None,
    workers: int | None = None,
    source: SourceConfig | None = None,
) -> LengthReport:
    """Make the files of some shards with progress; what ``mmd2v data lengths`` does.

    Raises:
        UserError: shards or tokenizer cannot be read, or files cannot be written.
    """
    from mmd2v.progress import Progress

    if workers is not None and workers < 1:
        raise UserError(f"--workers: found {workers}, expected at least 1")
    shards = ShardSet(spec, source=source)
    loaded = load_tokenizer(tokenizer)
    files = LengthFiles.of(shards.paths, loaded, out, shards.source)
    missing = missing_lengths(shards, files)
    counted = 0
    if missing:
        with Progress("counting tokens", int(shards.counts[missing].sum()), unit="samples") as progress:
            for shard in make_lengths(shards, files, tokenizer, workers=workers):
                progress.advance(int(shards.counts[shard]))
                counted += 1
    texts, tokens, cut = 0, 0, 0
    shortest, longest = np.iinfo(np.int32).max, 0
    used = np.flatnonzero(shards.counts).tolist()
    room = loaded.max_length - 1 - (loaded.end_id is not None)
    for shard in used:
        lengths_N = files.read(shard).lengths_N
        texts, tokens = texts + len(lengths_N), tokens + int(lengths_N.sum(dtype=np.int64))
        cut += int((lengths_N > room).sum())
        shortest, longest = min(shortest, int(lengths_N.min())), max(longest, int(lengths_N.max()))
    example = files.find(used[0]) or files.target(used[0])
    return LengthReport(len(used), counted, texts, tokens, longest, shortest, cut, loaded.max_length, example)
