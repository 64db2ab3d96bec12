"""Image–text matching inside the engine: two ranks, weights and optimiser sharded, the same losses at every stage."""

from pathlib import Path

import pytest
from harness import run_distributed_test
from training_runs import make_data, run_config

from mmd2v.distributed.collectives import rank
from mmd2v.train.loop import train
from mmd2v.train.metrics import read_metrics

STAGES = (1, 3)
STEPS = 3


def _train(data: Path, folder: Path) -> list[list[dict[str, float]]]:
    results = []
    for stage in STAGES:
        config = run_config(
            folder / f"stage{stage}.yaml",
            data,
            steps=STEPS,
            data__captions_per_image=2,
            model__layers=[{"kind": "separate"}, {"kind": "mome", "joint_expert": True}, {"kind": "shared"}],
            model__joint_from=1,
            objectives=[{"kind": "contrastive"}, {"kind": "matching"}],
            engine__zero_stage=stage,
            engine__zero3_persistence_threshold=0,
        )
        train(config)
        if rank() == 0:
            records = [r for r in read_metrics(Path(config.run_dir) / "metrics.jsonl") if "loss" in r]
            followed = ("loss", "matching", "gradient_norm")
            results.append([{k: v for k, v in r.items() if k.startswith(followed)} for r in records])
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[list[dict[str, float]]]:
    data = make_data(tmp_path_factory.mktemp("data"))
    return run_distributed_test(_train, 2, args=(data, tmp_path_factory.mktemp("runs")))[0]


@pytest.mark.parametrize("stage", STAGES)
def test_every_zero_stage_takes_the_same_steps(results, stage):
    first, found = results[0], results[STAGES.index(stage)]
    assert len(found) == STEPS
    for one, other in zip(first, map(dict, found), strict=True):
        assert {"loss/contrastive_loss", "loss/matching_loss", "matching_accuracy", "gradient_norm"} <= set(other)
        assert 0 <= other["matching_accuracy"] <= 1
        # AdamW moves a weight whose gradient is rounding alone by a whole step, which later norms show first.
        assert other.pop("gradient_norm") == pytest.approx(one["gradient_norm"], rel=1e-3)
        # Another draw on either rank would change the loss of the pairs.
        assert other == pytest.approx({name: one[name] for name in other}, abs=1e-5)
    assert found[0]["loss/matching_loss"] != found[1]["loss/matching_loss"]
