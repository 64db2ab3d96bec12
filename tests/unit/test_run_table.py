"""Tables of runs: statistics worked out by hand, and the runner with a stand-in for `mmd2v`."""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LONG, wait_until

from mmd2v.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "method"

CONFIG = """
name: tiny
run_dir: unused
steps: 4
data: {train: {shards: unused}, eval: {shards: unused}, image: {size: 32}, tokenizer: {path: unused, max_length: 8}}
model:
  width: 16
  heads: 2
  encoders: {image: {kind: patch, patch_size: 8}, text: {kind: tokens}}
  layers: [{kind: shared}]
objectives: [{kind: contrastive}]
engine: {batch_size: 4}
"""

# Writes what a run writes; "fail" and "slow" in the config's name say how it behaves. Its recall is a function of
# row and seed: i2t R@1 is 0.2 for a, 0.25 for b, plus a hundredth a seed for both and, for b, another 0.01 for seed 2.
FAKE = """
import json, os, sys, time
from pathlib import Path
command, config, *rest = sys.argv[1:]
flags = dict(zip(rest[::2], rest[1::2]))
row, seed, run = Path(config).stem, int(flags["--seed"]), Path(flags["--run_dir"])
assert command == "train" and flags["--resume"] == "auto"
print("threads", os.environ["OMP_NUM_THREADS"], "extra", flags.get("--optimizer.lr"), flush=True)
with open(run.parent / "started.txt", "a") as file:
    file.write(run.name + "\\n")
if "slow" in row:
    time.sleep(1000)
if "fail" in row and not (run.parent / "repaired").exists():
    sys.exit("error: out of luck")
(run / "checkpoints/step-000004").mkdir(parents=True)
parameters = {"layers.0.w": [[10, 20], 0], "encoders.text.table": [[100], None], "objectives.head": [[5], 1]}
(run / "checkpoints/step-000004/mmd2v.json").write_text(json.dumps({"parameters": parameters}))
recall = (0.2 if row == "a" else 0.25) + 0.01 * seed + (0.01 if row == "b" and seed == 2 else 0)
metrics = {"i2t_R@1": recall, "i2t_R@1_worst": 0.1, "chance_i2t_R@1": 0.001, "t2i_R@1": 0.1, "images": 1000}
lines = [
    {"step": 2, "loss": 1.0, "time/step(s)": 30.0},
    {"step": 2, "evaluation/i2t_R@1": 0.01},
    {"step": 4, "loss": 1.0, "time/step(s)": 60.0},
    {"step": 4, **{f"evaluation/{key}": value for key, value in metrics.items()}, "evaluation/captions": 5000},
]
(run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


@pytest.fixture
def module(monkeypatch):
    """Import a script of the benchmarks as they import each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == BENCHMARKS:
            del sys.modules[name]


# ------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (120, 1.9799), (2000, 1.9612)],
)
def test_quantiles_are_those_of_the_printed_tables(module, degrees, quantile):
    assert module("intervals").student_t(degrees) == pytest.approx(quantile, abs=6e-5)


def test_interval_by_hand(module):
    intervals = module("intervals")
    # Mean 2, deviation 1, error 1/√3; t of two degrees is 4.3027: 4.3027 / 1.7321 = 2.4841.
    assert intervals.mean_interval([1, 2, 3]) == pytest.approx((2, 2.4841), abs=1e-4)
    assert intervals.mean_interval([5]) == (5, None)
    assert intervals.mean_interval([4, 4]) == (4, 0)
    with pytest.raises(ValueError, match="found none"):
        intervals.mean_interval([])
    with pytest.raises(ValueError, match="at least 1, found 0"):
        intervals.student_t(0)


def test_difference_is_taken_seed_by_seed(module):
    intervals = module("intervals")
    # Differences 1, 1, 4: mean 2, variance 3, error 1; the seeds 3 and 7 have no partner.
    found = intervals.paired_difference({0: 11, 1: 21, 2: 34, 3: 0}, {0: 10, 1: 20, 2: 30, 7: 9})
    assert found == pytest.approx((2, 4.3027), abs=1e-4)
    assert intervals.paired_difference({0: 3}, {0: 1}) == (2, None)
    assert intervals.paired_difference({0: 3}, {1: 1}) is None


def test_sampling_interval_by_hand(module):
    half = module("intervals").binomial_half_width
    # Wilson at p = 1/2, n = 100: z / (1 + z²/n) · √(1/400 + z²/40000) = 1.95996 / 1.038415 · 0.050951 = 0.09617.
    assert half(0.5, 100) == pytest.approx(0.09617, abs=1e-5)
    assert half(0.0, 1000) == pytest.approx(0.00191, abs=1e-5)  # not 0: nothing found does not mean nothing to find


