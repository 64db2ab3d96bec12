"""A pipeline that a scheduler's signals end, inside of its stages and between two: started again, it shows no seam."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest
from mmd2v_process import run_mmd2v
from pipeline_runs import STAGES, write_pipeline
from safetensors.numpy import load_file
from training_runs import make_data

from mmd2v.train.metrics import read_metrics

RANKS = 2
# Records at intervals that the stops cut; no checkpoint but that of a stop and the last one.
CHANGES = [f"--{stage}.{change}" for stage in STAGES for change in ("steps=5", "logging.every=3")]


class Part(NamedTuple):
    """How one start of the command ended."""

    status: int
    out: str
    err: str


def _command(pipeline: Path, run_dir: Path, **stop: str) -> Part:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if stop:
        env |= {"MMD2V_PLUGINS": "stop_signals_plugin", **stop}
    traces = [f"--{stage}.data.trace={run_dir / stage / 'trace'}" for stage in STAGES]
    arguments = ["train", pipeline, "--run_dir", run_dir, *CHANGES, *traces]
    return Part(*_of(run_mmd2v(arguments, env=env, ranks=RANKS)))


def _of(done) -> tuple[int, str, str]:
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list[Part]]:
    """The folder of ``whole`` and ``stopped``, and the parts of the latter."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline = write_pipeline(folder, make_data(tmp_path_factory.mktemp("data")))
    whole = _command(pipeline, folder / "whole")
    assert whole.status == 0, whole.err
    stops = [
        {"STOP_RUN": "half", "STOP_AFTER": "1", "STOP_RANK": "1"},
        {"STOP_EXPORT": "half", "STOP_SIGNAL": "SIGTERM"},
        {"STOP_RUN": "both", "STOP_AFTER": "3", "STOP_SIGNAL": "SIGTERM"},
        {},
    ]
    return folder, [_command(pipeline, folder / "stopped", **stop) for stop in stops]


def test_each_part_says_what_it_saved_and_goes_on_where_the_one_before_was_stopped(runs):
    folder, parts = runs
    runs = folder / "stopped"
    assert [part.status for part in parts] == [75, 75, 75, 0], [part.err for part in parts]
    inside, between, late, last = parts
    # The ballot that says so is cast after the step and read after the next one.
    assert f"SIGUSR1: saved step 2 in {runs / 'half' / 'checkpoints' / 'step-000002'} (" in inside.err
    assert f"continuing from {runs / 'half' / 'checkpoints' / 'step-000002'} at step 2" in between.out
    assert f"stage half: exported to {runs / 'half' / 'export'}" in between.out  # it was not cut short
    assert "SIGTERM: stopped before it began, with nothing to save" in between.err
    assert f"SIGTERM: saved step 4 in {runs / 'both' / 'checkpoints' / 'step-000004'} (" in late.err
    assert f"continuing from {runs / 'both' / 'checkpoints' / 'step-000004'} at step 4" in last.out


def test_finished_stages_are_not_trained_again(runs):
    _, parts = runs
    told = [[name for name in STAGES if f"stage {name}: finished before" in part.out] for part in parts]
    assert told == [[], ["teacher"], ["teacher", "half"], ["teacher", "half"]]
    trained = [[name for name in STAGES if f"run {name} on " in part.out] for part in parts]
    assert trained == [["teacher", "half"], ["half"], ["both"], ["both"]]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_the_records_samples_and_weights_of_one_that_was_not_stopped(runs, stage):
    whole, stopped = (runs[0] / name / stage for name in ("whole", "stopped"))
    records = _exact(whole)
    assert [record["step"] for record in records] == [3, 5]
    assert _exact(stopped) == records
    for rank in range(RANKS):
        ids = [_samples(run / f"trace.rank{rank}.jsonl") for run in (whole, stopped)]
        assert ids[0] == ids[1] and len(ids[0]) == 5
    expected, found = (load_file(run / "export" / "model.safetensors") for run in (whole, stopped))
    assert {name: value.tobytes() for name, value in found.items()} == {
        name: value.tobytes() for name, value in expected.items()
    }


def _exact(run_dir: Path) -> list[dict[str, float]]:
    """Every record without what depends on the clock and the machine."""
    clock = ("throughput", "time/", "memory")
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{name: value for name, value in r.items() if not name.startswith(clock)} for r in records]


def _samples(trace: Path) -> list[list[str]]:
    return [json.loads(line)["ids"] for line in trace.read_text().splitlines()]
