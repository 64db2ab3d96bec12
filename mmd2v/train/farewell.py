"""What a run that ends before its last step says to who continues it."""

from __future__ import annotations

from pathlib import Path

from mmd2v.distributed.preemption import REQUEUE_STATUS, Preempted, signal_name


def preempted(stop: int, did: str) -> Preempted:
    """Return the answer to a signal, ``stop``; ``did`` says what was done about it."""
    return Preempted(
        f"{signal_name(stop)}: {did}; exit status {REQUEUE_STATUS} asks the scheduler to queue the run again; "
        "continue with --resume auto"
    )


def interrupted(step: int, steps: int, newest: Path | None) -> str:
    """Return what a person who pressed Ctrl-C should know."""
    kept = f"the last checkpoint is {newest}; continue with --resume auto" if newest else "there is no checkpoint"
    return f"interrupted after step {step} of {steps}; {kept}"
