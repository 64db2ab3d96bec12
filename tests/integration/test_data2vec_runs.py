"""data2vec pre-training as a user runs it: it learns, does not collapse, and is exported; the configs hold."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from mmd2v_process import run_mmd2v
from safetensors.torch import load_file
from training_runs import make_data, write_config

import mmd2v
from mmd2v.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 60


def _mmd2v(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_mmd2v(arguments, env={**os.environ, **environment}, cwd=ROOT)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Run directory of a short pre-training on generated scenes."""
    folder = tmp_path_factory.mktemp("run")
    config = write_config(
        folder / "shapes.yaml",
        make_data(folder),
        steps=STEPS,
        model__encoders={"image": {"kind": "patch", "patch_size": 4, "positions": "sincos", "norm": True}},
        model__layers=[{"kind": "separate", "count": 2, "norm": "post"}],
        model__masking={"image": {"masks": 4, "ratio": 0.6, "block": 2}},
        model__init_deviation=0.1,
        model__final_norm=False,
        model__projection={"kind": "linear", "dim": 8},
        teachers={"ema": {"name": "ema:image", "ema": {"decay": 0.98, "decay_end": 0.99}}},
        objectives=[{"kind": "data2vec", "teacher": "ema", "modality": "image", "decoder": {"layers": 2, "groups": 4}}],
        optimizer__lr=2e-3,
        engine__batch_size=16,
        logging__every=10,
    )
    result = _mmd2v("train", config)
    assert result.returncode == 0, result.stderr
    return Path(yaml.safe_load(config.read_text())["run_dir"])


def test_the_loss_falls_and_the_targets_go_on_varying(run):
    records = [r for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    losses = [r["loss/data2vec_loss/image"] for r in records]
    assert losses[-1] < 0.85 * losses[0]
    assert all(r["data2vec/target_var/image"] > 0.4 for r in records)
    assert records[-1]["data2vec/prediction_var/image"] > records[0]["data2vec/prediction_var/image"]


def test_student_and_average_are_exported(run, tmp_path):
    weights = {}
    for which in ("student", "ema"):
        result = _mmd2v("export", run, "--out", tmp_path / which, "--weights", which)
        assert result.returncode == 0, result.stderr
        weights[which] = load_file(tmp_path / which / "model.safetensors")
        assert mmd2v.load(tmp_path / which).student.embedding_width == 8
    assert weights["student"].keys() == weights["ema"].keys()
    checkpoint = next((run / "checkpoints").glob("step-*"))
    average = load_file(checkpoint / "averages.safetensors")
    name = "layers.1.mlp.image.fc1.weight"
    assert weights["ema"][name].equal(average[f"ema/{name}"])
    assert not weights["ema"][name].equal(weights["student"][name])


@pytest.mark.parametrize("name", ["data2vec_image", "data2vec_text"])
def test_configs_run_dry_without_data(name, shared):
    result = _mmd2v(
        *("train", f"configs/cpu/{name}.yaml", "--dry-run", "--model.width", 48, "--model.init_deviation", 0.1),
        *("--engine.batch_size", 4) if name.endswith("image") else ("--data.batch_tokens", 512),
        IMAGE_SHARDS="nowhere",
        TEXT_SHARDS="nowhere",
        MMD2V_TEACHERS=str(shared / "teachers"),
    )
    assert result.returncode == 0, result.stderr
    assert "forward, backward and update in" in result.stdout and "teachers.ema" in result.stdout
