"""data2vec pre-training: two ranks train as one does, and an interrupted run goes on as if it had not been."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import run_distributed_test
from safetensors.numpy import load_file
from training_runs import make_data, run_config, run_of

from mmd2v.distributed.collectives import barrier, rank, world_size
from mmd2v.distributed.environment import World
from mmd2v.train.averages import AVERAGES_FILE
from mmd2v.train.loop import train
from mmd2v.train.metrics import read_metrics

STEPS = 4
EMA = {"decay": 0.5, "decay_end": 0.9}


def pretraining(modality: str, **changes) -> dict:
    """Changes to `run_config` for pre-training on one modality."""
    encoders = {
        "image": {"kind": "patch", "patch_size": 4, "positions": "sincos", "norm": True},
        "text": {"kind": "tokens", "norm": True},
    }
    teacher = {"name": f"ema:{modality}", "modality": modality, "precision": "fp32"}
    decoder = {"layers": 2, "groups": 4, "input_dropout": 0.0}
    masking = {"masks": 4, "ratio": 0.6, "block": 2 if modality == "image" else 1}
    return {
        "steps": STEPS,
        "model__encoders": {modality: encoders[modality]},
        "model__layers": [{"kind": "separate", "count": 2, "norm": "post"}],
        "model__masking": {modality: masking},
        "model__projection": {"kind": "none"},
        "model__final_norm": False,
        "model__init_deviation": 0.1,
        "teachers": {"ema": {**teacher, "ema": {**EMA, "encoder": modality == "image"}}},
        "objectives": [{"kind": "data2vec", "teacher": "ema", "modality": modality, "decoder": decoder}],
        "optimizer__lr": 1e-3,
        **changes,
    }


def records(run_dir: str | Path) -> dict[int, dict[str, float]]:
    found = [r for r in read_metrics(Path(run_dir) / "metrics.jsonl") if "loss" in r]
    clock = ("throughput", "time/", "memory")
    return {r["step"]: {k: v for k, v in r.items() if not k.startswith(clock)} for r in found}


CASES = [("image", 1, 8), ("image", 1, 4), ("image", 2, 4), ("image", 3, 4), ("text", 0, 8)]
"""Modality, ZeRO stage, samples of a micro-batch with one rank (half of it with two)."""


def _train(data: Path, folder: Path) -> list[tuple[dict, dict]]:
    world = World(rank(), world_size(), rank(), torch.device("cpu"), "gloo")
    results = []
    for modality, stage, micro in CASES:
        config = run_config(
            folder / f"{modality}-{stage}-{micro}.yaml",
            data,
            **pretraining(modality),
            engine__zero_stage=stage,
            engine__micro_batch_size=micro // world.size,
            engine__zero3_persistence_threshold=0,
        )
        with run_of(config, world) as run:
            run.train()
        # Arrays: a tensor travels as a handle of the process that ends.
        average = {name: value.numpy().copy() for name, value in run.parts.teachers["ema"].average().items()}
        results.append((records(config.run_dir), average))
        barrier()
    return results


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    return run_distributed_test(_train, 1, args=(data, tmp_path_factory.mktemp("alone")))[0]


@pytest.fixture(scope="module")
def pair(data, tmp_path_factory):
    return run_distributed_test(_train, 2, args=(data, tmp_path_factory.mktemp("pair")))


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_two_ranks_pretrain_as_one(alone, pair, case):
    (one, average), (two, first), (_, second) = alone[case], pair[0][case], pair[1][case]
    assert list(one) == list(range(1, STEPS + 1))
    for step, record in one.items():
        losses = {k: v for k, v in record.items() if "loss" in k or k.startswith(("data2vec/", "teachers/"))}
        assert {k: two[step][k] for k in losses} == pytest.approx(losses, abs=1e-5)
    for name, value in average.items():
        assert np.array_equal(first[name], second[name]), name
        np.testing.assert_allclose(first[name], value, rtol=0, atol=1e-4)
    assert [record["teachers/ema/decay"] for record in one.values()] == pytest.approx([0.6, 0.7, 0.8, 0.9])


def test_neither_accumulation_nor_zero_changes_the_run(alone):
    whole = alone[0]
    for case in (1, 2, 3):
        for step, record in alone[case][0].items():
            assert record["loss"] == pytest.approx(whole[0][step]["loss"], abs=1e-5)
        for name, value in whole[1].items():
            np.testing.assert_allclose(alone[case][1][name], value, rtol=0, atol=1e-4)


RESUMED = [(1, "fp32", 2), (3, "bf16", 4)]


def _resume(data: Path, folder: Path) -> list[tuple[list, list]]:
    results = []
    for stage, precision, micro in RESUMED:
        config = run_config(
            folder / f"resume-{stage}-{precision}.yaml",
            data,
            **pretraining("image", model__layers=[{"kind": "separate", "count": 2, "norm": "post", "drop_path": 0.3}]),
            checkpoint__every=2,
            engine__zero_stage=stage,
            engine__precision=precision,
            engine__micro_batch_size=micro,
        )
        last = Path(config.run_dir) / "checkpoints" / f"step-{STEPS:06d}"
        found, weights = [], []
        for resume in (None, "auto"):
            train(config, resume)
            barrier()
            found.append(records(config.run_dir))
            weights.append(load_file(last / AVERAGES_FILE))
            barrier()
            if rank() == 0 and resume is None:
                shutil.rmtree(last)
            barrier()
        results.append((found, weights))
    return results


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory):
    return run_distributed_test(_resume, 2, args=(data, tmp_path_factory.mktemp("resumed")))[0]


@pytest.mark.parametrize("case", range(len(RESUMED)), ids=[f"stage{s}-{p}" for s, p, _ in RESUMED])
def test_a_resumed_run_repeats_losses_and_average_exactly(resumed, case):
    (whole, continued), (before, after) = resumed[case]
    assert sorted(whole) == [1, 2, 3, 4]
    assert continued == whole
    assert before.keys() == after.keys() and before
    for name, value in before.items():
        assert np.array_equal(after[name], value), name
