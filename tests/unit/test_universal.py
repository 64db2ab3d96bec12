"""Which checkpoints another number of ranks may continue, and how they are converted for it.

No code in a file runs, what goes wrong is named, nothing is left behind.
"""

import errno
import glob
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmd2v.errors import UserError
from mmd2v.train.checkpoints import resharding, universal
from mmd2v.train.checkpoints.folders import TEMPORARY
from mmd2v.train.checkpoints.loading import _DAMAGE, check_same_run
from mmd2v.train.checkpoints.manifest import Manifest
from mmd2v.train.checkpoints.plain_paths import plain_path
from mmd2v.train.checkpoints.reading import plain_values_only
from mmd2v.train.checkpoints.resharding import needs_conversion
from mmd2v.train.checkpoints.storage import storage

NAME = "step-000020"
FOUND = Manifest(
    format=1,
    step=20,
    sample_index=320,
    batch_size=16,
    world_size=2,
    zero_stage=1,
    precision="fp32",
    optimizer="AdamW",
    model={"width": 32},
    objectives=[{"kind": "contrastive"}],
    parameters={"norm.weight": [[32], 0]},
)


def test_another_number_of_ranks_and_the_other_of_two_stages_are_no_other_run():
    for change in ({"world_size": 1}, {"world_size": 8, "zero_stage": 2}):
        check_same_run(Path("step"), FOUND, replace(FOUND, **change))
    for stage in (0, 3):
        with pytest.raises(UserError, match=f"engine.zero_stage: checkpoint 1, this run {stage}"):
            check_same_run(Path("step"), FOUND, replace(FOUND, zero_stage=stage))
    with pytest.raises(UserError, match=r"engine.batch_size: checkpoint 16, this run 32"):
        check_same_run(Path("step"), FOUND, replace(FOUND, world_size=4, batch_size=32))


@pytest.mark.parametrize(
    ("ranks", "stages", "expected"),
    [
        ((2, 2), (1, 1), False),
        ((2, 1), (0, 0), False),
        ((2, 1), (1, 1), True),
        ((1, 2), (3, 3), True),
        ((2, 2), (1, 2), True),
    ],
)
def test_only_files_that_are_cut_into_other_pieces_are_converted(ranks, stages, expected):
    found, present = (replace(FOUND, world_size=ranks[i], zero_stage=stages[i]) for i in (0, 1))
    assert needs_conversion(found, present) == expected


def test_what_a_killed_conversion_left_is_nothing_that_counts():
    assert TEMPORARY.fullmatch(f".{NAME}.universal.tmp")  # the next checkpoint removes what has such a name


def test_a_path_without_characters_of_patterns(tmp_path):
    for name, kept in (("lr-0.1_a", True), ("lr[1]", False), ("a+b (c)", False)):
        folder = tmp_path / name / NAME
        folder.mkdir(parents=True)
        (folder / "file").touch()
        with plain_path(folder) as plain:
            assert (plain == folder) == kept
            assert glob.glob(str(plain / "f*")) and re.match(f"{plain}/file", str(plain / "file"))
        assert (folder / "file").exists() and plain.exists() == kept


@pytest.fixture
def engine(tmp_path) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(run_dir=str(tmp_path / "run")), module=nn.Linear(2, 2))


def _left(engine: SimpleNamespace) -> list[Path]:
    return list((Path(engine.config.run_dir) / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["plain", "run[1]"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, engine, name):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    checkpoint = tmp_path / name / NAME
    checkpoint.mkdir(parents=True)
    torch.save({"optimizer_state_dict": Trap()}, checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(_DAMAGE, match="Unsupported global"):
        resharding.load_resharded(engine, checkpoint, NAME)
    assert not (tmp_path / "ran").exists()
    assert not _left(engine)


def test_reading_within_a_reading_takes_nothing_away(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    file = tmp_path / "state.pt"
    torch.save({"loss_scaler": LossScaler(1.0)}, file)
    with plain_values_only():
        for _ in range(2):
            assert storage().load(str(file))["loss_scaler"].cur_scale == 1.0
            assert torch.load(file, weights_only=False)["loss_scaler"].cur_scale == 1.0
    assert LossScaler not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed"), "the disk is full"),
    ],
)
def test_a_disk_that_refuses_the_conversion_is_named(tmp_path, engine, monkeypatch, error, message):
    def full(checkpoint: Path, target: Path, module: nn.Module) -> None:
        (target / "half").touch()
        raise error

    monkeypatch.setattr(universal, "convert", full)
    with pytest.raises(UserError, match=f"cannot write the universal form of .*/{NAME}: {message}"):
        resharding.load_resharded(engine, tmp_path / NAME, NAME)
    assert not _left(engine)


def test_a_checkpoint_without_files_is_no_fault_of_the_disk(tmp_path, engine):
    (tmp_path / NAME).mkdir()
    with pytest.raises(FileNotFoundError, match="optim_states"):
        resharding.load_resharded(engine, tmp_path / NAME, NAME)
    assert not _left(engine)
