"""Runs that a scheduler's signal ends: the step is finished and saved, and the run goes on as if it had never ended."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import make_data, write_config
from waiting import LONG, free_port

from mmd2v.models.layer_drop import dropped_layers
from mmd2v.train.checkpoints.folders import complete_checkpoints
from mmd2v.train.metrics import read_metrics
from mmd2v.train.seeds import position_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from harness import run_distributed_test

STEPS = 12
# Dropout, drop path and layer drop: the resumed run must also draw the random numbers of the uninterrupted one.
LAYER_DROP = (0.5, 0.5)
NOISY = [
    {"kind": "separate", "drop_path": 0.2, "layer_drop": LAYER_DROP[0]},
    {"kind": "shared", "dropout": 0.2, "layer_drop": LAYER_DROP[1]},
]
ASKS = "exit status 75 asks the scheduler to queue the run again; continue with --resume auto"


def _exact(run_dir: Path) -> list[dict[str, float]]:
    """Every record without what depends on the clock and the machine."""
    clock = ("throughput", "time/", "memory")
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{name: value for name, value in r.items() if not name.startswith(clock)} for r in records]


def _samples(trace: Path) -> list[list[str]]:
    return [json.loads(line)["ids"] for line in trace.read_text().splitlines()]


def _last_weights(run_dir: Path) -> dict[str, bytes]:
    from mmd2v.train.consolidate import consolidate

    _, newest = complete_checkpoints(run_dir / "checkpoints")[-1]
    return {name: value.detach().contiguous().numpy().tobytes() for name, value in consolidate(newest).items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def _write(file: Path, data: Path, **changes) -> Path:
    values = {
        "steps": STEPS,
        "data__eval": {"shards": str(data / "test")},
        "data__trace": str(file.parent / "trace" / file.stem),
        "evaluation__every": 5,
        "evaluation__at_start": True,
        "model__layers": NOISY,
        "engine__micro_batch_size": 4,
        "checkpoint__every": 8,
        "logging__every": 3,  # a run that stops after step 4 or 7 cuts an interval
    }
    return write_config(file, data, **(values | changes))


# ------------------------------------------------------------------------------------- one process


def _alone(folder: Path, data: Path) -> dict:
    """An uninterrupted run, and one that is stopped again and again, in one process; what is seen of them."""
    from mmd2v.config.load import load_config
    from mmd2v.distributed.preemption import STOP_SIGNALS, Preempted
    from mmd2v.train import loop, outlook
    from mmd2v.train.checkpoints.saving import Checkpointer

    seen: dict = {"left": []}

    def during(owner: object, name: str, number: signal.Signals, when=lambda self: True):
        """Send this process a signal inside of a method or function, once."""
        original = getattr(owner, name)

        def sending(*arguments, **options):
            if when(arguments[0] if arguments else None):
                os.kill(os.getpid(), number)
            return original(*arguments, **options)

        setattr(owner, name, sending)
        return lambda: setattr(owner, name, original)

    def train(config, *undo) -> None:
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        try:
            loop.train(config, "auto")
            seen["left"].append("finished")
        except Preempted as stop:
            seen["left"].append(str(stop))
        finally:
            for number, handler in before.items():  # ignored by a process that should end now
                signal.signal(number, handler)
            for one in undo:
                one()

    whole, stopped = (load_config(_write(folder / f"{name}.yaml", data)) for name in ("whole", "stopped"))
    train(whole)
    run_dir = Path(stopped.run_dir)
    train(stopped, during(outlook, "train_facts", signal.SIGTERM))  # while the run is built
    train(stopped, during(loop.Run, "_loader", signal.SIGUSR1))  # before its first step
    seen["before a step"] = (run_dir / "checkpoints").exists()
    train(
        stopped,
        during(loop.Run, "_train_step", signal.SIGTERM, lambda run: run.step == 2),
        during(Checkpointer, "save", signal.SIGUSR1),  # a second one
    )
    seen["after the first stop"] = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    # In the evaluation after step 5, which is finished first; step 6 comes before the ballot is read.
    train(stopped, during(loop, "evaluate", signal.SIGUSR1))
    train(stopped, during(loop.Run, "_train_step", signal.SIGTERM, lambda run: run.step == STEPS - 1))
    train(stopped)
    train(stopped)  # finished already
    seen["exact"] = _exact(Path(whole.run_dir)), _exact(run_dir)
    waiting = load_config(_write(folder / "waiting.yaml", data, checkpoint__asynchronous=False))
    for step in (2, 4):  # in mid-interval, and where a second stop finds no newer checkpoint than its own
        train(waiting, during(loop.Run, "_train_step", signal.SIGUSR1, lambda run, step=step: run.step == step))
    seen["after the stops of one that waits"] = sorted(p.name for p in Path(waiting.run_dir, "checkpoints").iterdir())
    train(waiting)
    seen["waiting"] = _exact(Path(waiting.run_dir))
    seen["last weights"] = [_last_weights(Path(config.run_dir)) for config in (whole, stopped, waiting)]
    clocked = load_config(_write(folder / "clocked.yaml", data, checkpoint__minutes=1e-6, checkpoint__keep=50))
    train(clocked)
    seen["clocked"] = (
        _exact(Path(clocked.run_dir)),
        sorted(p.name for p in Path(clocked.run_dir, "checkpoints").iterdir()),
    )
    seen["samples"] = [_samples(folder / "trace" / f"{name}.rank0.jsonl") for name in ("whole", "stopped")]
    seen["saves"] = [r["step"] for r in read_metrics(run_dir / "metrics.jsonl") if "time/save(s)" in r]
    return seen


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> dict:
    return run_distributed_test(_alone, 1, args=(tmp_path_factory.mktemp("alone"), data))[0]


def test_run_that_is_stopped_says_what_it_saved_and_how_to_go_on(alone):
    whole, building, before, first, evaluating, at_the_end, *rest = alone["left"][:8]
    assert [whole, *rest] == ["finished"] * 3
    assert building == f"SIGTERM: stopped before it began, with nothing to save; {ASKS}"
    assert before == f"SIGUSR1: stopped after step 0, with nothing new to save; {ASKS}"
    assert not alone["before a step"]
    assert first.startswith("SIGTERM: saved step 4 in ") and first.endswith(f"; {ASKS}")
    assert "step-000004 (" in first and " s); " in first
    assert alone["after the first stop"] == ["step-000004"]
    assert evaluating.startswith("SIGUSR1: saved step 7 in ")
    assert at_the_end.startswith("SIGTERM: saved step 12 in ")  # before the last evaluation


def test_run_that_was_stopped_has_every_record_and_sample_of_one_that_was_not(alone):
    whole, stopped = alone["exact"]
    assert stopped == whole  # to the last bit, in mid-interval too
    assert {r["step"] for r in whole} == {0, 3, 5, 6, 8, 9, 10, 12}
    whole, stopped = alone["samples"]
    assert stopped == whole and len(whole) == 2 * STEPS


def test_run_that_waits_for_its_checkpoints_is_that_which_does_not(alone):
    *stops, finished, _ = alone["left"][8:]
    assert [stop.partition(" in ")[0] for stop in stops] == ["SIGUSR1: saved step 4", "SIGUSR1: saved step 6"]
    assert all(stop.endswith(f"; {ASKS}") for stop in stops) and finished == "finished"
    assert alone["after the stops of one that waits"] == ["step-000004", "step-000006"]
    assert alone["waiting"] == alone["exact"][0]


def test_last_checkpoint_has_the_same_weights_whatever_came_before(alone):
    whole, *others = alone["last weights"]
    assert len(whole) > 10 and all(other == whole for other in others)


def test_steps_before_and_after_a_stop_drop_other_layers():
    """What the comparisons above would not notice otherwise: layer drop that begins anew, or stops."""
    drawn = [dropped_layers(position_seed(3, step), LAYER_DROP) for step in range(STEPS)]
    parts = [drawn[start:stop] for start, stop in ((0, 4), (4, 7), (7, 12))]
    assert all(len(set(part)) > 1 for part in parts)
    assert all(part != drawn[: len(part)] for part in parts[1:])


def test_checkpoints_by_the_clock_cut_no_interval(alone):
    records, names = alone["clocked"]
    assert records == alone["exact"][0]
    # Asked for after a step, and begun after the next.
    assert names == [f"step-{step:06d}" for step in range(2, STEPS + 1, 2)]


def test_time_of_a_save_is_told_with_the_next_interval(alone):
    assert alone["saves"] and set(alone["saves"]) <= {9, 12}


# ------------------------------------------------------------------------------ two ranks, commands


def _command(config: Path, ranks: int, **environment: str) -> tuple[list[int], list[str]]:
    """Statuses and errors of the ranks of one run; each leads a process group of its own."""
    port = free_port()
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), *filter(None, [os.environ.get("PYTHONPATH")])])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1"}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(port), **environment}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "mmd2v", "train", str(config), "--resume", "auto"],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=LONG)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def _train_both(*configs: Path) -> None:
    from mmd2v.config.load import load_config
    from mmd2v.train.loop import train

    for config in configs:
        train(load_config(config), "auto")


def test_all_ranks_leave_at_the_step_of_one_that_was_asked(data, tmp_path):
    # Loader processes, which the signals reach too.
    whole, stopped = (
        _write(tmp_path / f"{name}.yaml", data, steps=7, evaluation__at_start=False, data__workers=1)
        for name in ("whole", "stopped")
    )
    plugin = {"MMD2V_PLUGINS": "stop_signals_plugin", "STOP_RANK": "1", "STOP_AFTER": "3"}
    statuses, errors = _command(stopped, 2, **plugin)
    assert statuses == [75, 75], errors
    run_dirs = [tmp_path / "runs" / name for name in ("whole", "stopped")]
    # The ballot that says so is cast after step 3 and read after step 4.
    said = [[line for line in text.splitlines() if "SIG" in line] for text in errors]  # torch has warnings of its own
    assert len(said[0]) == 1 and said[1] == [], errors
    assert said[0][0].startswith(f"SIGUSR1: saved step 4 in {run_dirs[1] / 'checkpoints' / 'step-000004'} ("), errors

    run_distributed_test(_train_both, 2, args=(whole, stopped))
    assert _exact(run_dirs[1]) == _exact(run_dirs[0])
    for rank in range(2):
        traces = [_samples(tmp_path / "trace" / f"{name}.rank{rank}.jsonl") for name in ("whole", "stopped")]
        assert traces[0] == traces[1] and len(traces[0]) == 7
