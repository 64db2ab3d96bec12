"""Benchmarks run, at a size that takes no time."""

import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import make_data, write_config
from waiting import LONG

ROOT = Path(__file__).parents[2]


def test_retrieval_benchmark_appends_rows(tmp_path):
    out = tmp_path / "results" / "retrieval.csv"
    size = ["--captions", "60", "--images", "20", "--width", "8", "--repeats", "3"]
    command = [sys.executable, str(ROOT / "benchmarks" / "retrieval" / "run.py"), "--out", str(out), *size]
    for runs in (1, 2):
        subprocess.run(command, check=True, capture_output=True, timeout=LONG)
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
    refused = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
    assert refused.returncode == 1 and "has other columns" in refused.stderr and "Traceback" not in refused.stderr
    assert out.read_text() == "kernel,ms\n"


def test_contrastive_benchmark_times_forms_of_one_loss(tmp_path):
    out = tmp_path / "contrastive.csv"
    script = ROOT / "benchmarks" / "retrieval" / "contrastive.py"
    size = ["--batches", "32", "48", "--width", "8", "--repeats", "2"]
    subprocess.run(
        [sys.executable, str(script), "--out", str(out), *size], check=True, capture_output=True, timeout=LONG
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
        [sys.executable, str(script), "--out", str(out), *size], check=True, capture_output=True, timeout=LONG
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


PEER_STUB = '''#!{python}
"""Stands for open_clip: answers as its process does, with numbers that are known."""
import json, sys
from pathlib import Path
import numpy as np
from tokenizers import Tokenizer

here = Path(__file__).parent
if sys.argv[2] == "merges":
    print(here / "merges.txt.gz")
    sys.exit()
settings = json.loads(Path(sys.argv[2]).read_text())
(here / "settings.json").write_text(json.dumps(settings))
tokenizer = Tokenizer.from_file(settings["folder"] + "/tokenizer.json")
log = open(here / "log.txt", "w")
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    operation = request["operation"]
    print(operation, request.get("steps", ""), file=log, flush=True)
    if operation == "describe":
        answer = {{"parameters": 7, "teacher_parameters": 0, "versions": {{"open_clip": "stub"}}}}
    elif operation == "tokens":
        answer = [one.ids for one in tokenizer.encode_batch(request["texts"])]
        answer[0] = answer[0][: len(answer[0]) - (here / "short").exists()]
    elif operation == "count":
        answer = {{"flops": 400, "teacher_flops": 0, "samples": 4}}
    elif operation == "product":
        answer = 1000.0
    elif operation == "window":
        part = {{"data": 0.5, "teacher": 0.0, "peak": 3000000}}
        answer = {{"steps": 1, "seconds": 2.0, "samples": 10, "tokens": 30, **part}}
    else:
        images, texts = len(request["images"]), len(request["texts"])
        rows = np.eye(images, dtype=np.float32)
        assert all(Path(file).stat().st_size for file in request["images"])
        np.savez(request["out"], images=rows, texts=np.repeat(rows, texts // images, 0))
        answer = True
    print(json.dumps(answer), flush=True)
'''


def throughput(*arguments: object) -> subprocess.CompletedProcess:
    script = ROOT / "benchmarks" / "train" / "throughput.py"
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True, timeout=LONG
    )


