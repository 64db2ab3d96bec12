"""The helpers of the data benchmarks, at a size that takes no time."""

import csv
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_samples import captions_of, encoded, make_shards, write_tar
from waiting import LONG

from mmd2v.cli.data import main
from mmd2v.config.schema import ImageTransformConfig
from mmd2v.data.bench import Stages, bench, tokenizer_kind
from mmd2v.data.shards import ShardSet
from mmd2v.data.tokenizers import train_tokenizer
from mmd2v.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "data"


@pytest.fixture
def module(monkeypatch):
    """Import a script of the benchmarks as they import each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == BENCHMARKS:
            del sys.modules[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    make_shards(folder / "set", 12, 4)
    train_tokenizer([text for n in range(12) for text in captions_of(n)], "wordlevel", 200).save(
        str(folder / "tokenizer.json")
    )
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_bench_measures_every_stage_and_the_loader(folder, workers):
    report = bench(
        [str(folder / "set")], size=16, batch=4, workers=workers, seconds=0.1, tokenizer=folder / "tokenizer.json"
    )
    assert list(report.stages.seconds) == ["read", "decode", "crop", "tokens"]
    assert report.stages.samples > 0 and report.stages.bytes > 0 and all(t > 0 for t in report.stages.seconds.values())
    assert report.loader_rate > 0 and report.first_batch > 0
    assert report.limit in report.stages.seconds
    text = str(report)
    assert all(word in text for word in ("samples/s", "MB/s", "loader", "limit: "))


def test_bench_command_without_text(folder, capsys):
    assert (
        main(["bench", str(folder / "set"), "--size", "16", "--batch", "4", "--seconds", "0.1", "--workers", "0"]) == 0
    )
    out = capsys.readouterr().out
    assert "decode" in out and "tokens" not in out


@pytest.mark.parametrize(
    ("flag", "change"),
    [
        ("--size", {"size": 0}),
        ("--batch", {"batch": 0}),
        ("--workers", {"workers": -1}),
        ("--seconds", {"seconds": 0.0}),
    ],
)
def test_bench_names_a_flag_out_of_range(folder, flag, change):
    with pytest.raises(UserError, match=f"^{flag}: found"):
        bench([str(folder / "set")], **change)


def test_bench_passes_over_damage_but_not_over_everything(tmp_path):
    good = [("a.jpg", encoded(0)), ("a.txt", b"one"), ("b.jpg", b"no image"), ("b.txt", b"two")]
    write_tar(tmp_path / "some.tar", good)
    times = Stages(str(tmp_path / "some.tar"), ImageTransformConfig(size=16), None).run(0, 4)
    assert times.samples == 2  # a in both passes
    write_tar(tmp_path / "none.tar", good[2:])
    with pytest.raises(UserError, match="sample b: the image does not decode"):
        Stages(str(tmp_path / "none.tar"), ImageTransformConfig(size=16), None).run(0, 4)


def test_tokenizer_kinds_are_told_by_their_files(tmp_path):
    (tmp_path / "fairseq").mkdir()
    (tmp_path / "fairseq" / "dict.txt").write_text("")
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces" / "m.model").write_text("")
    kinds = {"fairseq": "fairseq_gpt2", "pieces": "sentencepiece", "x.model": "sentencepiece", "t.json": "hf"}
    assert {name: tokenizer_kind(tmp_path / name) for name in kinds} == kinds


def test_shard_set_holds_each_sample_with_its_caption(module, tmp_path):
    samples = [(f"{n:03d}-k", encoded(n), f"caption {n}") for n in range(10)]
    folder = module("shard_sets").write_set(tmp_path / "set", samples, shards=3)
    shards = ShardSet(str(folder))
    assert len(shards) == 10 and len(shards.paths) == 3
    read = [shards.read(*shards.locate(n)) for n in range(10)]
    assert [(raw.id, bytes(raw.image), raw.captions) for raw in read] == [(k, d, (c,)) for k, d, c in samples]


def test_clip_tokenizer_gives_clips_ids(module, tmp_path, shared):
    from tokenizers import Tokenizer

    merges = shared / "tokenizers/clip_bpe/bpe_simple_vocab_16e6.txt.gz"
    path = module("shard_sets").clip_tokenizer(merges, tmp_path / "t.json")
    # Ids from OpenAI's simple_tokenizer.
    assert Tokenizer.from_file(str(path)).encode("a photo of a cat").ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_loader_rate_throws_away_what_was_made_before(module):
    seen = []

    def batches():
        for n in range(10**9):
            seen.append(n)
            time.sleep(0.001)
            yield n

    rate = module("child").LoaderRate(batches, lambda batch: 64, queued=4)
    samples, seconds, processor = rate(0.05)
    assert samples == 64 * (len(seen) - 6) and seconds >= 0.05 and processor >= 0


def test_child_answers_requests_and_reports_failures(module, tmp_path):
    run = module("run")
    script = tmp_path / "double.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from child import serve\n"
        "serve({'double': lambda value: (print('noise'), 2 * value)[1]})\n"
    )
    with run.Child([sys.executable, str(script)], max(os.sched_getaffinity(0))) as child:
        assert child("double", value=21) == 42
        with pytest.raises(UserError, match=r"(?s)double\.py failed: .*KeyError"):
            child("triple", value=1)


def test_results_become_rows_a_summary_and_a_drawing(module, tmp_path):
    run = module("run")
    results = run.Results()
    for factor in (1.0, 1.1):
        for what, provider, stage, rate in (
            ("loader", "mmd2v", "whole loader", 600),
            ("loader", "open_clip", "whole loader", 200),
            ("stage", "torchvision", "decode", 800),
            ("stage", "PIL", "decode + crop + normalise", 400),
        ):
            results.rate((what, provider, stage, "500px"), (factor * rate, 1.0, 0.5))
    for passes, megabytes in ((2, 100.0), (run.PASSES, 101.0)):
        key = ("memory", "mmd2v", f"after {passes} passes over {run.PASS_SAMPLES} samples", "500px")
        results.add(key, "MB", megabytes)
    machine = ["cpu", "3", "2", "1", "0", "0", "c"]
    run.write_csv(tmp_path / "r.csv", results.rows(machine))
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and all(None not in row and None not in row.values() for row in rows)
    assert float(rows[0]["p50"]) == 630 and float(rows[0]["share_of_bare_decode"]) == 0.75
    assert float(rows[0]["per_cpu_second"]) == 1260 and rows[0]["commit"] == "c"
    options = run.Options(peer_python=Path("p"), out=tmp_path / "r.csv", sets=("500px",))
    found = run.summary(options, results, machine, {})["result"]["500px"]
    for clock in ("", " by processor time"):
        assert found[f"mmd2v / open_clip{clock}"] == 3.0 and found[f"mmd2v / bare decode{clock}"] == 0.75
        assert found[f"open_clip / bare decode{clock}"] == 0.25
    assert found["memory after 20 passes / after 2"] == 1.01
    run.draw(tmp_path / "r.svg", results, ["500px"], machine)
    assert (tmp_path / "r.svg").read_text().startswith("<?xml")


def test_scale_measures_a_set_that_does_not_exist(tmp_path):
    out = tmp_path / "scale.csv"
    size = [
        "--shards",
        "40",
        "--samples",
        "50",
        "--ranks",
        "1",
        "--workers",
        "1",
        "--micro-batch",
        "4",
        "--repeats",
        "1",
    ]
    command = [sys.executable, str(BENCHMARKS / "scale.py"), "--out", str(out), *size]
    subprocess.run(command, check=True, capture_output=True, timeout=LONG)
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["measure"] for row in rows] == ["first batches", "memory", "resume", "start"]
    assert [row["unit"] for row in rows] == ["s", "MB", "s", "s"]
    assert all(row["p50"] == row["greatest"] and row["samples"] == "2000" for row in rows)  # repeated once
    assert all(0 < float(row["p50"]) < 300 for row in rows if row["unit"] == "s")