# ----------------------------------------------------------------------------------------------- table


def test_tables_by_hand(module):
    table = module("table")

    def result(row, seed, recall, parameters=None):
        return table.RunResult(row, seed, 4, {"i2t_R@1": recall}, 1000, 5000, 2.0, parameters, parameters)

    results = [result("a", 0, 0.1), result("a", 1, 0.2), result("b", 0, 0.3, 1_500_000)]
    text = table.summary_table(results)
    assert text.splitlines()[2] == "| row | seeds | image → text R@1 | student (M) | trainable (M) | training (min) |"
    # Mean 15, deviation 7.0711, error 5, t of one degree 12.7062.
    assert text.splitlines()[4:] == [
        "| a | 0, 1 | 15.0 ± 63.5 | – | – | 2.0 |",
        "| b | 0 | 30.0 | 1.50 | 1.50 | 2.0 |",
    ]
    assert table.difference_table(results, "a").splitlines()[-1] == "| b | 0 | +20.0 |"
    assert table.difference_table([results[1], results[2]], "a").splitlines()[-1] == "| b | – | – |"
    # 20 % of 1,000: 1.95996 · √(0.16 / 1000 + …) / 1.00384 = 2.48 points.
    assert "± 2.5 points for image → text R@1 (1,000 queries, at 20.0 %)" in table.sampling_note(results)


def test_tables_of_a_measurement(module):
    table = module("table")

    def result(row, seed, mean):
        numbers = {"mean": mean, "second_to_first_R@5": 0.9}
        return table.RunResult(row, seed, 4, numbers, None, None, 2.0, None, None, queries=1000)

    results = [result("a", 0, 0.5), result("a", 1, 0.5)]
    lines = table.summary_table(results, "Accuracy").splitlines()
    assert lines[0] == "Accuracy in percent, mean ± 95 % interval over the seeds (Student's t)."
    assert lines[2].startswith("| row | seeds | mean of the four | sentence 2 → 1 R@5 | student (M) |")
    # Widest where a share is next to a half: 1.95996 / 1.003841 · √(0.25 / 1000 + …) = 3.09 points.
    note = table.sampling_note(results)
    assert "± 3.1 points at most (1,000 queries, at 50.0 %)" in note and "captions" not in note


def test_folders_of_the_machine_are_left_out(module):
    words = ["/usr/bin/x", "--data.train.shards", "/data/a/train", "--w=/data/w.pt", "hf:/data/minilm", "a/b", "1e-3"]
    kept = ["x", "--data.train.shards", "train", "--w=w.pt", "hf:minilm", "a/b", "1e-3"]
    assert [module("table").without_folder(word) for word in words] == kept


# ---------------------------------------------------------------------------------------------- runner


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    for name in ("a", "b", "fails", "slow"):
        (tmp_path / f"{name}.yaml").write_text(CONFIG)
    return tmp_path


def arguments(folder: Path, *rows: str, seeds: tuple[int, ...] = (0, 1, 2)) -> list[str]:
    return [
        *("--runs", *(str(folder / f"{row}.yaml") for row in rows), "--seeds", *map(str, seeds)),
        *("--out", str(folder / "out" / "v1.0"), "--work", str(folder / "work")),
        *("--launcher", f"{sys.executable} {folder / 'fake.py'}"),
    ]


def started(folder: Path) -> list[str]:
    return sorted((folder / "work" / "started.txt").read_text().split())


def test_a_table_of_two_rows(module, folder, capsys):
    main = module("run_table").main
    extra = ["--", "--optimizer.lr", "1e-3"]
    assert main([*arguments(folder, "a", "b"), "--baseline", "a", "--jobs", "2", *extra]) == 0
    assert started(folder) == [f"{row}-s{seed}" for row in "ab" for seed in range(3)]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (folder / "work" / "b-s1.log").read_text() == f"threads {threads} extra 1e-3\n"

    rows = list(csv.DictReader((folder / "out" / "v1.0.csv").read_text().splitlines()))
    assert [(row["row"], row["seed"], row["i2t_R@1"]) for row in rows[2:4]] == [
        ("a", "2", "22.00"),
        ("b", "0", "25.00"),
    ]
    assert list(rows[0]) == [
        *("row", "seed", "steps", "i2t_R@1", "t2i_R@1"),
        *("train_minutes", "student_parameters", "trainable_parameters"),
    ]
    # 2 steps of 30 s and 2 of 60 s; 200 + 100 of the student, 200 + 5 trainable.
    assert list(rows[0].values())[5:] == ["3.00", "300", "205"]

    text = (folder / "out" / "v1.0.md").read_text()
    # a: 20, 21, 22, deviation 1 → 2.48; b: 25, 26, 28, deviation 1.5275 → 3.79.
    assert "| a | 0, 1, 2 | 21.0 ± 2.5 | 10.0 ± 0.0 | 0.00 | 0.00 | 3.0 |" in text
    assert "| b | 0, 1, 2 | 26.3 ± 3.8 |" in text
    # Differences 5, 5, 6: mean 5.33, deviation 0.5774, error 1/3 → 1.43.
    assert "| b | 0, 1, 2 | +5.3 ± 1.4 | +0.0 ± 0.0 |" in text
    assert text.count("binomial") == 1 and text in capsys.readouterr().out + "\n"

    found = json.loads((folder / "out" / "v1.0.json").read_text())
    assert found["seeds"] == [0, 1, 2] and list(found["configs"]) == ["a.yaml", "b.yaml"]
    assert found["command"].endswith("--resume auto --optimizer.lr 1e-3") and found["unfinished"] == []
    assert found["versions"]["torch"] and found["machine"]["processor"] and len(found["results"]) == 6
    assert str(folder) not in json.dumps(found)


