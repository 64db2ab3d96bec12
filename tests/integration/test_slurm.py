"""`mmd2v launch slurm` on a cluster of two nodes: preempted, queued again, on one node and on two, nothing lost."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from training_runs import make_data, write_config
from waiting import LONG, holding

from mmd2v.cli import data as data_command
from mmd2v.train.metrics import read_metrics

STEPS, BATCH = 96, 8  # one epoch
HELD = 20  # steps after which a start waits for the signal that is to come, three times
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A run of one epoch, with a trace of what every rank consumed beside its metrics."""
    folder = tmp_path_factory.mktemp("slurm")
    data = make_data(folder)
    many = ["--split", "train", "--count", str(STEPS * BATCH), "--size", "16", "--seed", "5", "--captions", "1"]
    assert data_command.main(["synth", "--out", str(folder / "epoch"), *many]) == 0
    changes = {"data__train": {"shards": str(folder / "epoch")}, "engine__batch_size": BATCH, "engine__zero_stage": 2}
    return write_config(folder / "run.yaml", data, steps=None, epochs=1, checkpoint__every=40, **changes)


def _launch(config: Path, slurm: Cluster, run_dir: Path, nodes: int, *more: str, **environ: str) -> tuple[int, str]:
    """Submit the run as a user does, who has ``environ`` too; return the job's number and what is said."""
    asked = ["--nodes", str(nodes), "--gpus-per-node", "0", "--signal-seconds", "30", "--time", "60", *more]
    overrides = ["--run_dir", str(run_dir), "--data.trace", str(run_dir / "trace")]
    done = _command(slurm, "launch", "slurm", config, *asked, *overrides, **environ)
    assert done.returncode == 0, done.stderr
    number = re.match(r"job (\d+): ", done.stdout)
    assert number is not None, done.stdout
    return int(number[1]), done.stdout


