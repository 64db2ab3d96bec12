"""Benchmarks run, at a size that takes no time."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_retrieval_benchmark_appends_rows(tmp_path):
    out = tmp_path / "results" / "retrieval.csv"
    size = ["--captions", "60", "--images", "20", "--width", "8", "--repeats", "3"]
    command = [sys.executable, str(ROOT / "benchmarks" / "retrieval" / "run.py"), "--out", str(out), *size]
    for runs in (1, 2):
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        with open(out, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        timed = [(row["kernel"], row["provider"]) for row in rows if row["dtype"] == "fp32"]
        assert len(timed) % runs == 0 and {
            *(("rank_count", "mmd2v"), ("cosine_topk", "mmd2v"), ("matmul", "torch"), ("matmul_topk", "torch"))
        } <= set(timed)
    for row in rows:
        assert (row["shape"], row["repeats"]) == ("60x20x8", "3") and row["processor"]
        if row["kernel"] == "cosine_topk" and row["provider"] == "mmd2v":
            assert row["exact_percent"] == "100.00"
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["peak_extra_mb"]) >= 0

    out.write_text("kernel,ms\n")
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 1 and "has other columns" in refused.stderr and "Traceback" not in refused.stderr
    assert out.read_text() == "kernel,ms\n"


def test_contrastive_benchmark_times_forms_of_one_loss(tmp_path):
    out = tmp_path / "contrastive.csv"
    script = ROOT / "benchmarks" / "retrieval" / "contrastive.py"
    size = ["--batches", "32", "48", "--width", "8", "--repeats", "2"]
    subprocess.run(
        [sys.executable, str(script), "--out", str(out), *size], check=True, capture_output=True, timeout=300
    )
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["batch"] for row in rows} == {"32", "48"}
    for batch in ("32", "48"):
        values = {(row["loss"], row["provider"]): float(row["loss_value"]) for row in rows if row["batch"] == batch}
        assert values["contrastive", "mmd2v"] == pytest.approx(values["contrastive", "torch"], rel=1e-5)
        assert values["siglip", "mmd2v"] > 0


def test_cost_of_a_checkpoint_is_all_that_it_adds_over_the_steps_between(tmp_path):
    out = tmp_path / "stall"
    size = ["--width", "64", "--layers", "1", "--batch-size", "2", "--window", "2", "--rounds", "2"]
    script = ROOT / "benchmarks" / "train" / "checkpoint_stall.py"
    subprocess.run(
        [sys.executable, str(script), "--out", str(out), *size], check=True, capture_output=True, timeout=300
    )
    found = json.loads(out.with_suffix(".json").read_text())
    assert len(found["rounds"]) == 2
    for one in found["rounds"]:
        assert one["added"] == pytest.approx(one["call"] + one["slower"] + one["finish"])
        assert one["window_steps"] >= 2 and min(one["call"], one["finish"], one["synchronous"], one["step"]) > 0
    # Weights and, in fp32 each, the optimiser's copy of them and Adam's two averages.
    assert found["conditions"]["checkpoint(bytes)"] > 16 * found["conditions"]["parameters"]
    with open(out.with_suffix(".csv"), newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            expected = 100 * found["median"]["synchronous(s)"] / (int(row["every_steps"]) * found["median"]["step(s)"])
            assert float(row["synchronous_percent"]) == pytest.approx(expected, abs=1e-3)
