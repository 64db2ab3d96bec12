"""Meter, stopwatch, metrics file and the lines of a run."""

import errno
import io
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmd2v.distributed.environment import World
from mmd2v.errors import UserError
from mmd2v.train import metrics
from mmd2v.train.metrics import (
    LossMeter,
    Reporter,
    Stopwatch,
    forget_after,
    is_evaluated,
    read_metrics,
    recorded_losses,
    short_name,
)

ALONE = World(0, 1, 0, torch.device("cpu"), "gloo")
VALUES = {
    "loss": 1.5,
    "loss/cls_regression_loss/image": 0.25,
    "learning_rate": 1e-3,
    "throughput(samples/s)": 120.0,
    "time/data(%)": 3.2,
    "time/eta(s)": 3725.0,
    "memory(GB)": 1.25,
}


def test_meter_averages_micro_batches_and_starts_over():
    meter = LossMeter()
    assert meter.read(1) == {}
    for value in (1.0, 2.0):
        meter.add({"loss": torch.tensor(value, requires_grad=True), "a": torch.tensor(3 * value)})
    assert meter.read(2) == {"loss": 1.5, "a": 4.5}
    assert meter.read(2) == {"loss": 1.5, "a": 4.5}
    meter.reset()
    meter.add({"loss": torch.tensor(7.0)})
    assert meter.read(3) == {"loss": 7.0}


def test_meter_refuses_what_is_not_finite():
    meter = LossMeter()
    meter.add({"loss": torch.tensor(float("nan")), "a": torch.tensor(1.0)})
    with pytest.raises(UserError, match=r"step 7: loss became nan on rank\(s\) 0; try a lower optimizer.lr"):
        meter.read(7)


def test_meter_goes_on_with_an_interval_that_was_cut():
    meter = LossMeter()
    assert meter.state(1) is None
    for value in (0.1, 0.2):
        meter.add({"loss": torch.tensor(value), "a": torch.tensor(1 / 3)})
    state = json.loads(json.dumps(meter.state(1)))  # through a manifest
    again = LossMeter()
    again.load_state(state, ALONE, 1)
    for one in (meter, again):
        one.add({"loss": torch.tensor(0.7), "a": torch.tensor(0.3)})
    assert again.read(3) == meter.read(3)  # to the last bit

    of_two = {"terms": ["loss"], "micro_batches": 2, "accumulation": 1, "sums": [[2.0], [4.0]]}
    for rank, ranks, mean in ((0, 2, 1.0), (1, 2, 2.0), (0, 1, 1.5), (2, 3, 1.5)):
        again.load_state(of_two, replace(ALONE, rank=rank, size=ranks), 1)
        assert again.read(1) == {"loss": mean}
    again.load_state(None, ALONE, 1)
    assert again.read(1) == {}


def test_steps_of_a_cut_interval_weigh_the_same_with_another_accumulation():
    meter = LossMeter()
    meter.load_state({"terms": ["loss"], "micro_batches": 5, "accumulation": 1, "sums": [[10.0], [10.0]]}, ALONE, 2)
    for _ in range(2 * 5):
        meter.add({"loss": torch.tensor(1.0)})
    assert meter.read(10) == {"loss": 1.5}  # five steps at 2 and five at 1


def test_a_cut_interval_of_other_objectives_is_left():
    meter = LossMeter()
    for terms in (["loss"], ["loss", "b"]):
        meter.load_state(
            {"terms": terms, "micro_batches": 1, "accumulation": 1, "sums": [[9.0] * len(terms)]}, ALONE, 1
        )
        meter.add({"loss": torch.tensor(1.0), "a": torch.tensor(2.0)})
        assert meter.read(2) == {"loss": 1.0, "a": 2.0}


def test_reporter_goes_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = Reporter(tmp_path, ALONE, 10, 0, tensorboard=True)
    for step in (1, 2, 3):
        reporter.record(step, {"loss": float(step)})
    reporter.go_back(1)
    reporter.record(2, {"loss": 7.0})
    reporter.close()
    assert recorded_losses(tmp_path / "metrics.jsonl") == [(1, 1.0), (2, 7.0)]
    assert recorded_losses(tmp_path / "absent.jsonl") == []
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 7.0)]


def test_stopwatch_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    watch = Stopwatch()
    now[0] += 2.0
    watch.waited(0.5)
    assert watch.working == 2.0 and watch.waiting == 0.5
    watch.paused(1.5)
    assert watch.working == 0.5
    watch.reset()
    assert watch.waiting == watch.working == 0.0


def test_reporter_writes_file_and_lines(tmp_path, capsys):
    reporter = Reporter(tmp_path, ALONE, steps=10, first_step=0, tensorboard=False)
    reporter.record(5, VALUES)
    reporter.training_line(5, VALUES)
    reporter.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 5, **VALUES}]
    line = capsys.readouterr().out.strip()
    assert line == (
        "step 5/10  loss 1.5000  cls_regression/image 0.2500  lr 1.00e-03  120.0 samples/s  data 3%  1.25 GB  "
        "ETA 1:02:05"
    )


def test_other_ranks_are_silent(tmp_path, capsys):
    reporter = Reporter(tmp_path, World(1, 2, 1, torch.device("cpu"), "gloo"), 10, 0, tensorboard=True)
    reporter.record(1, VALUES)
    reporter.say("something")
    reporter.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_tensorboard_has_the_same_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = Reporter(tmp_path, ALONE, 10, 0, tensorboard=True)
    reporter.record(5, VALUES)
    reporter.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert len(events.Tags()["scalars"]) == len(VALUES)
    assert events.Scalars("loss")[0].value == 1.5


def test_resumed_run_rewrites_what_came_after(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    forget_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    forget_after(tmp_path / "absent.jsonl", 2)


def test_new_run_forgets_even_step_zero(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "evaluation/i2t_R@1": 0.1}\n')
    Reporter(tmp_path, ALONE, steps=10, first_step=0, tensorboard=False).close()
    assert path.read_text() == ""


def test_recorded_recall_is_found(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert not is_evaluated(path, 5)
    path.write_text('{"step": 5, "loss": 1.0}\n{"step": 4, "evaluation/i2t_R@1": 0.1}\n')
    assert not is_evaluated(path, 5) and is_evaluated(path, 4)


def test_names_on_a_line_are_short():
    assert short_name("loss/cls_regression_loss/image") == "cls_regression/image"
    assert short_name("loss") == "loss"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_file_on_a_full_disk_is_named(tmp_path, monkeypatch):
    reporter = Reporter(tmp_path, ALONE, steps=10, first_step=0, tensorboard=False)
    reporter._file.close()
    reporter._file = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 - the reporter closes it
    with pytest.raises(OSError, match="No space left") as told:
        reporter.record(5, VALUES)
    assert told.value.filename == "/dev/full"
    reporter.close()  # what did not fit is left over, and no second error

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sys.stdout", Full())
    reporter = Reporter(tmp_path, ALONE, steps=10, first_step=0, tensorboard=False)
    with pytest.raises(OSError) as told:
        reporter.say("step 5")
    assert told.value.filename == "standard output"
    reporter.close()
