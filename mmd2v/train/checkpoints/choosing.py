"""Which checkpoint a run starts from: the newest that is whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mmd2v.errors import UserError
from mmd2v.train.checkpoints.checksums import verify
from mmd2v.train.checkpoints.folders import (
    AUTO,
    complete_checkpoints,
    find_checkpoint,
    set_aside_damaged,
    step_of,
)
from mmd2v.train.checkpoints.manifest import MANIFEST, read_manifest

_SHOWN = 3  # problems of one checkpoint; the first says enough


@dataclass(frozen=True)
class Choice:
    """The checkpoint a run starts from, None for a new run, and what a person should know of how it was chosen."""

    path: Path | None
    said: list[str] = field(default_factory=list)


def choose_checkpoint(run_dir: Path, resume: str | None, verify_hashes: bool = True) -> Choice:
    """Choose the checkpoint to start from; ``resume`` as for `find_checkpoint`. Only one rank may call it.

    With ``"auto"`` checkpoints that are damaged are set aside (renamed ``damaged-step-…``) for the newest that is
    whole. Without ``verify_hashes`` files count as whole when they have the right size. Raises UserError as
    `find_checkpoint` does, when a checkpoint that was named is damaged, and when all are; nothing is renamed then.
    """
    found = find_checkpoint(run_dir, resume)
    if found is None:
        return Choice(None)
    if resume != AUTO:
        if damage := _damage(found, verify_hashes):
            raise UserError(f"{found}: the checkpoint is damaged: {damage}")
        return Choice(found)
    damaged: list[tuple[Path, str]] = []
    for _, path in reversed(complete_checkpoints(run_dir / "checkpoints")):
        damage = _damage(path, verify_hashes)
        if damage is None:
            return Choice(path, [_set_aside(bad, why, path) for bad, why in damaged])
        damaged.append((path, damage))
    raise UserError(
        f"--resume {AUTO}: no checkpoint of '{run_dir}' can be continued from:\n"
        + "".join(f"  {path.name}: {damage}\n" for path, damage in damaged)
        + "start anew in another run_dir, or restore one of them"
    )


def _damage(path: Path, verify_hashes: bool) -> str | None:
    """What is wrong with a checkpoint, None when it is whole."""
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return str(error)
    if step_of(path) not in (None, manifest.step):
        return f"its {MANIFEST} is of step {manifest.step}"
    problems = verify(path, manifest, hashes=verify_hashes)
    more = [f"{len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return ", ".join([*problems[:_SHOWN], *more]) or None


def _set_aside(damaged: Path, why: str, instead: Path) -> str:
    target = set_aside_damaged(damaged)
    return (
        f"warning: {damaged} is damaged ({why}); it is set aside as {target.name}, the run goes on from {instead.name}"
    )