def test_throughput_of_a_config_with_a_teacher_beside_a_peer(tmp_path):
    (data := tmp_path / "data").mkdir()
    make_data(data)
    more = {"data__eval": {"shards": str(data / "test")}, "data__tokenizer__max_length": 200}
    config = write_config(tmp_path / "config.yaml", data, **more)
    stub = tmp_path / "peer"
    stub.write_text(PEER_STUB.format(python=sys.executable))
    stub.chmod(0o755)
    (tmp_path / "merges.txt.gz").write_bytes(gzip.compress(b"#version\nt h\nth e</w>"))
    out = tmp_path / "rates"
    small = ["--steps", 8, "--rounds", 2, "--uncounted", 1, "--threads", 1, "--out", out, "--engine.batch_size", 4]

    found = throughput(config, *small, "--peer-python", stub)
    assert found.returncode == 0, found.stderr
    ours, peer = csv.DictReader(io.StringIO(out.with_suffix(".csv").read_text()))
    assert (ours["provider"], peer["provider"], peer["open_clip"]) == ("mmd2v", "open_clip", "stub")
    assert ours["batch"] == "4" and ours["steps"] == "8" and ours["device"] == "cpu"
    # 10 samples of 100 operations each in 2 s are half of a product's 1000 a second; a quarter of the time is data.
    for name, value in {"samples_per_s": 5, "tokens_per_s": 15, "mfu_percent": 50, "data_percent": 25}.items():
        assert float(peer[name]) == value
    assert (float(peer["student_percent"]), float(peer["peak_memory_mb"])) == (75, 3)
    assert float(peer["i2t_R@1_percent"]) == float(peer["t2i_R@1_percent"]) == 100
    # One step to warm up, one to count, two windows of two, and the last, before the embeddings.
    log = (tmp_path / "log.txt").read_text().split("\n")
    windows = ["product ", "window 2"] * 2
    assert [line for line in log if line] == ["tokens ", "describe ", "window 2", "count ", *windows, "finish "]
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["model"]["vision_cfg"] == {
        **{"image_size": 32, "patch_size": 8, "layers": 3, "width": 32, "head_width": 8, "mlp_ratio": 4.0}
    }
    assert settings["model"]["text_cfg"]["context_length"] == 200 and settings["batch_size"] == 4

    shares = [float(ours[f"{part}_percent"]) for part in ("data", "teacher", "student")]
    assert min(shares[1:]) > 0 and sum(shares) == pytest.approx(100, abs=0.5)  # each a median of its own
    assert 0 < float(ours["teacher_gflop_per_sample"]) < float(ours["gflop_per_sample"])
    assert 0 <= float(ours["i2t_R@10_percent"]) <= 100 and float(ours["chance_i2t_R@10_percent"]) > 0
    record = json.loads(out.with_suffix(".json").read_text())
    for window in record["measured"][0]["windows"]:
        assert (window["steps"], window["samples"]) == (1, 4) and window["tokens"] > 4 * 17
    assert out.with_suffix(".svg").stat().st_size > 1000

    (tmp_path / "short").touch()
    refused = throughput(config, *small, "--peer-python", stub)
    assert refused.returncode == 1 and "different ids" in refused.stderr and "Traceback" not in refused.stderr


def test_throughput_alone_counts_the_operations_of_a_step(tmp_path):
    (data := tmp_path / "data").mkdir()
    make_data(data)
    layers, objectives = [{"kind": "separate", "modalities": ["image"]}], [{"kind": "contrastive"}]
    config = write_config(tmp_path / "config.yaml", data, model__layers=layers, objectives=objectives, teachers={})
    out = tmp_path / "rates"
    found = throughput(config, "--steps", 4, "--rounds", 1, "--uncounted", 0, "--threads", 1, "--out", out)
    assert found.returncode == 0, found.stderr
    (row,) = csv.DictReader(io.StringIO(out.with_suffix(".csv").read_text()))
    assert row["teacher_percent"] == "0.0" and row["open_clip"] == "" and row["i2t_R@1_percent"] == ""
    # A multiplication and an addition each, of 16 patches and a CLS of width 32: patches, one layer's maps and
    # attention, the two projections, and the two products of the contrastive loss on 8 samples; the backward pass twice
    # as much, but that nothing is asked for of the pixels.
    patches, maps = 16 * 3 * 8 * 8 * 32, 17 * 12 * 32 * 32 + 2 * 17 * 17 * 32
    heads = 2 * 32 * 32
    expected = 2 * (2 * patches + 3 * (maps + heads + 8 * 32))
    assert float(row["gflop_per_sample"]) * 1e9 == pytest.approx(expected, rel=0.02)

    refused = throughput(config, "--steps", 5, "--rounds", 2, "--uncounted", 3, "--out", out)
    assert refused.returncode == 1 and "expected at least 11" in refused.stderr and "Traceback" not in refused.stderr