def test_what_is_finished_is_not_started_again(module, folder, capsys):
    main = module("run_table").main
    assert main([*arguments(folder, "a", "fails", seeds=(0,)), "--jobs", "1"]) == 1
    captured = capsys.readouterr()
    assert "fails-s0: ended with status 1" in captured.err and "error: out of luck" in captured.err
    assert "Not finished: fails-s0." in (folder / "out" / "v1.0.md").read_text()

    (folder / "work" / "repaired").touch()
    assert main(arguments(folder, "a", "fails", seeds=(0, 1))) == 0
    assert "4 runs, 1 of them finished before" in capsys.readouterr().out
    assert started(folder) == ["a-s0", "a-s1", "fails-s0", "fails-s0", "fails-s1"]
    assert (folder / "work" / "fails-s0.log").read_text().count("threads") == 2
    assert "Not finished" not in (folder / "out" / "v1.0.md").read_text()


def test_a_result_of_another_config_is_not_taken(module, folder):
    main = module("run_table").main
    assert main(arguments(folder, "a", seeds=(0,))) == 0
    with pytest.raises(UserError, match="the config or the overrides have changed"):
        main([*arguments(folder, "a", seeds=(0,)), "--", "--steps", "5"])
    (folder / "a.yaml").write_text("base: b.yaml\n")
    with pytest.raises(UserError, match=r"a-s0\.result\.json: the config or the overrides have changed"):
        main(arguments(folder, "a", seeds=(0,)))
    (folder / "work" / "a-s0.result.json").write_text("{}")
    with pytest.raises(UserError, match=r"a-s0\.result\.json: not a result"):
        main(arguments(folder, "a", seeds=(0,)))


def test_what_makes_no_table_is_refused_before_anything_runs(module, folder):
    main = module("run_table").main
    (folder / "other").mkdir()
    (folder / "other" / "a.yaml").write_text(CONFIG)
    (folder / "typo.yaml").write_text(CONFIG.replace("steps", "stebs"))
    for rows, more, message in [
        (("a", "other/a"), [], "two configs have one file name"),
        (("a", "b"), ["--baseline", "bb"], "--baseline: unknown name 'bb'. Did you mean 'b'"),
        (("a",), ["--jobs", "0"], "--jobs: found 0"),
        (("a", "typo"), [], "Did you mean 'steps'"),
        (("a", "absent"), [], "absent.yaml"),
        (("a",), ["--", "--optimizer.rate", "1"], "rate"),
    ]:
        with pytest.raises(UserError, match=message):
            main([*arguments(folder, *rows), *more])
    with pytest.raises(UserError, match="--seeds: found"):
        main(arguments(folder, "a", seeds=(1, 1)))
    assert not (folder / "work").exists()


def test_a_run_without_recall_and_a_launcher_that_is_none(module, folder, capsys):
    main = module("run_table").main
    (folder / "fake.py").write_text("")
    assert main(arguments(folder, "a", seeds=(0,))) == 1
    assert "a-s0: " in (error := capsys.readouterr().err) and "holds no recall" in error
    assert main([*arguments(folder, "a", seeds=(0,)), "--launcher", str(folder / "nothing")]) == 1
    assert "nothing cannot be started" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_an_interruption_ends_the_runs(folder):
    command = [sys.executable, str(BENCHMARKS / "run_table.py"), *arguments(folder, "slow", seeds=(0, 1))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until((folder / "work" / "started.txt").exists)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=LONG)
    finally:
        process.kill()
    assert process.returncode == 1 and "interrupted; the same command goes on" in error
    assert started(folder) == ["slow-s0"]


