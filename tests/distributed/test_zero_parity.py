"""Two ranks train as one does at every ZeRO stage, hold the share of bytes that the stage promises, and resume."""

import shutil
from pathlib import Path

import pytest
import torch
from harness import run_distributed_test
from training_runs import make_data, run_config, run_of

from mmd2v.distributed.collectives import barrier, rank, world_size
from mmd2v.distributed.environment import World
from mmd2v.train.loop import train
from mmd2v.train.metrics import read_metrics

STAGES = (0, 1, 2, 3)
STEPS = 3
RESUMED = [*((stage, "fp32") for stage in STAGES), (0, "bf16"), (1, "bf16_autocast"), (3, "bf16")]


def _optimizer_bytes(engine) -> int:
    states = engine.deepspeed.optimizer
    inner = getattr(states, "optimizer", states)
    tensors = [t for state in inner.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors if t.dim())


def _parameter_bytes(engine) -> int:
    whole = sum(p.data.numel() * p.element_size() for p in engine.module.parameters())
    shards = [p.ds_tensor for p in engine.module.parameters() if hasattr(p, "ds_tensor")]
    return whole + sum(t.numel() * t.element_size() for t in shards)


def _train(data: Path, folder: Path) -> list[dict]:
    results = []
    world = World(rank(), world_size(), rank(), torch.device("cpu"), "gloo")
    for stage in STAGES:
        name = f"world{world.size}-stage{stage}"
        config = run_config(
            folder / f"{name}.yaml",
            data,
            steps=STEPS,
            engine__zero_stage=stage,
            engine__zero3_persistence_threshold=0,
            data__eval={"shards": str(data / "test")},
            evaluation__every=2,
            optimizer__lr=5e-4,
        )
        with run_of(config, world) as run:
            run.train()
        records = read_metrics(run.run_dir / "metrics.jsonl")
        results.append(
            {
                "losses": [{k: v for k, v in r.items() if k.startswith("loss")} for r in records if "loss" in r],
                "recall": [r["evaluation/i2t_R@5"] for r in records if "evaluation/i2t_R@5" in r],
                "optimizer": _optimizer_bytes(run.engine),
                "parameters": _parameter_bytes(run.engine),
            }
        )
    return results


def _accumulate(data: Path, folder: Path) -> list[list[float]]:
    """Losses with 1, 2 and 4 micro-batches a step; no contrastive loss, whose negatives are those of a micro-batch."""
    losses = []
    for micro in (8, 4, 2):
        config = run_config(
            folder / f"micro{micro}.yaml",
            data,
            steps=STEPS,
            objectives=[{"kind": "cls_regression", "teacher": "resnet"}],
            engine__micro_batch_size=micro,
        )
        train(config)
        losses.append([r["loss"] for r in read_metrics(Path(config.run_dir) / "metrics.jsonl") if "loss" in r])
    return losses


def _resume(data: Path, folder: Path) -> list[tuple[dict, dict]]:
    """Losses of steps 3 and 4, uninterrupted and after a resume at step 2."""
    results = []
    for stage, precision in RESUMED:
        config = run_config(
            folder / f"resume-stage{stage}-{precision}.yaml",
            data,
            steps=4,
            checkpoint__every=2,
            model__freeze=["encoders.text.*"],
            model__layers=[{"kind": "separate", "drop_path": 0.3}, {"kind": "shared", "dropout": 0.1}],
            optimizer__groups=[{"match": "layers.*.text.*", "lr_multiplier": 0.5}],
            engine__zero_stage=stage,
            engine__precision=precision,
            engine__micro_batch_size=2,
        )
        run_dir = Path(config.run_dir)
        losses = []
        for resume in (None, "auto"):
            train(config, resume)
            barrier()
            losses.append({r["step"]: r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r})
            barrier()
            if rank() == 0 and resume is None:
                shutil.rmtree(run_dir / "checkpoints" / "step-000004")
            barrier()
        results.append((losses[0], losses[1]))
    return results


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def _alone(data: Path, folder: Path) -> tuple[list[dict], list[list[float]]]:
    return _train(data, folder), _accumulate(data, folder)


@pytest.fixture(scope="module")
def one_rank(data, tmp_path_factory) -> tuple[list[dict], list[list[float]]]:
    return run_distributed_test(_alone, 1, args=(data, tmp_path_factory.mktemp("alone")))[0]


@pytest.fixture(scope="module")
def alone(one_rank) -> list[dict]:
    return one_rank[0]


@pytest.fixture(scope="module")
def pair(data, tmp_path_factory) -> list[list[dict]]:
    return run_distributed_test(_train, 2, args=(data, tmp_path_factory.mktemp("pair")))


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_have_the_losses_of_one(alone, pair, stage):
    for terms in zip(alone[stage]["losses"], pair[0][stage]["losses"], alone[0]["losses"], strict=True):
        one, two, unsharded = terms
        assert set(one) == {
            "loss",
            "loss/contrastive_loss",
            "loss/cls_regression_loss/image",
            "loss/cls_regression_loss/text",
        }
        assert two == pytest.approx(one, abs=1e-5)
        assert one == pytest.approx(unsharded, abs=1e-5)
    assert len(alone[stage]["losses"]) == STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_recall_in_training_is_that_of_one_rank(alone, pair, stage):
    assert len(alone[stage]["recall"]) == 2
    assert pair[0][stage]["recall"] == alone[stage]["recall"]


def test_bytes_of_a_rank_fall_as_zero_promises(alone, pair):
    whole = alone[0]
    for held in pair:
        for stage in STAGES:
            # DeepSpeed pads partitions to equal, aligned sizes.
            optimizer, parameters = (0.5 if stage >= first else 1.0 for first in (1, 3))
            assert held[stage]["optimizer"] / whole["optimizer"] == pytest.approx(optimizer, rel=0.02)
            assert held[stage]["parameters"] / whole["parameters"] == pytest.approx(parameters, rel=0.02)


def test_accumulation_gives_the_step_of_the_whole_batch(one_rank):
    whole, *divided = one_rank[1]
    for losses in divided:
        assert losses == pytest.approx(whole, abs=1e-5)


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory) -> list[tuple[dict, dict]]:
    return run_distributed_test(_resume, 2, args=(data, tmp_path_factory.mktemp("resumed")))[0]


@pytest.mark.parametrize("case", range(len(RESUMED)), ids=[f"stage{s}-{p}" for s, p in RESUMED])
def test_resumed_ranks_repeat_the_losses_exactly(resumed, case):
    whole, continued = resumed[case]
    assert sorted(whole) == [1, 2, 3, 4]
    assert continued == whole
