"""Benchmarks run, at a size that takes no time."""

import csv
import subprocess
import sys
from pathlib import Path

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
