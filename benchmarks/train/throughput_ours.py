"""mmd2v's own training run, stopped between windows of steps; started by throughput.py.

    python benchmarks/train/throughput_ours.py CONFIG.yaml THREADS

It is the loop of `mmd2v train`, with its loader, engine, teachers and final evaluation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from throughput_child import Channel, Window, counted_flops, product_rate
from torch import nn

from mmd2v.config.load import load_config
from mmd2v.config.schema import Config
from mmd2v.data.batch import Batch
from mmd2v.distributed import environment
from mmd2v.distributed.heartbeat import Pulse
from mmd2v.distributed.preemption import StopSignals
from mmd2v.errors import UserError
from mmd2v.models import attention
from mmd2v.models.teachers import Teacher
from mmd2v.train.engine import PRODUCTS
from mmd2v.train.loop import Run
from mmd2v.train.metrics import METRICS_FILE, read_metrics

PREFIX = "evaluation/"


class MeasuredRun(Run):
    """A run that asks before each window of steps, and answers after it."""

    def __init__(self, channel: Channel, config: Config, *rest: Any) -> None:
        super().__init__(config, *rest)
        self.channel = channel
        self.window = Window(self.world.device)
        self.dtype = PRODUCTS[self.config.engine.precision]
        self._request: dict[str, Any] = {}
        self._left = 0
        self._seen: Iterator[Batch] | None = None
        for teacher in self.parts.teachers.values():
            _time_teacher(teacher, self.window)

    def describe_itself(self) -> dict[str, Any]:
        """What a reader should know of how it trains."""
        student = self.parts.student
        return {
            "optimizer": self.engine.description,
            "parameters": sum(p.numel() for p in student.parameters()),
            "teacher_parameters": sum(teacher.parameter_count for teacher in self.parts.teachers.values()),
        }

    def next_request(self) -> None:
        """Wait for a request that wants steps; answer the others."""
        while True:
            self._request = self.channel.read()
            kind = self._request["operation"]
            if kind == "describe":
                self.channel.answer(self.describe_itself())
            elif kind == "product":
                self.channel.answer(product_rate(self.world.device, self.dtype))
            else:
                self._left = self._request.get("steps", 1)
                return

    def _train_step(self, batches: Iterator[Batch]) -> None:
        if self._seen is None:
            self._seen = self.window.batches(batches, self._size)
        if self._left == 0:
            self.next_request()
        if self._request["operation"] == "count":
            self.channel.answer(self._count(self._seen))
            self._left = 0
        elif self._request["operation"] == "window":
            steps, uncounted = self._request["steps"], self._request["uncounted"]
            if self._left == steps - uncounted:
                self.window.begin()
            super()._train_step(self._seen)
            self._left -= 1
            if self._left == 0:
                self.channel.answer(self.window.end(steps - uncounted))
        else:  # finish
            super()._train_step(self._seen)

    def _size(self, batch: Batch) -> tuple[int, int]:
        """Samples; and tokens that enter the layers, none of padding."""
        encoders = self.parts.student.encoders
        return len(batch), sum(int(encoders[name].lengths(batch).sum()) for name in encoders)

    def _count(self, batches: Iterator[Batch]) -> dict[str, int]:
        """Operations of one step: all, and the teachers'."""
        self.window.reset()
        teachers = 0

        def before(*_: object) -> None:
            nonlocal teachers
            teachers -= counter.get_total_flops()

        def after(*_: object) -> None:
            nonlocal teachers
            teachers += counter.get_total_flops()

        hooks = [
            hook
            for teacher in self.parts.teachers.values()
            for hook in (teacher.register_forward_pre_hook(before), teacher.register_forward_hook(after))
        ]
        with patch.object(attention, "xformers_available", lambda: False), counted_flops() as counter:
            super()._train_step(batches)
        for hook in hooks:
            hook.remove()
        return {"flops": counter.get_total_flops(), "teacher_flops": teachers, "samples": self.window.samples}


def _time_teacher(teacher: Teacher, window: Window) -> None:
    inside: list[Any] = []

    def enter(*_: object) -> None:
        inside.append(window.in_teacher())
        inside[-1].__enter__()

    def leave(*_: object) -> None:
        inside.pop().__exit__(None, None, None)

    module: nn.Module = teacher
    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def main(path: str, threads: int) -> None:
    """Train; the last request, `finish`, is answered with the recall when the run has ended."""
    channel = Channel()
    torch.set_num_threads(threads)
    config = load_config(path)
    world = environment.initialize(config.engine.device)
    with StopSignals() as signals, Pulse(world, config.engine.rank_timeout) as pulse:
        run = MeasuredRun(channel, config, world, None, signals, pulse)
        try:
            channel.answer("ready")
            run.train()
        finally:
            run.close()
    recall = [r for r in read_metrics(run.run_dir / METRICS_FILE) if any(name.startswith(PREFIX) for name in r)]
    found = recall[-1] if recall else {}
    channel.answer({name.removeprefix(PREFIX): value for name, value in found.items() if name.startswith(PREFIX)})


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except UserError as error:
        sys.exit(f"error: {error}")
