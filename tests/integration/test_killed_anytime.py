"""`kill -9` at random moments, saves included: always resumable, nothing torn, nothing lost but steps since a save.

MMD2V_KILLS: how often, 50 by default. MMD2V_KILLS_OUT: a JSON file for the figures. MMD2V_KILLS_SEED: of the moments.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from training_runs import make_data, write_config
from waiting import free_port

from mmd2v.files import write_json
from mmd2v.train.checkpoints.checksums import verify
from mmd2v.train.checkpoints.folders import complete_checkpoints
from mmd2v.train.checkpoints.manifest import read_manifest
from mmd2v.train.metrics import METRICS_FILE, read_metrics

KILLS = int(os.environ.get("MMD2V_KILLS", "50"))
SEED = int(os.environ.get("MMD2V_KILLS_SEED", "0"))
STAGES = (0, 1, 2, 3)
STEPS, EVERY, RANKS = 240, 4, 2
LOST_RANK = 69  # exit status of the ranks that are left when one is killed
LIMIT = 600.0  # seconds within which something must have happened


@dataclass
class Tally:
    """What the kills did."""

    kills: Counter[str] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    saving: int = 0
    starting: int = 0
    finished_runs: int = 0
    left_after: list[float] = field(default_factory=list)
    """Seconds until the ranks that were not killed had ended."""


def _life(config: str, overrides: list[str], rank: int, port: int, output: str) -> None:
    """One rank, as a launcher starts it, in a process group of its own that holds its loader processes too."""
    os.setsid()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["mmd2v", "train", config, "--resume", "auto", *overrides]
    from mmd2v.cli.main import run

    run()


@dataclass
class Job:
    """The ranks of one life of a run."""

    ranks: list[Any]
    output: Path

    def running(self) -> list[Any]:
        return [process for process in self.ranks if process.is_alive()]

    def wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return not self.running()

    def kill(self, victims: list[int]) -> None:
        for rank in victims:
            try:
                os.killpg(self.ranks[rank].pid, signal.SIGKILL)
            except ProcessLookupError:  # before its setsid
                self.ranks[rank].kill()

    def said(self) -> str:
        return self.output.read_text(errors="replace")[-3000:]


def _start(context: Any, config: Path, run_dir: Path, trace: Path) -> Job:
    port = free_port()
    overrides = ["--run_dir", str(run_dir), "--data.trace", str(trace)]
    output = run_dir.with_suffix(".log")
    output.parent.mkdir(parents=True, exist_ok=True)
    ranks = [
        context.Process(target=_life, args=(str(config), overrides, rank, port, str(output))) for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    return Job(ranks, output)


def _losses(run_dir: Path) -> dict[int, float]:
    path = run_dir / METRICS_FILE
    return {r["step"]: r["loss"] for r in read_metrics(path) if "loss" in r} if path.exists() else {}


def _wait_for_moment(job: Job, run_dir: Path, draw: random.Random) -> str:
    """Wait until the job is to be killed; say what it was doing then. ``finished`` when it ended by itself."""
    deadline = time.monotonic() + LIMIT
    moment = draw.choice(("any", "save", "save", "start"))
    if moment == "start":
        job.wait(draw.uniform(0.0, 4.0))
        return "finished" if not job.running() else moment
    goal = max(_losses(run_dir), default=0) + draw.randint(1, 3 * EVERY)
    while job.running() and time.monotonic() < deadline:
        if moment == "any" and max(_losses(run_dir), default=0) >= goal:
            job.wait(draw.uniform(0.0, 0.1))
            return moment if job.running() else "finished"
        folder = run_dir / "checkpoints"
        if moment == "save" and max(_losses(run_dir), default=0) >= goal and any(folder.glob(".step-*.tmp")):
            job.wait(draw.uniform(0.0, 0.03))
            return moment if job.running() else "finished"
        time.sleep(0.001)
    assert not job.running(), f"nothing happened in {LIMIT:.0f} s:\n{job.said()}"
    return "finished"


def _check_checkpoints(run_dir: Path) -> int:
    """Assert that whatever bears a checkpoint's name is whole; return the step of the newest, 0 if there is none."""
    found = complete_checkpoints(run_dir / "checkpoints")
    named = sorted((run_dir / "checkpoints").glob("step-*"))
    assert [path for _, path in found] == named, "a folder with the name of a checkpoint is none"
    for _, path in found:
        assert verify(path, read_manifest(path)) == []
    return found[-1][0] if found else 0


