"""Stages trained one after another: each trains, exports, and is not repeated once it is finished."""

from __future__ import annotations

import gc
import json
from pathlib import Path

from mmd2v.config.pipeline import Stage, config_digest
from mmd2v.distributed import environment
from mmd2v.distributed.collectives import barrier
from mmd2v.distributed.coordination import from_main_rank
from mmd2v.errors import UserError
from mmd2v.export import export
from mmd2v.files import write_json
from mmd2v.models.exported import CONFIG_FILE
from mmd2v.train.checkpoints.folders import AUTO, find_checkpoint, restore_replaced
from mmd2v.train.dry_run import dry_run
from mmd2v.train.loop import train

RECORD = "stage.json"
_DIGEST = "config_sha256"


def run_pipeline(stages: list[Stage]) -> None:
    """Train and export every stage that is not finished; every rank of a launcher calls this.

    An interrupted stage goes on from its newest checkpoint. Raises UserError for what a stage's run refuses, and for a
    stage whose config has changed since it was started.
    """
    exports: dict[str, str] = {}
    for stage in stages:
        config = stage.load(exports)
        world = environment.initialize(config.engine.device)
        if from_main_rank(lambda stage=stage, config=config: _begin(stage, config_digest(config))):
            if world.is_main:
                print(f"stage {stage.name}: {config.run_dir}", flush=True)
            train(config, resume=AUTO)
            gc.collect()  # DeepSpeed's engines hold themselves in circles
            from_main_rank(lambda stage=stage: _finish(stage))
        elif world.is_main:
            print(f"stage {stage.name}: finished before, {stage.export}", flush=True)
        barrier()
        exports[stage.variable] = str(stage.export)


def dry_run_pipeline(stages: list[Stage]) -> None:
    """Dry-run the stages whose sources are there; name the others."""
    exports: dict[str, str] = {}
    waiting: list[str] = []
    for stage in stages:
        config = stage.load(exports)
        missing = [name for name in waiting if name in config.model_dump_json()]
        if missing:
            print(f"stage {stage.name}: cannot be built before {', '.join(missing)} is there")
        else:
            print(f"stage {stage.name}")
            dry_run(config)
        if not (stage.export / CONFIG_FILE).is_file():
            waiting.append(str(stage.export))
        exports[stage.variable] = str(stage.export)


def _begin(stage: Stage, digest: str) -> bool:
    """Tell whether the stage has still to be trained; note the config (its ``digest``) of one without weights so far.

    Raises UserError when it has weights, exported or in a checkpoint, of another config.
    """
    record = stage.run_dir / RECORD
    finished = (stage.export / CONFIG_FILE).is_file()
    restore_replaced(stage.run_dir)  # a checkpoint that a killed run left aside is one
    if not finished and find_checkpoint(stage.run_dir, AUTO) is None:
        write_json(record, {_DIGEST: digest})  # before the first checkpoint, which then always has one
    elif _read(record).get(_DIGEST) != digest:
        raise UserError(
            f"stage {stage.name}: {stage.export if finished else stage.run_dir} was made with another config than it "
            f"has now; remove {stage.run_dir} to train it again, or give the pipeline another run_dir"
        )
    return not finished


def _finish(stage: Stage) -> None:
    export(stage.run_dir, stage.export)
    print(f"stage {stage.name}: exported to {stage.export}", flush=True)


def _read(path: Path) -> dict[str, str]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
