"""Damaged samples of all ranks: told, recorded, and a stop for all ranks together when there are too many."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mmd2v.data.damage import DamagedSample, DamageTally
from mmd2v.distributed.collectives import gather_objects
from mmd2v.distributed.coordination import shared_error
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError

DAMAGE_FILE = "damage.jsonl"


class DamageWatch:
    """What this rank has met since the last report, and the tally of all ranks."""

    def __init__(self, run_dir: Path, world: World, allowed: int) -> None:
        """``allowed`` 0: the loader raises at the first, and nothing is gathered here."""
        self.tally = DamageTally(allowed)
        self._file = run_dir / DAMAGE_FILE
        self._world = world
        self._new: list[DamagedSample] = []

    def add(self, samples: Sequence[DamagedSample]) -> None:
        """Note the damaged samples of a batch."""
        self._new += samples

    def report(self, step: int) -> str | None:
        """Share what is new with all ranks; every rank must call it. Returns a line to say, None when nothing is new.

        Raises UserError, on every rank, when there are more than allowed.
        """
        if self.tally.allowed == 0:
            return None
        of_ranks = gather_objects(self._new)
        self._new = []
        new = [(rank, sample) for rank, samples in enumerate(of_ranks) for sample in samples]
        if not new:
            return None
        self.tally.add(sample for _, sample in new)
        if self._world.is_main:
            with open(self._file, "a", encoding="utf-8") as handle:
                for rank, sample in new:
                    handle.write(json.dumps({"step": step, "rank": rank, **asdict(sample)}, ensure_ascii=False) + "\n")
        try:
            self.tally.check()
        except UserError as error:
            raise shared_error(str(error)) from None
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.tally.by_kind().items())
        return (
            f"step {step}: left out {len(new):,} damaged samples, {self.tally.total:,} of at most "
            f"{self.tally.allowed:,} so far ({kinds}); see {self._file}"
        )
