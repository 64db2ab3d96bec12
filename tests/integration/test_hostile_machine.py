"""A machine that turns against a run: folders that cannot be written, a full disk, a clock that jumps."""

import os
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from training_runs import make_data, write_config

from mmd2v.train.metrics import Reporter, read_metrics

TEN_YEARS = 10 * 365 * 86_400.0
CLOCK = ("throughput", "time/", "memory")
NO_WAY = "as root, and neither a bind mount nor chattr works here"


def _closed(folder: Path) -> Callable[[], None] | None:
    """Let nothing new be made in ``folder`` and its folders; return what undoes it, None where nothing can do that.

    Files that are open stay writable, as when a file server turns read-only only for what is opened anew.
    """
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    if os.geteuid() != 0:  # permissions mean nothing to root
        for path in folders:
            path.chmod(0o555)
        return lambda: [path.chmod(0o755) for path in folders] and None
    if _works("mount", "--bind", folder, folder):
        if _works("mount", "-o", "remount,bind,ro", folder):
            return lambda: subprocess.run(["umount", "--lazy", folder], check=True) and None
        subprocess.run(["umount", "--lazy", folder], check=True)
    if _works("chattr", "+i", *folders):
        return lambda: subprocess.run(["chattr", "-i", *folders], check=True) and None
    return None