def _command(slurm: Cluster, *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmd2v", *map(str, arguments)]
    own = {**slurm.environment, **environ}
    return subprocess.run(command, env=own, capture_output=True, text=True, check=False, timeout=LONG)


def _losses(run_dir: Path) -> dict[int, float]:
    file = run_dir / "metrics.jsonl"
    records = read_metrics(file) if file.exists() else []
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def _traced(run_dir: Path) -> Counter[str]:
    lines = [line for file in run_dir.glob("trace.rank*.jsonl") for line in file.read_text().splitlines()]
    return Counter(sample for line in lines for sample in json.loads(line)["ids"])


def _until(happened: Callable[[], bool], slurm: Cluster, job: int, log: Path) -> None:
    deadline = time.monotonic() + LONG
    while not happened():
        state = slurm.state(job)
        if state in ENDED or time.monotonic() > deadline:
            said = log.read_text(errors="replace")[-6000:] if log.exists() else ""
            pytest.fail(f"job {job} is {state}\n{slurm.fields(job)}\n{said}\n{slurm.logs()}", pytrace=False)
        time.sleep(0.05)


def _starts(log: Path) -> list[int]:
    """The step at which every later start of the run went on, as the job's log says."""
    return [int(step) for step in re.findall(r"continuing from \S+ at step (\d+)", log.read_text(errors="replace"))]


@pytest.fixture(scope="module")
def whole(config, slurm) -> Path:
    """Run directory of the run that nobody interrupts, on two nodes that are looked at first."""
    run_dir = config.parent / "whole"
    job, _ = _launch(config, slurm, run_dir, 2)
    state = slurm.wait(job, ENDED, LONG)
    log = (run_dir / f"slurm-{job}.log").read_text()
    assert state == "COMPLETED", log
    assert 0 < log.index("2 nodes: fit") < log.index("mmd2v job: job ") < log.index("run run on cpu")
    assert sorted(_losses(run_dir)) == list(range(1, STEPS + 1))
    return run_dir


@pytest.mark.timeout(6000)  # five starts of two ranks: a minute when the machine is quiet
def test_nothing_is_lost_over_preemption_requeue_and_other_numbers_of_nodes(config, slurm, whole):
    run_dir = config.parent / "moved"
    job, said = _launch(config, slurm, run_dir, 2, "--no-check", **holding(HELD))
    log = run_dir / f"slurm-{job}.log"
    assert f"tail -F {log}" in said and f"scancel {job}" in said and "2 × 1 = 2 ranks" in said

    def goes_on(restarts: int) -> None:
        """Wait until the job has started again and done some steps more."""

        def some_steps() -> bool:
            begun = _starts(log) if log.exists() else []
            return len(begun) == restarts and max(_losses(run_dir), default=0) >= (begun[-1] if begun else 0) + 4

        _until(some_steps, slurm, job, log)

    # On two nodes, until the scheduler's signal: it saves, ends, and queues itself again.
    goes_on(restarts=0)
    slurm.run("scancel", "--signal=USR1", job)
    goes_on(restarts=1)

    # Taken away from outside, with one of its nodes: it waits, until it is given one instead of two.
    slurm.run("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test")
    slurm.run("scontrol", "requeue", job)
    _until(lambda: slurm.state(job) == "PENDING", slurm, job, log)
    refused = _command(slurm, "launch", "slurm", config, "--nodes", 1, "--gpus-per-node", 0, "--run_dir", run_dir)
    assert refused.returncode == 2 and f"job {job} (PENDING) has {run_dir} already" in refused.stderr
    slurm.run("scontrol", "update", f"JobId={job}", "NumNodes=1", "NumTasks=1")
    goes_on(restarts=2)
    assert slurm.fields(job)["NodeList"] == "node1" and slurm.fields(job)["Restarts"] == "2"

    # Cancelled, which ends it for good, and submitted again, on two nodes.
    slurm.run("scontrol", "update", "NodeName=node2", "State=RESUME")
    slurm.run("scancel", job)
    assert slurm.wait(job, ENDED, LONG) == "CANCELLED"
    on_one, on_two = _starts(log)[1], max(_losses(run_dir))
    job, _ = _launch(config, slurm, run_dir, 2, "--no-check")
    last = run_dir / f"slurm-{job}.log"
    assert slurm.wait(job, ENDED, LONG) == "COMPLETED", last.read_text()

    # No step was lost at any stop, none was done twice, and every sample of the epoch came once.
    assert on_one < on_two == _starts(last)[0] < STEPS
    ids = _traced(run_dir)
    assert len(ids) == STEPS * BATCH and set(ids.values()) == {1}
    assert ids == _traced(whole)
    losses, expected = _losses(run_dir), _losses(whole)
    assert sorted(losses) == sorted(expected)
    alike = [step for step in expected if step <= on_one]
    assert alike and [losses[step] for step in alike] == [expected[step] for step in alike]  # to the last bit
    assert losses == pytest.approx(expected, rel=1e-4)


def test_notice_while_a_run_is_still_starting_queues_the_job_again(slurm, tmp_path):
    """Before Python listens to signals, they end the ranks: the job goes on all the same."""
    setup = tmp_path / "setup.sh"
    setup.write_text(f"srun() {{ command srun {sys.executable} {tmp_path / 'rank.py'}; }}\n")
    (tmp_path / "rank.py").write_text(
        "import os, pathlib, time\n"
        "begun = pathlib.Path(__file__).with_name('begun')\n"
        "if os.environ['SLURM_PROCID'] == '0' and 'SLURM_RESTART_COUNT' not in os.environ:\n"
        "    begun.touch()\n"
        "time.sleep(0 if 'SLURM_RESTART_COUNT' in os.environ else 2000)\n"
    )
    config = write_config(tmp_path / "run.yaml", tmp_path)
    job, _ = _launch(config, slurm, tmp_path / "run", 2, "--no-check", "--setup", str(setup))
    log = tmp_path / "run" / f"slurm-{job}.log"
    _until((tmp_path / "begun").exists, slurm, job, log)
    slurm.run("scancel", "--signal=USR1", job)
    assert slurm.wait(job, ENDED, LONG) == "COMPLETED", log.read_text()
    assert slurm.fields(job)["Restarts"] == "1" and "start number 2" in log.read_text()
