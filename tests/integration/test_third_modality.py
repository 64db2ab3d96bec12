"""Image, text and sound: a modality that the product does not know, added by an encoder class and a config."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from mmd2v_process import run_mmd2v
from PIL import Image
from training_runs import make_data, write_config

from mmd2v.train.metrics import read_metrics

STEPS, HALF = 24, 12
TESTS = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "MMD2V_PLUGINS": "spectrogram_encoder",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
}
NAMES = ("image", "text", "sound")


def _sound(jpeg: bytes) -> bytes:
    """Nine patches of four values that know what the picture shows, as a .npy file."""
    pixels = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB").resize((6, 6)), np.float32) / 127.5 - 1
    patches = pixels.mean(axis=2).reshape(3, 2, 3, 2).transpose(0, 2, 1, 3).reshape(9, 4)
    file = io.BytesIO()
    np.save(file, patches)
    return file.getvalue()


def _with_sound(shards: Path, out: Path) -> None:
    """Copy shards, with an array in every sample."""
    out.mkdir()
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as old, tarfile.open(out / path.name, "w") as new:
            for member in old:
                data = old.extractfile(member).read()
                new.addfile(member, io.BytesIO(data))
                if member.name.endswith(".jpg"):
                    info = tarfile.TarInfo(member.name.removesuffix(".jpg") + ".mel.npy")
                    content = _sound(data)
                    info.size = len(content)
                    new.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = make_data(tmp_path_factory.mktemp("data"))
    _with_sound(folder / "train", folder / "sound")
    return folder


def _config(file: Path, data: Path, **changes) -> Path:
    values = {
        "steps": STEPS,
        "data__train__shards": str(data / "sound"),
        "data__arrays": {"mel": {"key": "mel.npy", "shape": [9, 4]}},
        "data__captions_per_image": 2,
        "data__eval": {"shards": str(data / "test")},  # which has no sound: recall needs none
        "model__encoders__sound": {"kind": "spectrogram", "input": "mel"},
        "model__pooling": {"sound": "mean"},
        "objectives": [
            {"kind": "contrastive", "between": ["image", "text"]},
            {"kind": "cls_regression", "teacher": "resnet", "modalities": list(NAMES)},
        ],
        "engine__batch_size": 16,
        "checkpoint__every": HALF,
    }
    return write_config(file, data, **{**values, **changes})


def _mmd2v(*arguments: object) -> str:
    result = run_mmd2v(arguments, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def _losses(run_dir: Path) -> dict[int, dict[str, float]]:
    records = [r for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r]
    return {r["step"]: {k: v for k, v in r.items() if k.startswith("loss")} for r in records}


@pytest.fixture(scope="module")
def config(data, tmp_path_factory) -> Path:
    return _config(tmp_path_factory.mktemp("runs") / "three.yaml", data)


@pytest.fixture(scope="module")
def run_dir(config) -> Path:
    """Run directory of an uninterrupted run."""
    _mmd2v("train", config)
    return config.parent / "runs" / "three"


def test_every_loss_falls(run_dir):
    losses = _losses(run_dir)
    assert len(losses) == STEPS
    names = {"loss", "loss/contrastive_loss", *(f"loss/cls_regression_loss/{name}" for name in NAMES)}
    assert set(losses[1]) == names
    for name in names:
        first, last = (sum(losses[s][name] for s in steps) for steps in (range(1, 4), range(STEPS - 2, STEPS + 1)))
        assert last < 0.9 * first, name
    recall = [r["evaluation/i2t_R@10"] for r in read_metrics(run_dir / "metrics.jsonl") if "evaluation/i2t_R@10" in r]
    assert len(recall) == 1


def test_a_resumed_run_repeats_every_step(config, run_dir):
    again = run_dir.with_name("again")
    shutil.copytree(run_dir, again)
    shutil.rmtree(again / "checkpoints" / f"step-{STEPS:06d}")
    _mmd2v("train", config, "--run_dir", again, "--resume", "auto")
    assert _losses(again) == _losses(run_dir)


def test_two_ranks_have_the_losses_of_one(config, run_dir):
    pair = run_dir.with_name("pair")
    arguments = ["train", config, "--run_dir", pair, "--checkpoint.every", "null"]
    result = run_mmd2v(arguments, env=ENVIRONMENT, ranks=2)
    assert result.returncode == 0, result.stderr
    together, alone = _losses(pair), _losses(run_dir)
    for step in (1, 2, 3):
        assert together[step] == pytest.approx(alone[step], abs=1e-4)


def test_a_dry_run_shows_it_and_an_export_runs_it(config, run_dir, tmp_path):
    code = (
        "import sys, torch, spectrogram_encoder, mmd2v\n"
        "from mmd2v.cli.main import main\n"
        f"assert main(['train', {str(config)!r}, '--dry-run', '--run_dir', {str(tmp_path / 'none')!r}]) == 0\n"
        f"assert main(['export', {str(run_dir)!r}, '--out', {str(tmp_path / 'export')!r}]) == 0\n"
        f"encoder = mmd2v.load({str(tmp_path / 'export')!r})\n"
        "found = encoder.encode_array('mel', torch.zeros(2, 9, 4), batch_size=1)\n"
        "assert found.shape == (2, 32) and torch.isfinite(found).all()\n"
        "for name, shape in (('mal', (2, 9, 4)), ('mel', (2, 4))):\n"
        "    try:\n"
        "        encoder.encode_array(name, torch.zeros(shape))\n"
        "    except mmd2v.errors.UserError as error:\n"
        "        print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "encoders.sound" in result.stdout and "cls_regression_loss/sound" in result.stdout
    assert "encode_array: unknown name 'mal'. Did you mean 'mel'?" in result.stdout
    assert "encode_array: 'mel' has shape [2, 4], expected [B, 9, 4]" in result.stdout
