"""Export of a run trained on two ranks at every ZeRO stage: the weights of the training model, to the bit."""

from pathlib import Path

import pytest
import torch
from harness import run_distributed_test
from safetensors.torch import save_file
from small import StubTokenizer, random_batch, small_config

STAGES = (0, 1, 2, 3)
CHECKPOINT = Path("checkpoints") / "step-000001"


def stage_config(folder: Path, stage: int):
    """Trainable and frozen parameters, and batch statistics: buffers that training moves."""
    image = {"kind": "timm", "name": "test_resnet", "weights": str(folder / "backbone.safetensors")}
    return small_config(
        model__encoders={"image": image, "text": {"kind": "tokens"}},
        model__freeze=["encoders.text.embedding.weight", "layers.1.*"],
        engine__zero_stage=stage,
        engine__zero3_persistence_threshold=0,
        engine__precision="fp32",
        optimizer__lr=0.01,
    )


def train_one_step(folder: Path) -> None:
    """What each rank does: a step at every stage, a checkpoint, the embeddings of the model in memory."""
    from mmd2v.config.load import dump_config
    from mmd2v.data.stream import TrainFacts
    from mmd2v.distributed.environment import initialize
    from mmd2v.models.student import build_student
    from mmd2v.objectives import build_objectives
    from mmd2v.train.checkpoints.manifest import describe
    from mmd2v.train.checkpoints.saving import Checkpointer
    from mmd2v.train.engine import build_engine
    from mmd2v.train.module import TrainModule

    world = initialize("cpu")
    for stage in STAGES:
        config = stage_config(folder, stage)
        student = build_student(config, StubTokenizer())
        engine = build_engine(config, world, TrainModule(student, build_objectives(config, student, {}), False))
        losses = engine.forward(random_batch(2, seed=world.rank), {})
        engine.backward(losses["loss"])
        engine.step()
        run = folder / str(stage)
        checkpointer = Checkpointer(run, config.checkpoint, world)
        checkpointer.save(engine, describe(engine, config, world, 1, 4, TrainFacts(4, "layout")))
        checkpointer.finish()
        student.eval()
        with torch.no_grad():
            embedding = student(random_batch(4, seed=9)).embedding
        if world.is_main:
            (run / "config.yaml").write_text(dump_config(config))
            torch.save(embedding, run / "expected.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    import timm

    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), folder / "backbone.safetensors")
    run_distributed_test(train_one_step, 2, args=(folder,))
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_consolidated_weights_give_the_embeddings_of_the_training_model(runs, stage):
    from mmd2v.models.student import build_student
    from mmd2v.models.timm_backbone import load_exactly
    from mmd2v.train.consolidate import consolidate

    state = consolidate(runs / str(stage) / CHECKPOINT)
    assert all(v.dtype == torch.float32 or not v.is_floating_point() for v in state.values())
    student = build_student(stage_config(runs, stage), StubTokenizer(), pretrained=False)
    weights = {name.removeprefix("student."): v for name, v in state.items() if name.startswith("student.")}
    load_exactly(student, weights, "test")
    student.eval()
    with torch.no_grad():
        found = student(random_batch(4, seed=9)).embedding
    expected = torch.load(runs / str(stage) / "expected.pt", weights_only=True)
    for modality in ("image", "text"):
        assert (found[modality] - expected[modality]).abs().max() <= 1e-6


def test_damaged_checkpoints_are_refused_with_a_reason(runs, tmp_path):
    import shutil

    from mmd2v.errors import UserError
    from mmd2v.train.consolidate import consolidate

    with pytest.raises(UserError, match="found 0"):
        consolidate(tmp_path)
    for stage, name, message in (
        (2, "zero_pp_rank_1_mp_rank_00_optim_states.pt", r"Expected 2 of '\*_optim_states.pt'"),
        (0, None, "incomplete or damaged"),
    ):
        copy = tmp_path / str(stage) / "step-000001"
        shutil.copytree(runs / str(stage) / CHECKPOINT, copy)
        if name is not None:
            (copy / name).unlink()
        else:
            file = copy / "mp_rank_00_model_states.pt"
            file.write_bytes(file.read_bytes()[:5000])
        with pytest.raises(UserError, match=message):
            consolidate(copy)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    from mmd2v.errors import UserError
    from mmd2v.train.consolidate import consolidate

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"module": Trap()}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="damaged"):
        consolidate(tmp_path)
    assert not (tmp_path / "ran").exists()
