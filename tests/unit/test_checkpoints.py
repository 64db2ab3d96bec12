"""Which checkpoint a run starts from, and whether it is of that run. No engine is needed for either."""

import copy
import json
import os
import re
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from run_checkpoints import FOUND, write_checkpoint
from small import small_config

from mmd2v.errors import UserError
from mmd2v.train.checkpoints.choosing import choose_checkpoint
from mmd2v.train.checkpoints.folders import complete_checkpoints, find_checkpoint, restore_replaced, set_aside_after
from mmd2v.train.checkpoints.loading import check_same_run
from mmd2v.train.checkpoints.manifest import MANIFEST, read_manifest


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


# ------------------------------------------------------------------------------------------ going back


def test_later_checkpoints_are_set_aside(tmp_path):
    for step in (40, 90, 100):
        _checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / "abandoned-step-000100").mkdir()  # of an earlier time
    assert "abandoned-step-000090, abandoned-step-000100" in set_aside_after(tmp_path, 40)
    assert [step for step, _ in complete_checkpoints(tmp_path / "checkpoints")] == [40]
    assert read_manifest(tmp_path / "checkpoints" / "abandoned-step-000100").step == 100
    assert set_aside_after(tmp_path, 40) is None and set_aside_after(tmp_path / "absent", 0) is None


def test_what_was_replaced_is_removed(tmp_path):
    new = _checkpoint(tmp_path, 20)
    (tmp_path / "checkpoints" / ".step-000020.old.tmp").mkdir()
    restore_replaced(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == [new]
    restore_replaced(tmp_path / "absent")


# ------------------------------------------------------------------------ the newest that is whole


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _break_manifest(path: Path) -> None:
    (path.parent / MANIFEST).write_text('{"format": 1,')


MODEL_STATES = "mp_rank_00_model_states.pt"
DAMAGES = {
    "is not what was written": _flip_a_bit,
    "bytes instead of": _cut,
    f"{MODEL_STATES} is missing": Path.unlink,
    f"{MANIFEST}: cannot be read": _break_manifest,
}


@pytest.mark.parametrize("why", DAMAGES)
def test_damaged_checkpoints_are_set_aside_for_the_newest_whole_one(tmp_path, why):
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step)
    for step in (20, 30):
        DAMAGES[why](tmp_path / "checkpoints" / f"step-{step:06d}" / MODEL_STATES)
    choice = choose_checkpoint(tmp_path, "auto")
    assert choice.path == tmp_path / "checkpoints" / "step-000010"
    assert len(choice.said) == 2
    for line, step in zip(choice.said, (30, 20), strict=True):
        assert f"step-{step:06d} is damaged (" in line and why in line
        assert f"set aside as damaged-step-{step:06d}, the run goes on from step-000010" in line
    assert _names(tmp_path) == ["damaged-step-000020", "damaged-step-000030", "step-000010"]
    assert choose_checkpoint(tmp_path, "auto").said == []


def test_run_without_a_whole_checkpoint_is_refused_and_left_as_it_is(tmp_path):
    for step, damage in ((10, _cut), (20, _flip_a_bit)):
        damage(write_checkpoint(tmp_path, step) / MODEL_STATES)
    with pytest.raises(UserError) as error:
        choose_checkpoint(tmp_path, "auto")
    assert f"step-000010: {MODEL_STATES} has" in str(error.value)
    assert f"step-000020: {MODEL_STATES} is not what was written" in str(error.value)
    assert _names(tmp_path) == ["step-000010", "step-000020"]


def test_named_checkpoint_that_is_damaged_is_refused_and_left_as_it_is(tmp_path):
    write_checkpoint(tmp_path, 10)
    path = write_checkpoint(tmp_path, 20)
    _flip_a_bit(path / MODEL_STATES)
    for named in (path, tmp_path):
        with pytest.raises(UserError, match=r"step-000020: the checkpoint is damaged: .*another SHA-256"):
            choose_checkpoint(tmp_path / "other", str(named))
    assert _names(tmp_path) == ["step-000010", "step-000020"]


def test_hashes_can_be_left_out_and_sizes_are_looked_at_all_the_same(tmp_path):
    path = write_checkpoint(tmp_path, 10) / MODEL_STATES
    _flip_a_bit(path)
    assert choose_checkpoint(tmp_path, "auto", verify_hashes=False).said == []
    _cut(path)
    with pytest.raises(UserError, match="bytes instead of"):
        choose_checkpoint(tmp_path, "auto", verify_hashes=False)


def test_manifest_of_another_step_or_with_other_names(tmp_path):
    path = write_checkpoint(tmp_path, 10)
    manifest = read_manifest(path)
    for changes, message in (
        ({"step": 11}, "is of step 11"),
        ({"files": {"../step-000010/" + MODEL_STATES: [1, "a"]}}, "is not a name of a file"),
        ({"files": {MODEL_STATES: "many"}}, "is not a name of a file with its size and hash"),
        ({"files": {}}, "lists no files"),
    ):
        (path / MANIFEST).write_text(json.dumps(asdict(replace(manifest, **changes))))
        with pytest.raises(UserError, match=message):
            choose_checkpoint(tmp_path, "auto")


def test_checkpoints_of_a_version_that_recorded_no_files(tmp_path):
    path = _checkpoint(tmp_path, 20)
    with pytest.raises(UserError, match="model states are missing, it has 0 files of optimiser states instead of 2"):
        choose_checkpoint(tmp_path, "auto")
    for name in (MODEL_STATES, *(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2))):
        (path / name).write_bytes(b"weights")
    assert choose_checkpoint(tmp_path, "auto").path == path
    (path / MODEL_STATES).write_bytes(b"")
    with pytest.raises(UserError, match=f"{MODEL_STATES} is empty"):
        choose_checkpoint(tmp_path, "auto")


def test_nothing_to_choose(tmp_path):
    assert choose_checkpoint(tmp_path, "auto").path is None and choose_checkpoint(tmp_path, None).path is None


def test_a_clock_that_jumps_changes_neither_order_nor_choice(tmp_path, monkeypatch):
    now = time.time()
    for step, years in ((10, 0), (20, -5), (30, -10)):  # every checkpoint older than the one before it
        jumped = now + years * 365 * 86400
        monkeypatch.setattr(time, "time", lambda jumped=jumped: jumped)
        path = write_checkpoint(tmp_path, step, keep=2)
        for file in (path, *path.iterdir()):
            os.utime(file, (jumped, jumped))
    assert _names(tmp_path) == ["step-000020", "step-000030"]
    assert choose_checkpoint(tmp_path, "auto").path == path
    _cut(path / MODEL_STATES)
    assert choose_checkpoint(tmp_path, "auto").path == tmp_path / "checkpoints" / "step-000020"