def _kill_and_resume(context: Any, config: Path, run_dir: Path, kills: int, draw: random.Random, tally: Tally) -> None:
    trace = run_dir.with_suffix(".trace")
    done = 0
    while done < kills:
        job = _start(context, config, run_dir, trace)
        before = max(_losses(run_dir), default=0)
        moment = _wait_for_moment(job, run_dir, draw)
        if moment == "finished":
            assert [process.exitcode for process in job.ranks] == [0] * RANKS, job.said()
            raise AssertionError(f"{STEPS} steps are too few for {kills} kills")
        # A rank that dies before they have met leaves the others to the launcher.
        victims = [0, 1] if moment == "start" else draw.choice(([0, 1], [0, 1], [0], [1]))
        saving = any((run_dir / "checkpoints").glob(".step-*.tmp"))
        job.kill(victims)
        killed = time.monotonic()
        assert job.wait(LIMIT), f"ranks are left {LIMIT:.0f} s after another was killed:\n{job.said()}"
        if len(victims) == 1:
            tally.left_after.append(time.monotonic() - killed)
            other = job.ranks[1 - victims[0]]
            assert other.exitcode == LOST_RANK and f"rank {victims[0]}" in job.said(), job.said()
        done += 1
        tally.kills["both ranks" if len(victims) == 2 else f"rank {victims[0]}"] += 1
        tally.saving += saving
        steps = max(_losses(run_dir), default=0)
        tally.starting += steps <= before
        newest = _check_checkpoints(run_dir)
        # A save is begun every EVERY steps, and is in place before the next one begins.
        assert steps - newest <= 2 * EVERY, f"killed at step {steps}, but the newest checkpoint is of step {newest}"
        tally.lost.append(max(0, steps - newest))
    job = _start(context, config, run_dir, trace)
    assert job.wait(5 * LIMIT), job.said()
    assert [process.exitcode for process in job.ranks] == [0] * RANKS, job.said()
    tally.finished_runs += 1


@pytest.fixture(scope="module")
def context() -> Any:
    """Processes that begin with everything imported: a life takes two seconds instead of ten."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mmd2v.train.loop", "mmd2v.cli.train", "deepspeed", "timm"])
    return context


@pytest.mark.slow
@pytest.mark.timeout(120 * KILLS + 1200)
def test_run_killed_at_any_moment_loses_nothing(context, tmp_path):
    data = make_data(tmp_path / "data")
    draw, tally, started = random.Random(SEED), Tally(), time.monotonic()
    for number, stage in enumerate(STAGES):
        config = write_config(
            tmp_path / f"stage{stage}.yaml",
            data,
            steps=STEPS,
            engine__zero_stage=stage,
            checkpoint__every=EVERY,
            data__workers=1,
            optimizer__lr=1e-3,
        )
        whole, killed = (tmp_path / "runs" / f"{name}{stage}" for name in ("whole", "killed"))
        job = _start(context, config, whole, whole.with_suffix(".trace"))
        assert job.wait(5 * LIMIT), job.said()
        assert [process.exitcode for process in job.ranks] == [0] * RANKS, job.said()
        kills = KILLS * (number + 1) // len(STAGES) - KILLS * number // len(STAGES)
        _kill_and_resume(context, config, killed, kills, draw, tally)
        assert _losses(killed) == _losses(whole)  # to the last bit, each step once
        for rank in range(RANKS):
            killed_ids, whole_ids = (Path(f"{run}.trace.rank{rank}.jsonl").read_text() for run in (killed, whole))
            assert killed_ids == whole_ids
    _record(tally, time.monotonic() - started)


def _record(tally: Tally, seconds: float) -> None:
    import torch
    from deepspeed import __version__ as deepspeed_version

    from mmd2v.report.machine import processor
    from mmd2v.train.run_dir import code_version

    assert sum(tally.kills.values()) == KILLS
    figures = {
        "kills": KILLS,
        "seed": SEED,
        "killed": dict(tally.kills),
        "while_a_checkpoint_was_written": tally.saving,
        "before_a_first_new_step": tally.starting,
        "resumed": KILLS,
        "torn_checkpoints": 0,
        "runs_finished_with_the_losses_and_samples_of_an_uninterrupted_one": tally.finished_runs,
        "checkpoint_every_steps": EVERY,
        "steps_lost": {"mean": round(statistics.fmean(tally.lost), 2), "most": max(tally.lost)},
        "seconds_until_the_other_rank_had_ended": {
            "median": round(statistics.median(tally.left_after), 2),
            "most": round(max(tally.left_after), 2),
        }
        if tally.left_after
        else None,
        "zero_stages": list(STAGES),
        "seconds": round(seconds),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "deepspeed": deepspeed_version,
        },
        "commit": code_version(),
    }
    print(figures)
    if out := os.environ.get("MMD2V_KILLS_OUT"):
        write_json(Path(out), figures)
