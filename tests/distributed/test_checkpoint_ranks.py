"""Checkpoints that two ranks write beside their training."""

import threading
from pathlib import Path

import torch
from harness import run_distributed_test
from small import StubTokenizer, random_batch, small_config


def _save_while_training(folder: Path) -> list[str]:
    """Save, train on while nothing is written yet, finish; then let one rank fail."""
    from mmd2v.data.stream import TrainFacts
    from mmd2v.distributed.environment import initialize
    from mmd2v.errors import UserError
    from mmd2v.models.student import build_student
    from mmd2v.objectives import build_objectives
    from mmd2v.train.checkpoints.manifest import describe
    from mmd2v.train.checkpoints.saving import Checkpointer
    from mmd2v.train.checkpoints.writer import CheckpointWriter
    from mmd2v.train.engine import build_engine
    from mmd2v.train.module import TrainModule

    world = initialize("cpu")
    gate, write = threading.Event(), CheckpointWriter._write

    def gated(self: CheckpointWriter, name: str, value: object) -> None:
        gate.wait(600)
        if self.folder.name == ".step-000002.tmp" and world.rank == 1:
            raise OSError(28, "No space left on device")
        write(self, name, value)

    CheckpointWriter._write = gated  # type: ignore[method-assign] - a process of this test's own
    config = small_config(engine__zero_stage=2, engine__precision="fp32", optimizer__lr=0.01)
    student = build_student(config, StubTokenizer())
    engine = build_engine(config, world, TrainModule(student, build_objectives(config, student, {}), False))

    def step(seed: int) -> None:
        losses = engine.forward(random_batch(2, seed=2 * seed + world.rank), {})
        engine.backward(losses["loss"])
        engine.step()

    def manifest(step: int):
        return describe(engine, config, world, step, 4, TrainFacts(4, "layout"))

    checkpointer = Checkpointer(folder, config.checkpoint, world)
    step(0)
    if world.is_main:
        torch.save({name: value.clone() for name, value in student.state_dict().items()}, folder / "expected.pt")
    checkpointer.save(engine, manifest(1))
    assert checkpointer.busy
    step(1)
    gate.set()
    checkpointer.finish()
    assert checkpointer.newest == folder / "checkpoints" / "step-000001"

    said = []
    checkpointer.save(engine, manifest(2))
    step(2)
    try:
        checkpointer.finish()
    except UserError as error:
        said.append(str(error))
    said += sorted(path.name for path in (folder / "checkpoints").iterdir())
    return said


def test_two_ranks(tmp_path):
    from mmd2v.train.checkpoints.checksums import verify
    from mmd2v.train.checkpoints.choosing import choose_checkpoint
    from mmd2v.train.checkpoints.manifest import read_manifest
    from mmd2v.train.consolidate import consolidate

    said = run_distributed_test(_save_while_training, 2, args=(tmp_path,))
    # One rank's error is raised on both, and nothing of that checkpoint is left.
    path = tmp_path / "checkpoints" / "step-000001"
    for message, *left in said:
        assert "(rank 1: the disk is full or a quota is reached (No space left on device))" in message
        assert f"the newest checkpoint is still {path}" in message
        assert left == ["step-000001"]
    # The one before is whole, with files of both ranks, and of the step at which it was saved.
    assert choose_checkpoint(tmp_path, "auto").path == path
    manifest = read_manifest(path)
    assert len([name for name in manifest.files if name.endswith("_optim_states.pt")]) == 2
    assert {file.name for file in path.iterdir()} == {*manifest.files, "mmd2v.json"} and verify(path, manifest) == []
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    found = consolidate(path)
    for name, value in expected.items():
        assert torch.equal(found[f"student.{name}"], value.float()), name
