"""Which samples every rank consumed, step by step: proof that none was repeated or lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mmd2v.files import naming, write_text


class Trace:
    """Appends one JSON line a micro-batch to ``FILE.rankR.jsonl``: ``{"step", "micro_step", "ids"}``.

    A run that goes back to a step forgets what it had written from there on.
    """

    def __init__(self, file: str | Path, rank: int, first_step: int) -> None:
        """Open this rank's file; lines of ``first_step`` and later are removed."""
        self.file = file
        self.path = Path(f"{file}.rank{rank}.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _cut(self.path, first_step)
        self._handle = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run

    def write(self, step: int, micro_step: int, ids: Sequence[str]) -> None:
        """Record one micro-batch."""
        with naming(self.path):
            self._handle.write(json.dumps({"step": step, "micro_step": micro_step, "ids": list(ids)}) + "\n")
            self._handle.flush()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # each line was written at once: what is left is one that failed, and was told
            self._handle.close()


def cut_other_traces(file: str | Path, first_step: int, ranks: int) -> None:
    """Remove the lines of ``first_step`` and later from the files of ranks that a run of ``ranks`` no longer has.

    For one rank to call: the others cut their own.
    """
    prefix, folder = f"{Path(file).name}.rank", Path(file).parent
    for path in folder.iterdir() if folder.is_dir() else ():
        number = path.name.removeprefix(prefix).removesuffix(".jsonl")
        if path.name == f"{prefix}{number}.jsonl" and number.isdecimal() and int(number) >= ranks:
            _cut(path, first_step)


def _cut(path: Path, first_step: int) -> None:
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) < first_step]
    write_text(path, "".join(line + "\n" for line in kept))


def _step(line: str) -> float:
    """Step of a line; infinity for one that a killed run left unfinished."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
