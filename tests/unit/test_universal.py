"""Conversion to a universal checkpoint: no code in a file runs, what goes wrong is named, nothing is left behind."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmd2v.errors import UserError
from mmd2v.train.checkpoints import resharding, universal
from mmd2v.train.checkpoints.loading import _DAMAGE
from mmd2v.train.checkpoints.reading import plain_values_only
from mmd2v.train.checkpoints.storage import storage

NAME = "step-000020"


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