def _works(*command: object) -> bool:
    try:
        return subprocess.run(list(map(str, command)), capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@contextmanager
def _after(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Do something once a run has recorded ``step``."""
    real = Reporter.record

    def record(self: Reporter, at: int, values: Any) -> None:
        real(self, at, values)
        if at == step:
            act()

    Reporter.record = record
    try:
        yield
    finally:
        Reporter.record = real


def _adversities(config: str) -> dict[str, str]:
    """Everything in one process: what each attempt to train says, as the user reads it, and what it leaves."""
    from mmd2v.cli.main import _message
    from mmd2v.config.load import load_config
    from mmd2v.train.checkpoints.folders import complete_checkpoints
    from mmd2v.train.loop import train

    runs = Path(config).parent / "runs"
    said: dict[str, str] = {}

    def attempt(name: str, run: Path, *overrides: str, steps: int = 2, resume: str | None = None) -> None:
        # To nowhere: pytest keeps the output in a file, which a limit on the size of files would meet first.
        try:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                train(load_config(config, ["--run_dir", str(run), "--steps", str(steps), *overrides]), resume)
            said[name] = "went well"
        except Exception as error:
            said[name] = _message(error) or traceback.format_exc()

    def saved(run: Path) -> str:
        return " ".join(str(step) for step, _ in complete_checkpoints(run / "checkpoints"))

    # Where there is no folder, and none can be made.
    (runs / "file").parent.mkdir(parents=True)
    (runs / "file").touch()
    attempt("below a file", runs / "file" / "run")
    attempt("in /proc", Path("/proc/mmd2v"))

    # A folder that turns read-only under a run, stays so, and is writable again.
    run = runs / "closed"
    attempt("before it is closed", run)
    reopen: list[Callable[[], None]] = []

    def close() -> None:
        if (undo := _closed(run)) is not None:
            reopen.append(undo)

    with _after(3, close):
        attempt("closed in mid-run", run, "--checkpoint.every", "2", steps=6, resume="auto")
    if reopen:
        try:
            said["left by a closed folder"] = saved(run)
            attempt("still closed", run, steps=6, resume="auto")
        finally:
            reopen.pop()()
        attempt("open again", run, steps=6, resume="auto")
        said["left by an open folder"] = saved(run)

    # A disk that fills up after a record: the next one does not fit. TensorBoard's curves neither.
    for curves in ("false", "true"):
        run = runs / f"full-{curves}"
        name = f"metrics (tensorboard {curves})"
        more = ["--logging.tensorboard", curves]
        attempt(f"{name} before", run, *more)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = (run / "metrics.jsonl").stat().st_size

        def fill(size: int = size, unlimited: tuple[int, int] = unlimited) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, unlimited[1]))  # there is a record more by now

        with _after(3, fill):
            attempt(name, run, *more, steps=6, resume="auto")
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        said[f"{name} left"] = saved(run)
        attempt(f"{name} after", run, *more, steps=6, resume="auto")

    # A disk that is full from the start.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
    attempt("full at the start", runs / "full-start")
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    # A clock that jumps, with what waits for the time in TensorBoard's thread.
    attempt("clock", runs / "clock", "--logging.tensorboard", "true", steps=6)
    real, ahead = time.time, [0.0]
    time.time = lambda: real() + ahead[0]
    try:
        for name, years in (("clock forward", TEN_YEARS), ("clock back", -TEN_YEARS)):
            ahead[0] = 0.0
            more = ["--logging.tensorboard", "true", "--checkpoint.every", "2"]
            with _after(3, lambda years=years: ahead.__setitem__(0, years)):
                attempt(name, runs / name, *more, steps=4)
            said[f"{name} left"] = saved(runs / name)
            ahead[0] = -years
            attempt(f"{name} resumed", runs / name, *more, steps=6, resume="auto")
    finally:
        time.time = real
    return said


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    data = make_data(folder / "data")
    # A constant rate: a run of 6 steps in two parts has the losses of one, whatever the first part's number of steps.
    return write_config(folder / "base.yaml", data, optimizer__schedule="constant", optimizer__warmup=0)


@pytest.fixture(scope="module")
def said(config) -> dict[str, str]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
    from harness import run_distributed_test

    return run_distributed_test(_adversities, 1, args=(str(config),))[0]


def _records(config: Path, run: str) -> list[dict[str, float]]:
    return read_metrics(config.parent / "runs" / run / "metrics.jsonl")


def _exact(config: Path, run: str) -> list[dict[str, float]]:
    """Every record without what depends on the clock and the machine."""
    return [{name: v for name, v in r.items() if not name.startswith(CLOCK)} for r in _records(config, run)]


def test_folder_that_cannot_be_made_is_named(said, config):
    file = config.parent / "runs" / "file"
    assert str(file) in said["below a file"] and "Traceback" not in said["below a file"]
    assert "/proc/mmd2v" in said["in /proc"] and "Traceback" not in said["in /proc"]


def test_folder_that_turns_read_only_keeps_the_run(said, config):
    assert said["before it is closed"] == "went well"
    if "still closed" not in said:
        pytest.skip(NO_WAY)
    folder = config.parent / "runs" / "closed"
    for name in ("closed in mid-run", "still closed"):
        assert str(folder) in said[name] and "Traceback" not in said[name], said[name]
    reasons = ("Read-only file system", "Operation not permitted", "Permission denied")
    assert any(reason in said["closed in mid-run"] for reason in reasons), said["closed in mid-run"]
    assert said["left by a closed folder"] == "2"
    assert said["open again"] == "went well" and said["left by an open folder"].split()[-1] == "6"
    assert _exact(config, "closed") == _exact(config, "clock")  # as if nothing had happened


@pytest.mark.parametrize("curves", ["false", "true"])
def test_metrics_on_a_full_disk_are_named(said, config, curves):
    name = f"metrics (tensorboard {curves})"
    assert said[f"{name} before"] == "went well"
    path = config.parent / "runs" / f"full-{curves}" / "metrics.jsonl"
    assert said[name].startswith(f"{path}: the disk is full or a quota is reached"), said[name]
    assert said[f"{name} left"] == "2"
    assert said[f"{name} after"] == "went well"
    assert _exact(config, f"full-{curves}") == _exact(config, "clock")


def test_disk_that_is_full_from_the_start_names_the_file(said, config):
    run_dir = config.parent / "runs" / "full-start"
    assert said["full at the start"].startswith(f"{run_dir}/"), said["full at the start"]
    assert "the disk is full" in said["full at the start"]


@pytest.mark.parametrize("way", ["forward", "back"])
def test_clock_that_jumps_changes_nothing(said, config, way):
    name = f"clock {way}"
    assert said["clock"] == said[name] == said[f"{name} resumed"] == "went well", said
    assert said[f"{name} left"] == "2 4"
    assert _exact(config, name) == _exact(config, "clock")
    records = _records(config, name)
    times = [(key, value) for r in records for key, value in r.items() if key.startswith(("throughput", "time/"))]
    assert len(times) >= 4 * len(records)
    for key, value in times:
        assert 0 <= value < 1e6, (key, value)
        assert not key.startswith("throughput") or value > 0.01, (key, value)
