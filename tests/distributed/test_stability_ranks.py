"""Two ranks answer a loss that is no number on one of them, or jumps, together: they skip the step, or go back."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from harness import run_distributed_test
from training_runs import make_data, run_config, run_of

from mmd2v.distributed.collectives import barrier, gather_objects, rank, world_size
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError
from mmd2v.train.checkpoints.folders import complete_checkpoints
from mmd2v.train.checkpoints.manifest import read_manifest
from mmd2v.train.metrics import read_metrics

SKIPS = [*((stage, "fp32") for stage in range(4)), (0, "bf16"), (2, "bf16")]
BAD = 3  # the step (from 1) whose second micro-batch is bad on rank 1


def _world() -> World:
    return World(rank(), world_size(), rank(), torch.device("cpu"), "gloo")


def _spoil(run, bad: dict[int, float], on: tuple[int, ...] = (1,)) -> None:
    """Multiply the losses of some steps' last micro-batches, counted from the start of the process, on some ranks."""
    forward, calls = run.engine.forward, 0

    def spoiled(*inputs):
        nonlocal calls
        calls += 1
        losses = forward(*inputs)
        step, micro = divmod(calls - 1, run.plan.accumulation)
        if step + 1 in bad and micro == run.plan.accumulation - 1 and rank() in on:
            losses = {name: term * bad[step + 1] for name, term in losses.items()}
        return losses

    run.engine.forward = spoiled


def _weights(run) -> torch.Tensor:
    parameters = list(run.engine.module.parameters())
    with run.engine.gathered(parameters):
        return torch.cat([p.detach().float().flatten() for p in parameters])


def _noting_weights(run) -> list[tuple[int, torch.Tensor]]:
    """Step (from 1) and weights after each step that is done from now on."""
    noted, between = [], run._between_steps

    def note() -> None:
        noted.append((run.step, _weights(run)))
        between()

    run._between_steps = note
    return noted


def _skip(data: Path, folder: Path) -> list[dict]:
    found = []
    for stage, precision in SKIPS:
        config = run_config(
            folder / f"skip-{stage}-{precision}.yaml",
            data,
            steps=5,
            objectives=[{"kind": "cls_regression", "teacher": "resnet"}],  # without a loss that both ranks share
            engine__zero_stage=stage,
            engine__precision=precision,
            engine__micro_batch_size=2,
            stability__non_finite="skip",
            checkpoint__every=4,
        )
        with run_of(config, _world()) as run:
            _spoil(run, {BAD: torch.nan})
            weights = _noting_weights(run)
            run.train()
            found.append(
                {
                    "moved": [not torch.equal(a, b) for (_, a), (_, b) in pairwise(weights)],
                    "equal": len(set(gather_objects(weights[-1][1].numpy().tobytes()))) == 1,
                    "finite": bool(weights[-1][1].isfinite().all()),
                    "skipped": read_manifest(run.checkpointer.newest).skipped_steps,
                    "records": read_metrics(run.run_dir / "metrics.jsonl"),
                }
            )
        barrier()

    # One more than allowed, counting those before a resume; the second is a gradient of its own.
    said = []
    for bad, resume in (({2: torch.inf}, None), ({1: torch.nan}, "auto")):
        config = run_config(
            folder / "limit.yaml", data, steps=3 if resume is None else 5, stability__non_finite="skip",
            stability__skip_limit=1,
        )  # fmt: skip
        try:
            with run_of(config, _world(), resume) as run:
                _spoil(run, bad)
                run.train()
            said.append("went well")
        except UserError as error:
            said.append(str(error))
        barrier()

    # The loss is lost while the checkpoint of the step before is being written.
    config = run_config(folder / "stop.yaml", data, steps=5, checkpoint__every=2)
    with run_of(config, _world()) as run:
        _spoil(run, {3: torch.nan})
        run.checkpointer.finish = _only_when_asked(run)
        try:
            run.train()
        except UserError as error:
            said.append(str(error))
        kept = [path.name for _, path in complete_checkpoints(run.checkpointer.folder)]
    barrier()
    return [*found, {"said": said, "kept": kept}]


def _only_when_asked(run):
    """`finish` of a checkpoint whose files take so long that no vote ever finds them written."""
    finish = run.checkpointer.finish
    type(run.checkpointer).busy, busy = property(lambda own: own.pending), type(run.checkpointer).busy

    def restored() -> None:
        type(run.checkpointer).busy = busy
        finish()

    return restored


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def skipped(data, tmp_path_factory) -> list[list[dict]]:
    return run_distributed_test(_skip, 2, args=(data, tmp_path_factory.mktemp("skip")))


