"""Which checkpoint a run starts from, and whether it is of that run. No engine is needed for either."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mmd2v.errors import UserError
from mmd2v.train.checkpoint import (
    MANIFEST,
    Manifest,
    check_same_run,
    complete_checkpoints,
    find_checkpoint,
    read_manifest,
)

FOUND = Manifest(
    format=1,
    step=4,
    sample_index=64,
    batch_size=16,
    world_size=2,
    zero_stage=1,
    precision="fp32",
    optimizer="AdamW",
    model={"width": 32, "layers": [{"kind": "separate", "count": 1}]},
    objectives=[{"kind": "contrastive"}],
    parameters={"norm.weight": [[32], 0], "layers.0.fc1.weight": [[128, 32], None]},
)


def _checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps(asdict(replace(FOUND, step=step))))
    return folder


def test_only_complete_checkpoints_count_oldest_first(tmp_path):
    paths = [_checkpoint(tmp_path, step) for step in (1000000, 20, 100)]
    (tmp_path / "checkpoints" / "step-000200").mkdir()  # without manifest
    (tmp_path / "checkpoints" / ".step-000300.tmp").mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert complete_checkpoints(tmp_path / "checkpoints") == [(20, paths[1]), (100, paths[2]), (1000000, paths[0])]
    assert find_checkpoint(tmp_path, "auto") == paths[0]


def test_new_run_needs_a_folder_without_checkpoints(tmp_path):
    assert find_checkpoint(tmp_path, None) is None
    assert find_checkpoint(tmp_path / "absent", "auto") is None
    _checkpoint(tmp_path, 20)
    with pytest.raises(UserError, match="already holds a run with a checkpoint at step 20; continue it with --resume"):
        find_checkpoint(tmp_path, None)


def test_resume_takes_a_checkpoint_a_folder_of_them_or_a_run(tmp_path):
    _checkpoint(tmp_path / "old", 20)
    newest = _checkpoint(tmp_path / "old", 30)
    for path in (newest, newest.parent, tmp_path / "old"):
        assert find_checkpoint(tmp_path / "new", str(path)) == newest


def test_resume_from_nothing(tmp_path):
    (tmp_path / "run7").mkdir()
    with pytest.raises(UserError, match=r"--resume: folder '.*run8' does not exist. Did you mean 'run7'\?"):
        find_checkpoint(tmp_path, str(tmp_path / "run8"))
    with pytest.raises(UserError, match=r"--resume: '.*run7' is no checkpoint and holds none"):
        find_checkpoint(tmp_path, str(tmp_path / "run7"))


def test_manifest_that_cannot_be_used(tmp_path):
    folder = _checkpoint(tmp_path, 20)
    assert read_manifest(folder) == replace(FOUND, step=20)
    for text, message in (("{", "cannot be read"), ('{"format": 9}', "format 9"), ('{"format": 1}', "not a manifest")):
        (folder / MANIFEST).write_text(text)
        with pytest.raises(UserError, match=message):
            read_manifest(folder)


def test_same_run_passes_at_another_step():
    check_same_run(Path("step"), FOUND, replace(FOUND, step=0, sample_index=0))


def test_every_difference_is_listed():
    other = replace(
        FOUND,
        world_size=1,
        zero_stage=2,
        model={"width": 64, "layers": [{"kind": "separate", "count": 2}]},
        parameters={"norm.weight": [[64], 0], "layers.0.fc1.weight": [[128, 32], 1], "layers.1.fc1.weight": [[256], 0]},
    )
    with pytest.raises(UserError) as error:
        check_same_run(Path("step"), FOUND, other)
    for line in (
        "ranks: checkpoint 2, this run 1",
        "engine.zero_stage: checkpoint 1, this run 2",
        "model.width: checkpoint 32, this run 64",
        "model.layers.0.count: checkpoint 1, this run 2",
        "parameter norm.weight: checkpoint [32] in optimiser group 0, this run [64] in optimiser group 0",
        "parameter layers.0.fc1.weight: checkpoint [128, 32] frozen, this run [128, 32] in optimiser group 1",
        "parameter layers.1.fc1.weight: checkpoint has none, this run [256] in optimiser group 0",
    ):
        assert line in str(error.value)


def test_settings_that_change_no_parameter_do_not_matter():
    check_same_run(Path("step"), FOUND, replace(FOUND, model={**FOUND.model, "dropout": 0.5}))
