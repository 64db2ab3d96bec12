"""A jump of the loss in a run in steps of tokens: both ranks go back, and pass over the texts of the steps they undid.

The run is also stopped by a signal after that, and goes on as the one that was not.
"""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from harness import run_distributed_test
from text_runs import make_text_data, write_text_config
from training_runs import run_of

from mmd2v.config.load import load_config
from mmd2v.distributed.collectives import barrier, rank, world_size
from mmd2v.distributed.environment import World
from mmd2v.distributed.preemption import STOP_SIGNALS, Preempted
from mmd2v.train.checkpoints.manifest import Manifest, read_manifest
from mmd2v.train.metrics import read_metrics

STEPS = 9
SAVED, JUMP = 4, 6
"""The steps (from 1) of the checkpoint that the run goes back to, and of the loss that jumps."""
LEFT_OUT = JUMP - SAVED
STOP = 7
"""The step in which the signal comes; the ballot that says so is read after the next one."""


def _config(folder: Path, data: Path, name: str, **changes):
    file = write_text_config(
        folder / f"{name}.yaml",
        data,
        steps=STEPS,
        data__micro_batch_tokens=64,  # two micro-batches on each of two ranks
        data__trace=str(folder / f"trace-{name}"),
        model__layers=[{"kind": "separate"}, {"kind": "shared", "dropout": 0.1, "layer_drop": 0.3}],
        optimizer__schedule="constant",  # that of a run of two steps more
        stability={"spike_factor": 5, "spike_window": 3},
        checkpoint__every=SAVED,
        **changes,
    )
    return load_config(file)


def _part(config, resume: str | None = None, *, jump: bool = False, stop: bool = False) -> str:
    """Run on, with a loss that jumps or a signal to rank 1; say what became of it."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    world = World(rank(), world_size(), rank(), torch.device("cpu"), "gloo")
    try:
        with run_of(config, world, resume) as run:
            forward = run.engine.forward

            def forward_with_trouble(*inputs):
                losses = forward(*inputs)
                if jump and run.step + 1 == JUMP and not run.trouble.roll_backs.told:
                    losses = {name: term * 100.0 for name, term in losses.items()}
                if stop and run.step + 1 == STOP and rank() == 1:
                    os.kill(os.getpid(), signal.SIGUSR1)
                return losses

            run.engine.forward = forward_with_trouble
            run.train()
        return "finished"
    except Preempted as stopped:
        return str(stopped)
    finally:
        for number, handler in before.items():  # ignored by a process that should end now
            signal.signal(number, handler)
        barrier()


def _runs(data: Path, folder: Path) -> list[str]:
    long = _config(folder, data, "straight").model_copy(update={"steps": STEPS + LEFT_OUT})
    back, stopped = (_config(folder, data, name) for name in ("back", "stopped"))
    return [_part(long), _part(back, jump=True), _part(stopped, jump=True, stop=True), _part(stopped, "auto")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list[list[str]]]:
    data = make_text_data(tmp_path_factory.mktemp("data"))
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_distributed_test(_runs, 2, args=(data, folder))


def test_run_goes_back_on_both_ranks_and_the_stopped_one_goes_on(runs):
    _, ends = runs
    for straight, back, stopped, last in ends:
        assert straight == back == last == "finished"
        assert stopped.startswith(f"SIGUSR1: saved step {STOP + 1} in ")


def test_texts_of_the_steps_that_were_undone_are_passed_over_and_no_others(runs):
    folder, _ = runs
    for one in range(2):
        straight, back, stopped = (_ids(folder, name, one) for name in ("straight", "back", "stopped"))
        micro_steps = [ids for step in [*range(SAVED), *range(JUMP, STEPS + LEFT_OUT)] for ids in straight[step]]
        assert [ids for step in back for ids in step] == micro_steps
        assert stopped == back
        assert [len(step) for step in back] == [2] * STEPS


def test_records_say_where_in_the_texts_the_run_is(runs):
    folder, _ = runs
    straight, back = (_records(folder, name) for name in ("straight", "back"))
    assert [record["step"] for record in back] == list(range(1, STEPS + 1))  # each once
    epochs = {record["step"]: record["epoch"] for record in straight}
    assert [record["epoch"] for record in back] == [
        epochs[step if step <= SAVED else step + LEFT_OUT] for step in range(1, STEPS + 1)
    ]
    assert back[:SAVED] == straight[:SAVED] and all(record["loss"] < 5 * straight[0]["loss"] for record in back)


def test_run_that_was_stopped_after_it_went_back_is_the_same_to_the_last_bit(runs):
    folder, _ = runs
    assert _records(folder, "stopped") == _records(folder, "back")
    back, stopped = (_manifest(folder, name) for name in ("back", "stopped"))
    assert (stopped.step, stopped.steps_ahead, stopped.sample_index) == (back.step, LEFT_OUT, back.sample_index)
    assert back.sample_index == _manifest(folder, "straight").sample_index  # samples of the undone steps were used
    assert len(stopped.roll_backs) == 1 and stopped.roll_backs[0].startswith(f"step {JUMP}: loss ")


def _ids(folder: Path, name: str, of_rank: int) -> list[list[list[str]]]:
    """Samples of each micro-batch of each step."""
    steps: list[list[list[str]]] = []
    for line in (folder / f"trace-{name}.rank{of_rank}.jsonl").read_text().splitlines():
        one = json.loads(line)
        if one["step"] == len(steps):
            steps.append([])
        assert one["step"] == len(steps) - 1
        steps[-1].append(one["ids"])
    return steps


def _records(folder: Path, name: str) -> list[dict[str, float]]:
    """Every record without what depends on the clock and the machine."""
    clock = ("throughput", "time/", "memory")
    records = read_metrics(folder / "runs" / name / "metrics.jsonl")
    return [{key: value for key, value in record.items() if not key.startswith(clock)} for record in records]


def _manifest(folder: Path, name: str) -> Manifest:
    steps = STEPS + (LEFT_OUT if name == "straight" else 0)
    return read_manifest(folder / "runs" / name / "checkpoints" / f"step-{steps:06d}")
