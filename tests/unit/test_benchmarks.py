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
        assert [row["kernel"] for row in rows] == ["rank_count", "cosine_topk", "matmul", "matmul_topk"] * runs
    for row in rows:
        assert (row["shape"], row["dtype"], row["repeats"]) == ("60x20x8", "fp32", "3") and row["processor"]
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["peak_extra_mb"]) >= 0

    out.write_text("kernel,ms\n")
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 1 and "has other columns" in refused.stderr and "Traceback" not in refused.stderr
    assert out.read_text() == "kernel,ms\n"


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
