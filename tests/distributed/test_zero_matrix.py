"""What a run learns is the same at every ZeRO stage, with accumulation or without, keeping activations or not."""

from itertools import product
from pathlib import Path

import pytest
from harness import run_distributed_test
from training_runs import make_data, run_config

from mmd2v.train.loop import train
from mmd2v.train.metrics import read_metrics

STEPS = 5
BATCH, RANKS = 8, 2
CASES = list(product((0, 1, 2, 3), (1, 4), (False, True)))
"""ZeRO stage, micro-batches a step, activation checkpointing."""


def _train_all(data: Path, folder: Path) -> list[list[float]]:
    """The losses of every case, in one process group."""
    losses = []
    for stage, accumulation, checkpointing in CASES:
        config = run_config(
            folder / f"zero{stage}-{accumulation}-{checkpointing}.yaml",
            data,
            steps=STEPS,
            # No contrastive loss, whose negatives are those of a micro-batch, and no noise but that of a whole step.
            objectives=[{"kind": "cls_regression", "teacher": "resnet"}],
            model__layers=[
                {"kind": "separate"},
                {"kind": "mome", "layer_scale": 0.5, "layer_drop": 0.5},
                {"kind": "shared", "norm": "post"},
            ],
            model__freeze=["layers.0.attention.image.*", "layers.2.mlp.*"],
            model__activation_checkpointing=checkpointing,
            optimizer__lr=1e-3,
            engine__zero_stage=stage,
            engine__zero3_persistence_threshold=0,
            engine__batch_size=BATCH,
            engine__micro_batch_size=BATCH // RANKS // accumulation,
            evaluation__every=None,
        )
        train(config)
        losses.append([r["loss"] for r in read_metrics(Path(config.run_dir) / "metrics.jsonl") if "loss" in r])
    return losses


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[tuple[int, int, bool], list[float]]:
    data = make_data(tmp_path_factory.mktemp("data"))
    found = run_distributed_test(_train_all, RANKS, args=(data, tmp_path_factory.mktemp("matrix")))[0]
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"zero{c[0]}-{c[1]}x-{'recomputed' if c[2] else 'kept'}")
def test_losses_are_those_of_zero_0(losses, case):
    expected = losses[0, 1, False]
    assert len(set(expected)) == STEPS  # it learns
    assert losses[case] == pytest.approx(expected, abs=1e-4)