@pytest.mark.parametrize("case", range(len(SKIPS)), ids=[f"stage{s}-{p}" for s, p in SKIPS])
def test_step_that_is_not_finite_on_one_rank_moves_no_weight_of_any(skipped, case):
    for found in (ranks[case] for ranks in skipped):
        # Between the ends of steps 1 and 2, 2 and 3 (the bad one), and so on.
        assert found["moved"] == [True, False, True, True]
        assert found["equal"] and found["finite"] and found["skipped"] == 1
        records = {r["step"]: r for r in found["records"]}
        assert sorted(records) == [1, 2, 3, 4, 5]
        assert ["loss" in records[step] for step in range(1, 6)] == [True, True, False, True, True]
        assert [records[step]["skipped_steps"] for step in range(1, 6)] == [0, 0, 1, 1, 1]


def test_run_that_leaves_out_more_steps_than_allowed_ends_on_all_ranks(skipped):
    for said in (ranks[-1]["said"] for ranks in skipped):
        assert said[0] == "went well"
        assert said[1].startswith("step 4: ") and "not finite on rank(s)" in said[1]
        assert "1 steps were left out before it, as many as stability.skip_limit allows" in said[1]


def test_checkpoint_that_is_being_written_when_the_loss_is_lost_is_kept(skipped):
    for last in (ranks[-1] for ranks in skipped):
        assert "became nan on rank(s) 1" in last["said"][2] and last["kept"] == ["step-000002"]


def _straight(data: Path, folder: Path) -> list[list[str]]:
    """Samples of this rank's micro-batches in a run without trouble, as long as the other's data."""
    trace = str(folder / "trace")
    config = run_config(folder / "straight.yaml", data, steps=11, engine__micro_batch_size=2, data__trace=trace)
    with run_of(config, _world()) as run:
        run.train()
        return [json.loads(line)["ids"] for line in run.trace.path.read_text().splitlines()]


def _roll_back(data: Path, folder: Path) -> tuple[list[dict], list[list[str]]]:
    found = []
    for stage in (1, 3):
        config = run_config(
            folder / f"jump-{stage}.yaml",
            data,
            steps=9,
            engine__zero_stage=stage,
            engine__micro_batch_size=2,
            stability={"spike_factor": 5, "spike_window": 3},
            checkpoint__every=4,
            data__trace=str(folder / f"trace-{stage}"),
        )
        with run_of(config, _world()) as run:
            _spoil(run, {6: 100.0}, on=(0, 1))
            weights = _noting_weights(run)
            run.train()
            manifest = read_manifest(run.checkpointer.newest)
            trace = [json.loads(line) for line in run.trace.path.read_text().splitlines()]
        found.append(
            {
                "steps": [step for step, _ in weights],
                "records": [r["step"] for r in read_metrics(run.run_dir / "metrics.jsonl")],
                "position": (manifest.step, manifest.sample_index, manifest.steps_ahead),
                "told": manifest.roll_backs,
                # Step 5 was done twice from the same weights, with other samples.
                "again": not torch.equal(weights[4][1], weights[6][1]),
                "close": torch.allclose(weights[4][1], weights[6][1], atol=0.05),
                "trace": [(one["step"], one["ids"]) for one in trace],
            }
        )
        barrier()

    config = run_config(
        folder / "nan.yaml", data, steps=6, checkpoint__every=2, stability={"non_finite": "roll_back", "roll_backs": 1}
    )
    said = ""
    try:
        with run_of(config, _world()) as run:
            _spoil(run, {3: torch.nan, 6: torch.nan})
            run.train()
    except UserError as error:
        said = str(error)
    barrier()
    return [*found, {"said": said, "newest": run.checkpointer.newest.name}], _straight(data, folder)


@pytest.fixture(scope="module")
def rolled_back(data, tmp_path_factory) -> list[tuple[list[dict], list[list[str]]]]:
    return run_distributed_test(_roll_back, 2, args=(data, tmp_path_factory.mktemp("back")))


@pytest.mark.parametrize("case", [0, 1], ids=["stage1", "stage3"])
def test_jump_of_the_loss_rolls_back_and_passes_over_the_data(rolled_back, case):
    for runs, straight in rolled_back:
        found = runs[case]
        assert found["steps"] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9]
        assert found["records"] == list(range(1, 10))  # each once
        assert found["position"] == (9, 11 * 8, 2)
        assert len(found["told"]) == 1 and found["told"][0].startswith("step 6: loss ")
        assert found["again"] and found["close"]
        assert [step for step, _ in found["trace"]] == [step for step in range(9) for _ in range(2)]
        # The data of steps 5 and 6 (two micro-batches each) is left out.
        assert [ids for _, ids in found["trace"]] == straight[:8] + straight[12:]


def test_loss_that_is_no_number_again_and_again_ends_the_run_and_names_every_time(rolled_back):
    for runs, _ in rolled_back:
        said = runs[-1]["said"]
        assert said.startswith("step 5: ") and "became nan on rank(s) 1" in said
        assert "has rolled back 1 times, as often as stability.roll_backs allows:\n  step 3: " in said
        assert runs[-1]["newest"] == "step-000004"
