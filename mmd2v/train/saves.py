"""When a run saves: what the clock asks for, how long it took, and which checkpoint is the best."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from mmd2v.config.training import CheckpointConfig
from mmd2v.distributed.coordination import from_main_rank
from mmd2v.distributed.environment import World
from mmd2v.distributed.vote import Ballot
from mmd2v.train.best import Best, best_of, find_best, write_best
from mmd2v.train.checkpoints.manifest import Manifest
from mmd2v.train.checkpoints.saving import Checkpointer


class Saves:
    """The checkpoints of one run, from the loop's side: every rank must call its methods together.

    Attributes:
        took: seconds of the last save, until they are reported and it is None again.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: CheckpointConfig,
        world: World,
        checkpointer: Checkpointer,
        step: int | None,
        *,
        pause: Callable[[str], AbstractContextManager[None]],
        say: Callable[[str], None],
    ) -> None:
        """Find the best checkpoint that there is.

        Args:
            run_dir: the run's folder.
            settings: the config's section.
            world: the ranks.
            checkpointer: writes them.
            step: of the checkpoint that the run goes on from, if it does.
            pause: surrounds what is no work of an interval, with its name.
            say: tells the user, from rank 0.
        """
        self._run_dir, self._settings, self._world = run_dir, settings, world
        self._checkpointer, self._pause, self._say = checkpointer, pause, say
        self.took: float | None = None
        self._began = 0.0
        self._best: Best | None = from_main_rank(self._find_best)
        self._better: Best | None = None
        """What the checkpoint that is being written will be as the best one."""
        checkpointer.best = self._best.step if self._best else None
        self.note_last(step)

    def note_last(self, step: int | None) -> None:
        """The last checkpoint is that of ``step``, or there is none; the clock begins anew."""
        self._last = step
        self._due = time.monotonic()
        """When the clock last asked for a checkpoint, or one was begun."""

    def clock_asks(self) -> bool:
        """Whether a checkpoint is due by rank 0's clock; once for each time. The clock is no calendar: it never jumps.

        Other ranks leave the question to rank 0.
        """
        minutes, now = self._settings.minutes, time.monotonic()
        if not self._world.is_main or minutes is None or now - self._due < 60 * minutes:
            return False
        self._due = now
        return True

    def without_the_past(self, ballot: Ballot) -> Ballot:
        """Return a ballot without what it says of saves, if it was cast before the last one began."""
        if self._last is not None and ballot.step <= self._last:
            return replace(ballot, writing=True, due=False)
        return ballot

    def begin(self, better: Best | None, describe: Callable[[], Manifest], write: Callable[[Manifest], object]) -> None:
        """Begin a checkpoint of the present step, the best one if so; `finish` puts it in place.

        ``describe`` raises when the state is not worth keeping; ``write`` gives it to the checkpointer.
        """
        self.finish()
        with self._pause("saving"):
            manifest = describe()
            self._began, self._better = time.monotonic(), better
            write(manifest)
            self.note_last(manifest.step)
        if not self._checkpointer.pending:  # it was written at once
            self._note_saved()

    def finish(self) -> None:
        """Put the last checkpoint in place, if that has not been done; waits for its files."""
        if self._checkpointer.pending:
            with self._pause("saving"):
                self._checkpointer.finish()
            self._note_saved()

    def _note_saved(self) -> None:
        self.took = time.monotonic() - self._began
        if self._better is not None:
            self._new_best(self._better)
            self._better = None

    def better(self, metrics: Mapping[str, float], step: int) -> Best | None:
        """Return what a step with these metrics would be as the best one, if it is better than all before."""
        found = best_of(self._settings.best, metrics, step)
        return found if found is not None and found.beats(self._better or self._best) else None

    def keep_as_best(self, better: Best) -> bool:
        """Make the checkpoint of a step that has been saved the best one; False when there is none."""
        kept = self._checkpointer.keep_as_best(better.step)
        if kept:
            self._new_best(better)
        return kept

    def _new_best(self, best: Best) -> None:
        """Tell of the best checkpoint, now that it is in place."""
        self._best = best
        from_main_rank(lambda: write_best(self._run_dir, best))
        self._say(best.said())

    def _find_best(self) -> Best | None:
        """Return the best of the checkpoints there are; on rank 0 alone."""
        best = find_best(self._settings.best, self._run_dir)
        write_best(self._run_dir, best)
        return best
