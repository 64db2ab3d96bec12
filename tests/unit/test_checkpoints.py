"""Which checkpoint a run starts from, and whether it is of that run. No engine is needed for either."""

import copy
import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from small import small_config

from mmd2v.distributed.environment import World
from mmd2v.errors import UserError
from mmd2v.train.checkpoints.folders import complete_checkpoints, find_checkpoint, restore_replaced, set_aside_after
from mmd2v.train.checkpoints.loading import check_same_run
from mmd2v.train.checkpoints.manifest import MANIFEST, Manifest, read_manifest
from mmd2v.train.checkpoints.saving import Checkpointer

ALONE = World(0, 1, 0, torch.device("cpu"), "gloo")
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
    stream={"seed": 3, "data.train (images)": 48, "data.tokenizer.kind": "hf"},
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
        zero_stage=3,
        model={"width": 64, "layers": [{"kind": "separate", "count": 2}]},
        parameters={"norm.weight": [[64], 0], "layers.0.fc1.weight": [[128, 32], 1], "layers.1.fc1.weight": [[256], 0]},
    )
    with pytest.raises(UserError) as error:
        check_same_run(Path("step"), FOUND, other)
    for line in (
        "engine.zero_stage: checkpoint 1, this run 3 (only 1 and 2 may be exchanged)",
        "model.width: checkpoint 32, this run 64",
        "model.layers.0.count: checkpoint 1, this run 2",
        "parameter norm.weight: checkpoint [32] in optimiser group 0, this run [64] in optimiser group 0",
        "parameter layers.0.fc1.weight: checkpoint [128, 32] frozen, this run [128, 32] in optimiser group 1",
        "parameter layers.1.fc1.weight: checkpoint has none, this run [256] in optimiser group 0",
    ):
        assert line in str(error.value)
    assert "ranks" not in str(error.value)


MODEL = small_config(
    model__encoders={
        "image": {"kind": "timm", "name": "test_resnet", "weights": "old.safetensors"},
        "text": {"kind": "hf", "name": "old/bert"},
    },
).model.model_dump(mode="json")


def _changed(path: str, value: object) -> dict:
    model = copy.deepcopy(MODEL)
    node = model
    *parents, last = path.split(".")
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    assert last in node
    node[last] = value
    return model


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("heads", 4),
        ("final_norm", False),
        ("pooling", {"image": "mean"}),
        ("layers.0.norm", "post"),
        ("layers.1.eps", 1e-5),
        ("layers.1.modalities", ["image"]),
        ("encoders.image.positions", "sincos"),
        ("encoders.image.mean", [0.5, 0.5, 0.5]),
        ("encoders.image.feature", -2),
        ("encoders.image.name", "resnet18"),
        ("projection.kind", "none"),
    ],
)
def test_structure_that_no_shape_shows_is_compared(path, value):
    with pytest.raises(UserError, match=f"model.{path}"):
        check_same_run(Path("step"), replace(FOUND, model=MODEL), replace(FOUND, model=_changed(path, value)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("layers.0.dropout", 0.5),
        ("layers.0.drop_path", 0.5),
        ("layers.0.init", {"image": {"source": "mmd2v:elsewhere"}}),
        ("projection.dropout", 0.5),
        ("encoders.image.token_drop", 0.5),
        ("encoders.image.weights", None),
        ("encoders.text.name", "moved/bert"),
    ],
)
def test_noise_and_places_of_first_weights_may_change(path, value):
    check_same_run(Path("step"), replace(FOUND, model=MODEL), replace(FOUND, model=_changed(path, value)))


def test_other_stream_of_samples_is_refused():
    for key, value in (("seed", 4), ("data.train (images)", 50), ("data.tokenizer.kind", None)):
        with pytest.raises(UserError, match=re.escape(key)):
            check_same_run(Path("step"), FOUND, replace(FOUND, stream={**FOUND.stream, key: value}))
    check_same_run(Path("step"), replace(FOUND, stream=None), FOUND)  # of a version that did not record it


# ---------------------------------------------------------------------------------- going back, kills


def test_later_checkpoints_are_set_aside(tmp_path):
    for step in (40, 90, 100):
        _checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / "abandoned-step-000100").mkdir()  # of an earlier time
    assert "abandoned-step-000090, abandoned-step-000100" in set_aside_after(tmp_path, 40)
    assert [step for step, _ in complete_checkpoints(tmp_path / "checkpoints")] == [40]
    assert read_manifest(tmp_path / "checkpoints" / "abandoned-step-000100").step == 100
    assert set_aside_after(tmp_path, 40) is None and set_aside_after(tmp_path / "absent", 0) is None


def _finish(run: Path, step: int, keep: int) -> None:
    temporary = run / "checkpoints" / f".step-{step:06d}.tmp"
    os.replace(_checkpoint(run / "new", step), temporary)
    Checkpointer(run, keep, ALONE)._finish(temporary, run / "checkpoints" / f"step-{step:06d}")


@pytest.mark.parametrize(("keep", "left"), [(1, [50]), (2, [50, 100]), (3, [50, 90, 100])])
def test_checkpoint_just_written_is_never_pruned(tmp_path, keep, left):
    for step in (40, 90, 100):  # of a run that nobody set aside
        _checkpoint(tmp_path, step)
    _finish(tmp_path, 50, keep)
    assert [step for step, _ in complete_checkpoints(tmp_path / "checkpoints")] == left


def test_kill_while_a_checkpoint_is_replaced_loses_nothing(tmp_path, monkeypatch):
    old = _checkpoint(tmp_path, 20)
    (old / "old").touch()
    rename = os.replace

    def killed_at_the_second(source: Path, target: Path) -> None:
        if Path(target) == old:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr("mmd2v.train.checkpoints.saving.os.replace", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        temporary = tmp_path / "checkpoints" / ".step-000020.tmp"
        temporary.mkdir()
        Checkpointer(tmp_path, 2, ALONE)._finish(temporary, old)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path, "auto") is None
    restore_replaced(tmp_path)
    assert find_checkpoint(tmp_path, "auto") == old and (old / "old").exists()


def test_what_was_replaced_is_removed(tmp_path):
    new = _checkpoint(tmp_path, 20)
    (tmp_path / "checkpoints" / ".step-000020.old.tmp").mkdir()
    restore_replaced(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == [new]
    restore_replaced(tmp_path / "absent")
