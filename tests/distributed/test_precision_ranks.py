"""Runs whose config leaves the precision to devices that differ: from rank to rank, and from the start to a resume."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from harness import run_distributed_test
from training_runs import make_data, run_config, write_config

from mmd2v.config.load import load_config
from mmd2v.distributed.collectives import barrier, rank
from mmd2v.errors import UserError
from mmd2v.train import announcement, loop, precision
from mmd2v.train.checkpoints.folders import find_checkpoint
from mmd2v.train.checkpoints.manifest import read_manifest
from mmd2v.train.dry_run import dry_run

BF16, NONE = torch.bfloat16, None


def _on(half_of_rank: Callable[[int], torch.dtype | None]) -> None:
    """Let this process be on another machine: ``half_of_rank`` says what its processors multiply."""
    half = half_of_rank(rank())
    precision.half_of = lambda device: half
    announcement.multiplies = lambda device, dtype: dtype in (torch.float32, half)


def _run(file: Path, resume: str | None, *overrides: str) -> dict:
    """Train; return what this rank said, the precision it trained in, and what the run directory says of it."""
    seen = []
    made = loop.Run.__init__

    def watched(self, *arguments) -> None:
        made(self, *arguments)
        seen.append((self.config.engine.precision, self.engine.config.engine.precision, self.engine.module.autocast))

    loop.Run.__init__ = watched
    out = io.StringIO()
    error = ""
    try:
        with contextlib.redirect_stdout(out):
            loop.train(load_config(file, overrides), resume)
    except UserError as problem:
        error = str(problem)
    finally:
        loop.Run.__init__ = made
    barrier()
    run_dir = Path(load_config(file).run_dir)
    manifest = read_manifest(find_checkpoint(run_dir, "auto"))
    barrier()
    return {
        "seen": seen,
        "said": out.getvalue(),
        "error": error,
        "recorded": yaml.safe_load((run_dir / "config.yaml").read_text())["engine"]["precision"],
        "checkpoint": (manifest.step, manifest.precision),
    }


def _moved(data: Path, folder: Path) -> dict[str, dict]:
    results = {}
    settings = {"engine__precision": "auto", "engine__zero_stage": 1, "steps": 2, "checkpoint__every": 1}
    mixed = write_config(folder / "mixed.yaml", data, **settings)
    able = write_config(folder / "able.yaml", data, **settings)
    more = ("--steps", "3")

    _on(lambda rank: NONE if rank == 1 else BF16)
    results["mixed"] = _run(mixed, None)
    _on(lambda rank: BF16)
    results["able"] = _run(able, None)
    results["mixed, then all able"] = _run(mixed, "auto", *more)
    results["mixed, then by another name"] = _run(mixed, "auto", "--steps", "4", "--engine.precision", "bf16_autocast")
    _on(lambda rank: NONE)
    results["able, then none"] = _run(able, "auto", *more)

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        dry_run(run_config(folder / "dry.yaml", data, engine__precision="auto"))
    results["dry run"] = out.getvalue()
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict]]:
    data = make_data(tmp_path_factory.mktemp("data"))
    return run_distributed_test(_moved, 2, args=(data, tmp_path_factory.mktemp("runs")))


def _same(ranks: list[dict[str, dict]], name: str) -> dict:
    """What rank 0 has, once it is seen that rank 1 trained alike."""
    assert ranks[0][name]["seen"] == ranks[1][name]["seen"]
    return ranks[0][name]


def test_ranks_that_differ_take_what_the_least_able_has(ranks):
    found = _same(ranks, "mixed")
    assert found["seen"] == [("fp32", "fp32", False)]
    assert (found["recorded"], found["checkpoint"]) == ("fp32", (2, "fp32"))
    assert "auto is fp32 here: this processor has no instructions for products of bf16 (rank 1 of 2" in found["said"]
    assert "on cpu, fp32, ZeRO-1" in found["said"] and "warning" not in found["said"]


def test_ranks_that_all_have_it_take_bf16(ranks):
    found = _same(ranks, "able")
    assert found["seen"] == [("bf16_autocast", "bf16_autocast", True)]
    assert (found["recorded"], found["checkpoint"]) == ("bf16_autocast", (2, "bf16_autocast"))
    assert "auto is bf16_autocast here: this processor has instructions" in found["said"]


@pytest.mark.parametrize(("name", "kept"), [("mixed, then all able", "fp32"), ("able, then none", "bf16_autocast")])
def test_a_run_that_moves_keeps_its_precision(ranks, name, kept):
    found = _same(ranks, name)
    assert not found["error"] and found["seen"] == [(kept, kept, kept != "fp32")]
    assert (found["recorded"], found["checkpoint"]) == (kept, (3, kept))
    assert f"auto is {kept} here: as in " in found["said"]
    # Of what has changed, only the steps are told.
    assert "steps: 2 → 3" in found["said"] and "engine.precision: bf16_autocast →" not in found["said"]
    # There it is slow, which a person should know.
    assert (f"warning: engine.precision: found {kept}" in found["said"]) == (kept != "fp32")


def test_a_checkpoint_is_not_continued_in_a_precision_of_another_name(ranks):
    found = ranks[0]["mixed, then by another name"]
    assert "engine.precision: checkpoint fp32, this run bf16_autocast" in found["error"]
    assert (found["recorded"], found["checkpoint"]) == ("fp32", (3, "fp32"))


def test_dry_run_says_what_the_precision_would_be(ranks):
    lines = [line.strip() for line in ranks[0]["dry run"].splitlines()]
    engine = lines[lines.index("engine:") :]
    assert next(line for line in engine if line.startswith("precision:")) == "precision: fp32"
    assert any("auto is fp32 here: this processor has no instructions" in line for line in lines)