def test_scale_is_asked_of_every_run_and_part_of_what_a_result_is_of(module, tmp_path):
    run_table = module("run_table")
    (tmp_path / "small.yaml").write_text("steps: 2\n")
    config = tmp_path / "a.yaml"
    config.write_text(CONFIG + "scales: {small: {file: small.yaml}}\n")
    arguments = {"runs": (config,), "out": tmp_path / "out", "work": tmp_path / "work"}
    (job,) = run_table.plan(run_table.Options(**arguments, scale="small"), [])
    (plain,) = run_table.plan(run_table.Options(**arguments), [])
    assert job.command[-2:] == ("--scale", "small") and "--scale" not in plain.command
    (tmp_path / "small.yaml").write_text("steps: 3\n")
    (changed,) = run_table.plan(run_table.Options(**arguments, scale="small"), [])
    assert len({job.inputs, plain.inputs, changed.inputs}) == 3
    with pytest.raises(UserError, match="--scale"):
        run_table.plan(run_table.Options(**arguments, scale="smal"), [])


def measured(module, folder, monkeypatch, *more: str, seeds: tuple[int, ...] = (0, 1, 2)) -> int:
    """Run rows a and b, an export being its row's name and a number: 0.5 of an untrained student, else 0.6 or 0.7."""
    run_table, measure = module("run_table"), module("measure")

    def write(text: str, out: Path) -> None:
        out.mkdir()
        (out / "row").write_text(text)

    def number(self, export: Path):
        return measure.Measured({"knn_top1": float((export / "row").read_text())}, 1000)

    monkeypatch.setattr(run_table, "export", lambda run, out: write("0.6" if run.name[0] == "a" else "0.7", out))
    monkeypatch.setattr(run_table, "export_untrained", lambda config, words, out, scale: write("0.5", out))
    monkeypatch.setattr(measure.Measurement, "__call__", number)
    knn = ["--measure", "knn", "--train", str(folder / "bank"), "--test", str(folder / "queries")]
    return run_table.main([*arguments(folder, "a", "b", seeds=seeds), "--baseline", "a", *knn, *more])


def test_a_table_of_what_is_measured_after_training(module, folder, monkeypatch):
    # A run of one modality leaves no recall.
    fake = (folder / "fake.py").read_text()
    (folder / "fake.py").write_text(fake.replace("lines = [", "metrics = {}\nlines = ["))
    assert measured(module, folder, monkeypatch, "--untrained", "--note", "Few images.") == 0
    assert started(folder) == [f"{row}-s{seed}" for row in "ab" for seed in range(3)]
    text = (folder / "out" / "v1.0.md").read_text()
    assert text.splitlines()[2].startswith("Accuracy of 10-NN classification (pooled vector) in percent, mean ±")
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table[:5] == [
        "| row | seeds | k-NN accuracy | student (M) | trainable (M) | training (min) |",
        "| a | 0, 1, 2 | 60.0 ± 0.0 | 0.00 | 0.00 | 3.0 |",
        "| a, untrained | 0 | 50.0 | – | – | 0.0 |",
        "| b | 0, 1, 2 | 70.0 ± 0.0 | 0.00 | 0.00 | 3.0 |",
        "| b, untrained | 0 | 50.0 | – | – | 0.0 |",
    ]
    # Untrained students are for reference: no difference is taken to them.
    assert table[5:] == ["| row | seeds | k-NN accuracy |", "| b | 0, 1, 2 | +10.0 ± 0.0 |"]
    assert text.endswith("Few images.\n") and "1,000 queries" in text
    found = json.loads((folder / "out" / "v1.0.json").read_text())
    assert found["measurement"] == "eval knn EXPORT --train bank --test queries --k 10 --features pooled"
    assert found["notes"] == ["Few images."] and str(folder) not in json.dumps(found)
    assert [result["steps"] for result in found["results"]] == [4, 4, 4, 0, 4, 4, 4, 0]
    assert not list((folder / "work").glob("*.export"))


def test_a_result_of_another_measurement_is_not_taken(module, folder, monkeypatch):
    assert measured(module, folder, monkeypatch, seeds=(0,)) == 0
    assert measured(module, folder, monkeypatch, seeds=(0,)) == 0
    assert started(folder) == ["a-s0", "b-s0"]
    with pytest.raises(UserError, match="or the measurement"):
        measured(module, folder, monkeypatch, "--k", "5", seeds=(0,))


def test_measurements_that_lack_their_files_are_refused(module, folder):
    main = module("run_table").main
    for more, message in [
        (["--measure", "knn", "--train", "x"], "--test: missing with --measure knn"),
        (["--measure", "pairs"], "--pairs: missing with --measure pairs"),
        (["--pairs", "x"], "--pairs: found with no --measure"),
        (["--untrained"], "--untrained: expected --measure"),
    ]:
        with pytest.raises(UserError, match=message):
            main([*arguments(folder, "a"), *more])
    assert not (folder / "work").exists()
