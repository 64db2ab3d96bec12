"""DeepSpeed's own CPU Adam: compiled here, it trains and resumes as torch's AdamW does, to rounding."""

import os
import shutil
from pathlib import Path

import pytest
from harness import run_distributed_test
from training_runs import make_data, run_config

from mmd2v.errors import UserError
from mmd2v.train.loop import train
from mmd2v.train.metrics import read_metrics


def _losses(data: Path, folder: Path, name: str, stage: int, resume: str | None = None) -> list[float]:
    file = folder / f"{name}-{stage}.yaml"
    config = run_config(file, data, steps=4, checkpoint__every=2, optimizer__name=name, engine__zero_stage=stage)
    train(config, resume)
    return [r["loss"] for r in read_metrics(Path(config.run_dir) / "metrics.jsonl") if "loss" in r]


def _compare(data: Path, folder: Path) -> list[tuple[list[float], list[float], list[float]]]:
    results = []
    for stage in (0, 2):
        torchs = _losses(data, folder, "adamw", stage)
        own = _losses(data, folder, "deepspeed_adam", stage)
        shutil.rmtree(folder / "runs" / f"deepspeed_adam-{stage}" / "checkpoints" / "step-000004")
        results.append((torchs, own, _losses(data, folder, "deepspeed_adam", stage, "auto")))
    return results


def _without_compiler(data: Path, folder: Path, empty: Path) -> str:
    os.environ.update(PATH=str(empty), TORCH_EXTENSIONS_DIR=str(empty), CXX=str(empty / "no-compiler"))
    try:
        _losses(data, folder, "deepspeed_adam", 1)
    except UserError as error:
        return str(error)
    return "went well"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.slow  # the first build of the extension takes minutes
@pytest.mark.timeout(1800)
def test_deepspeed_adam_is_adamw(data, tmp_path):
    for torchs, own, resumed in run_distributed_test(_compare, 1, args=(data, tmp_path), timeout=1700)[0]:
        assert own == pytest.approx(torchs, abs=1e-4)
        # It multiplies up beta^t step by step, and takes a power after a resume.
        assert resumed == pytest.approx(own, abs=1e-5)


def test_deepspeed_adam_without_a_compiler_says_so(data, tmp_path):
    (empty := tmp_path / "empty").mkdir()
    (said,) = run_distributed_test(_without_compiler, 1, args=(data, tmp_path, empty))
    assert "optimizer.name: 'deepspeed_adam' cannot be used here: building DeepSpeedCPUAdam failed" in said
    assert "'adamw' needs no compiler" in said
