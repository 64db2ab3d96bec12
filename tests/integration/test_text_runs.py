"""A run on text alone as a user starts it: dry run, kill and resume, export, use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mmd2v_process import MMD2VProcess, run_mmd2v
from text_runs import make_text_data, sentences, write_text_config
from waiting import holding, wait_until

import mmd2v
from mmd2v.data.tokenizers import train_tokenizer
from mmd2v.export import export
from mmd2v.train.checkpoints.folders import complete_checkpoints
from mmd2v.train.metrics import read_metrics

STEPS = 30
EVERY = 6
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
MMD2V = [sys.executable, "-m", "mmd2v"]


def _mmd2v(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_mmd2v(arguments, env=ENVIRONMENT)


def _exact(run_dir: Path) -> list[dict[str, float]]:
    """Every record without what depends on the clock and the machine."""
    clock = ("throughput", "time/", "memory")
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{name: value for name, value in r.items() if not name.startswith(clock)} for r in records]


def _traced(file: Path) -> str:
    return Path(f"{file}.rank0.jsonl").read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_text_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(data, tmp_path_factory) -> Path:
    return write_text_config(
        tmp_path_factory.mktemp("runs") / "whole.yaml",
        data,
        steps=STEPS,
        data__workers=2,
        data__micro_batch_tokens=128,
        model__layers=[{"kind": "shared", "dropout": 0.2, "drop_path": 0.1}],
        checkpoint__every=EVERY,
    )


@pytest.fixture(scope="module")
def dry(config, data) -> str:
    """Output of a dry run before anything has been counted."""
    result = _mmd2v("train", config, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert not list((data / "train").glob("*.lengths"))
    return " ".join(result.stdout.split())


@pytest.fixture(scope="module")
def whole(config, dry) -> tuple[Path, str]:
    """Run directory and output of an uninterrupted run."""
    trace = config.parent / "trace-whole"
    result = _mmd2v("train", config, "--data.trace", trace)
    assert result.returncode == 0, result.stderr
    return Path(yaml.safe_load(config.read_text())["run_dir"]), result.stdout + result.stderr


def test_a_dry_run_says_what_is_missing_and_takes_a_step(dry, data):
    assert "1 rank × about 128 tokens × 2 accumulation, at most 256 tokens a step" in dry
    assert f"Make them with `mmd2v data lengths {data / 'train'} --tokenizer {data / 'tokenizer.json'}`" in dry
    assert "cls_regression_loss/text" in dry and "forward, backward and update in" in dry


def test_lengths_are_counted_once_and_the_run_says_what_an_epoch_is(whole, data):
    _, output = whole
    assert "counting the tokens of all texts, once" in output and "300/300 samples" in output
    assert "300 texts, " in output and " steps of at most 256 tokens, " in output
    assert len(list((data / "train").glob("*.lengths"))) == 8


def test_records_have_tokens_and_samples_and_epochs(whole):
    run_dir, output = whole
    records = read_metrics(run_dir / "metrics.jsonl")
    steps_an_epoch = int(output.partition(" tokens, ")[2].partition(" steps of at most")[0])
    for record in records:
        assert record["epoch"] == pytest.approx(record["step"] / steps_an_epoch)
        # Texts have 3 to 16 tokens.
        assert 3 < record["throughput(tokens/s)"] / record["throughput(samples/s)"] < 16
        rate, seconds = record["throughput(tokens/s)"], record["time/step(s)"]
        assert 0.75 * 256 < rate * seconds <= 256.01
    assert records[-1]["step"] == STEPS and records[-1]["epoch"] > 1.5
    assert records[-1]["loss"] < records[0]["loss"]


def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(whole, config):
    run_dir, trace = config.parent / "runs" / "killed", config.parent / "trace-killed"
    process = MMD2VProcess(["train", config, "--run_dir", run_dir, "--data.trace", trace], ENVIRONMENT | holding(20))
    metrics = run_dir / "metrics.jsonl"

    def is_there():
        assert process.poll() is None
        done = max((r["step"] for r in read_metrics(metrics)), default=0) if metrics.exists() else 0
        return done > EVERY and complete_checkpoints(run_dir / "checkpoints")

    try:
        wait_until(is_there)
    finally:
        process.kill()
    reached = max(r["step"] for r in read_metrics(metrics))
    assert EVERY < reached < STEPS
    result = _mmd2v("train", config, "--run_dir", run_dir, "--data.trace", trace, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    assert "continuing from" in result.stdout
    assert _exact(run_dir) == _exact(whole[0])
    assert _traced(trace) == _traced(config.parent / "trace-whole")


def test_another_budget_and_tokenizer_are_no_continuation(whole, config, tmp_path):
    train_tokenizer(sentences(300)[:100], "wordlevel", 500).save(str(tmp_path / "other.json"))
    changes = ["--data.tokenizer.path", tmp_path / "other.json", "--data.lengths_dir", tmp_path / "lengths"]
    result = _mmd2v("train", config, "--resume", "auto", "--data.batch_tokens", "300", *changes)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "data.batch_tokens: checkpoint 256, this run 300" in result.stderr
    assert "data.tokenizer (fingerprint): checkpoint" in result.stderr


def test_the_export_encodes_text(whole, tmp_path):
    out = export(whole[0], tmp_path / "encoder")
    encoder = mmd2v.load(out)
    similarity = encoder.encode_text(["word1 word2", "word1 word2", "word3"])
    assert similarity.shape == (3, 16) and torch.equal(similarity[0], similarity[1])
    card = (out / "README.md").read_text()
    assert f"{STEPS} steps of at most 256 tokens" in card and "texts seen, counted with repetition" in card
    assert "image" not in card.partition("## Training")[2].partition("## Measured")[0]
