"""Damaged samples of all ranks: told, recorded, and a stop for all ranks together when there are too many."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mmd2v.config.schema import DamageConfig
from mmd2v.data.damage import DamagedSample, DamageKind, DamageTally, damage_allowed
from mmd2v.distributed.collectives import gather_objects
from mmd2v.distributed.coordination import from_main_rank, shared_error
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError
from mmd2v.files import naming, write_text
from mmd2v.train.metrics import read_metrics

DAMAGE_FILE = "damage.jsonl"


class DamageWatch:
    """What this rank has met since the last report, and the tally of all ranks since the run was started."""

    def __init__(self, run_dir: Path, world: World, config: DamageConfig, samples: int, first_step: int) -> None:
        """Go on with what the run's earlier part has recorded; every rank must call it.

        With a limit of 0 the loader raises at the first damaged sample, and nothing is gathered here. ``samples`` is
        the size of the training set, ``first_step`` the steps that are done.
        """
        self.tally = DamageTally(damage_allowed(config, samples))
        self._gathers = config.limit > 0
        self._file = run_dir / DAMAGE_FILE
        self._world = world
        self._new: list[DamagedSample] = []
        recorded: list[DamagedSample] = from_main_rank(lambda: _keep_until(self._file, first_step))
        for sample in recorded:
            self.tally.add(sample)

    def add(self, samples: Sequence[DamagedSample]) -> None:
        """Note the damaged samples of a batch."""
        self._new += samples

    def report(self, step: int) -> str | None:
        """Share what is new with all ranks; every rank must call it. Returns a line to say, None when nothing is new.

        Raises UserError, on every rank, when there are more than allowed.
        """
        if not self._gathers:
            return None
        of_ranks = gather_objects(self._new)
        self._new = []
        new = [(rank, sample) for rank, samples in enumerate(of_ranks) for sample in samples if self.tally.add(sample)]
        if not new:
            return None
        if self._world.is_main:
            with naming(self._file), open(self._file, "a", encoding="utf-8") as handle:
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


def _keep_until(path: Path, step: int) -> list[DamagedSample]:
    """Return what was recorded up to a step, and remove the rest: the run meets it again."""
    kept = [record for record in read_metrics(path) if record["step"] <= step] if path.exists() and step else []
    if path.exists():
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
    return [DamagedSample(DamageKind(r["kind"]), r["shard"], r["row"], r["message"]) for r in kept]
