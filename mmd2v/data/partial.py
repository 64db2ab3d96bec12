"""``OUT.partial``: what a pack that was interrupted leaves beside OUT, so that the same command goes on from there.

``OUT.partial/shards/`` holds the shards and their indexes; ``OUT.partial/journal.jsonl`` has one line with the
arguments and a fingerprint of the source, then one line a finished shard. At the end ``shards/`` is renamed to OUT.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmd2v.data.image_files import Stamp
from mmd2v.data.manifest import ManifestEntry
from mmd2v.data.shards import INDEX_SUFFIX
from mmd2v.data.writer import shard_name
from mmd2v.errors import UserError
from mmd2v.files import write_text

SUFFIX = ".partial"
_JOURNAL = "journal.jsonl"
_VERSION = 1


@dataclass
class PackState:
    """How far a pack is, at the end of a shard."""

    records: int = 0
    """Records of the source that are written or left out."""
    samples: int = 0
    captions: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Kind of damage → samples left out."""
    examples: dict[str, str] = field(default_factory=dict)
    """Kind of damage → message of the first such sample."""

    def skip(self, kind: str, message: str) -> None:
        """Count a record that is left out."""
        self.records += 1
        self.skipped[kind] += 1
        self.examples.setdefault(kind, message)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the journal."""
        return {**vars(self), "skipped": dict(self.skipped)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> PackState:
        """Read what `to_json` wrote."""
        return cls(**{**record, "skipped": Counter(record["skipped"])})


class PartialFolder:
    """The unfinished output of one pack; no second process can use it at the same time.

    Attributes:
        shards: the folder to write shards into.
        written: the shards that are finished.
        state: how far the last of them goes.
    """

    def __init__(self, out: str | Path, arguments: dict[str, Any], source: Iterable[Stamp]) -> None:
        """Open what an earlier attempt left, or start anew.

        Args:
            out: the folder to create in the end.
            arguments: everything the result depends on but the source, as JSON can hold it.
            source: stamps of all input files.

        Raises:
            UserError: there is one of other arguments or another source, or another process is at it.
        """
        self.out = Path(os.path.abspath(out))
        self.path = self.out.with_name(self.out.name + SUFFIX)
        self.shards = self.path / "shards"
        self.written: dict[str, ManifestEntry] = {}
        self.state = PackState()
        self._header = {
            "version": _VERSION,
            "arguments": json.loads(json.dumps(arguments)),
            "source": _fingerprint(source),
        }
        self._lines: list[str] = [json.dumps(self._header)]
        self._lock = self._take()
        try:
            self._resume()
            self._clean()
        except BaseException as error:
            # What an earlier attempt left is kept, whatever is wrong with this one.
            if self.written or isinstance(error, UserError):
                self.release()
            else:
                self.remove()
            raise

    def finished(self, name: str, entry: ManifestEntry, state: PackState) -> None:
        """Note a finished shard, durably."""
        line = json.dumps({"shard": name, "entry": list(entry), "state": state.to_json()})
        with open(self.path / _JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(line + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.written[name] = entry

    def publish(self) -> None:
        """Rename the finished shards to their place and remove the rest."""
        for entry in self.shards.iterdir():
            if entry.is_dir():  # of an atomic write that was killed
                shutil.rmtree(entry)
        os.replace(self.shards, self.out)
        self.remove()

    def remove(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let other processes use the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _take(self) -> int:
        """Create the folder and lock it; a killed process holds no lock."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:  # another process has just published or removed it
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), os.stat(self.path)):
                    return lock
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    return lock  # a file system without locks
                os.close(lock)
                raise UserError(f"--out: another process is writing {self.path}; wait for it or end it") from None
            os.close(lock)

    def _resume(self) -> None:
        """Read the journal: take its shards as far as they are all there."""
        try:
            lines = (self.path / _JOURNAL).read_text(encoding="utf-8").splitlines()
        except (FileNotFoundError, UnicodeDecodeError):
            lines = []
        shards = [entry for entry in map(_shard_line, lines[1:]) if entry is not None]
        if not shards:
            return
        header = _parse(lines[0])
        if header != self._header:
            raise UserError(
                f"--out: {self.path} holds an interrupted pack {self._difference(header)}. Run its command again to "
                "finish it, or remove the folder"
            )
        for line, (name, entry, state) in zip(lines[1:], shards, strict=False):
            file = self.shards / name
            here = file.is_file() and Path(f"{file}{INDEX_SUFFIX}").is_file() and file.stat().st_size == entry.bytes
            if name != shard_name(len(self.written)) or not here:
                break
            self.written[name] = entry
            self.state = state
            self._lines.append(line)

    def _difference(self, header: dict[str, Any]) -> str:
        """Say how the earlier attempt differs."""
        then, now = header.get("arguments"), self._header["arguments"]
        if header.get("version") != _VERSION or not isinstance(then, dict):
            return "of another version"
        names = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
        if names:
            listing = "; ".join(f"{name}: {_shown(then.get(name))} then, {_shown(now.get(name))} now" for name in names)
            return f"with other arguments ({listing})"
        return "of a source that has changed since (a file was replaced, added or removed)"

    def _clean(self) -> None:
        """Remove what belongs to no finished shard, and what a torn write left in the journal."""
        self.shards.mkdir(exist_ok=True)
        known = {name + suffix for name in self.written for suffix in ("", INDEX_SUFFIX)}
        for entry in self.shards.iterdir():
            if entry.name not in known:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        write_text(self.path / _JOURNAL, "".join(line + "\n" for line in self._lines))


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value)


def _fingerprint(stamps: Iterable[Stamp]) -> str:
    digest = hashlib.sha256()
    for stamp in stamps:
        digest.update(f"{os.path.abspath(stamp.path)}\0{stamp.bytes}\0{stamp.modified_ns}\n".encode("utf-8", "replace"))
    return digest.hexdigest()


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _shard_line(line: str) -> tuple[str, ManifestEntry, PackState] | None:
    """A line of a finished shard; None of a torn one."""
    record = _parse(line)
    try:
        return str(record["shard"]), ManifestEntry(*record["entry"]), PackState.from_json(record["state"])
    except (KeyError, TypeError):
        return None
