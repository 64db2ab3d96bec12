"""Two ranks train as one does at every ZeRO stage, and hold the share of bytes that the stage promises."""

from pathlib import Path

import pytest
import torch
from harness import run_distributed_test
from training_runs import make_data, run_config

STAGES = (0, 1, 2, 3)
STEPS = 3


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
    from mmd2v.distributed.collectives import world_size
    from mmd2v.distributed.environment import World
    from mmd2v.train.loop import Run
    from mmd2v.train.metrics import read_metrics

    results = []
    rank = torch.distributed.get_rank()
    world = World(rank, world_size(), rank, torch.device("cpu"), "gloo")
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
        )
        run = Run(config, world, None)
        run.train()
        run.reporter.close()
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


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> list[dict]:
    return run_distributed_test(_train, 1, args=(data, tmp_path_factory.mktemp("alone")), timeout=500)[0]


@pytest.fixture(scope="module")
def pair(data, tmp_path_factory) -> list[list[dict]]:
    return run_distributed_test(_train, 2, args=(data, tmp_path_factory.mktemp("pair")), timeout=500)


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
    for rank in pair:
        for stage in STAGES:
            halved = 0.5 if stage >= 1 else 1.0
            # DeepSpeed pads partitions to equal, aligned sizes.
            assert rank[stage]["optimizer"] / alone[0]["optimizer"] == pytest.approx(halved, rel=0.02)
            halved = 0.5 if stage == 3 else 1.0
            assert rank[stage]["parameters"] / alone[0]["parameters"] == pytest.approx(halved, rel=0.02)
