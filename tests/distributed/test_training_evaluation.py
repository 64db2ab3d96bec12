"""Evaluation during training: what it finds is what the commands find, on any number of ranks; the best checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from export_samples import photo
from harness import run_distributed_test
from training_runs import make_data, run_config, run_of

from mmd2v.cli.main import main
from mmd2v.config.training import BestConfig
from mmd2v.errors import UserError
from mmd2v.evaluation.features import image_features, text_features
from mmd2v.evaluation.knn import knn_of_folder
from mmd2v.evaluation.text_pairs import pairs_of_file
from mmd2v.export import export
from mmd2v.inference import load
from mmd2v.train.best import Best, best_of, find_best
from mmd2v.train.evaluation import metric_names
from mmd2v.train.metrics import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_data(tmp_path_factory.mktemp("data"))
    for split, first in (("bank", 0), ("queries", 50)):
        for name, shade in (("dark", 0), ("light", 1), ("other", 2)):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(5):
                photo(first + 7 * i + shade).save(place / f"{i}.png")
    rows = [f"{i % 4 != 3:d}\t{i}\t{i}\ta red circle {i}\tcircle {i // 2} in blue" for i in range(13)]
    (folder / "pairs.txt").write_text("\n".join(["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *rows]) + "\n")
    return folder


def settings(data, **changes):
    knn = {"train": str(data / "bank"), "test": str(data / "queries"), "k": 3}
    return {
        "data__eval": {"shards": str(data / "test")},
        "evaluation": {"every": 1, "batch_size": 4, "knn": knn, "pairs": {"mrpc": {"file": str(data / "pairs.txt")}}},
        "engine__batch_size": 12,
        **changes,
    }


def train(file, data, resume=None, **changes):
    from mmd2v.distributed import environment

    world = environment.initialize("cpu")
    config = run_config(Path(file), Path(data), **changes)
    with run_of(config, world, resume) as run:
        run.train()
    records = read_metrics(Path(config.run_dir) / "metrics.jsonl") if world.is_main else []
    environment.shutdown()
    return [(r["step"], {k: v for k, v in r.items() if "evaluation/" in k}) for r in records if evaluated(r)]


def evaluated(record):
    return any(key.startswith("evaluation/") for key in record)


def test_what_training_measures_is_what_the_commands_find(tmp_path, data):
    changes = settings(data, checkpoint={"best": {"metric": "knn_top1"}})
    found = train(tmp_path / "run.yaml", data, **changes)
    assert [step for step, _ in found] == [1, 2, 3]
    last = {key.removeprefix("evaluation/"): value for key, value in found[-1][1].items()}
    config = run_config(tmp_path / "run.yaml", data, **changes)
    assert set(metric_names(config)) <= set(last)

    export(Path(config.run_dir), tmp_path / "export")
    encoder = load(tmp_path / "export")
    knn = knn_of_folder(lambda images: image_features(encoder, images, "pooled"), data / "bank", data / "queries", 3)
    assert last["knn_top1"] == knn.top1 and last["chance_knn_top1"] == pytest.approx(1 / 3)
    pairs = pairs_of_file(lambda texts: text_features(encoder, texts, "cls"), data / "pairs.txt")
    assert {key: last[f"pairs/mrpc/{key}"] for key in pairs.metrics} == pairs.metrics


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_two_ranks_measure_what_one_does(tmp_path, data, zero_stage):
    """Fifteen images and odd numbers of texts: uneven slices. Nothing is learned, so the models are the same."""
    changes = settings(data, optimizer__lr=1e-30, steps=2, engine__zero_stage=zero_stage)
    alone = train(tmp_path / "one.yaml", data, **changes)
    several, nothing = run_distributed_test(train_with, 2, args=(str(tmp_path / "two.yaml"), str(data), changes))
    assert nothing == [] and len(several) == 2
    for (step, one), (same, two) in zip(alone, several, strict=True):
        assert step == same and one == pytest.approx(two)


def train_with(file, data, changes):
    return train(file, data, **changes)


# ----------------------------------------------------------------------------- the best checkpoint


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith("step-"))


def scripted(monkeypatch, values):
    """Evaluations find these numbers at the steps 1, 2, …"""
    found = iter(values)
    monkeypatch.setattr("mmd2v.train.loop.evaluate", lambda *_: {"knn_top1": next(found)})
    monkeypatch.setattr("mmd2v.train.loop.result_line", lambda metrics: f"found {metrics['knn_top1']}")


def best_settings(data, tmp_path, mode="max", **changes):
    changes = settings(data, checkpoint={"keep": 1, "best": {"metric": "knn_top1", "mode": mode}}, **changes)
    return changes, tmp_path / "runs" / "run"


def test_the_best_checkpoint_is_kept_until_it_is_beaten(tmp_path, data, monkeypatch, capsys):
    changes, run_dir = best_settings(data, tmp_path, steps=6)
    scripted(monkeypatch, [0.2, 0.5, 0.5, 0.3, 0.4, 0.1])
    train(tmp_path / "run.yaml", data, **changes)
    # Step 2 was beaten by none; an equal number later changes nothing. Step 6 is the newest.
    assert checkpoints(run_dir) == ["step-000002", "step-000006"]
    assert json.loads((run_dir / "best.json").read_text()) == {
        "metric": "knn_top1", "mode": "max", "value": 0.5, "step": 2, "checkpoint": "checkpoints/step-000002",
    }  # fmt: skip
    assert "step 2 is the best by knn_top1 so far (0.5); its checkpoint is kept" in capsys.readouterr().out


def test_less_may_be_better_and_the_last_one_may_be_the_best(tmp_path, data, monkeypatch):
    changes, run_dir = best_settings(data, tmp_path, "min", steps=3)
    scripted(monkeypatch, [0.2, 0.5, 0.1])
    train(tmp_path / "run.yaml", data, **changes)
    # The last evaluation comes after the last checkpoint, which is the best then; that of step 1 has been beaten.
    assert checkpoints(run_dir) == ["step-000003"]
    assert json.loads((run_dir / "best.json").read_text())["step"] == 3


def test_the_best_checkpoint_survives_a_resume(tmp_path, data, monkeypatch):
    changes, run_dir = best_settings(data, tmp_path)
    schedule = {"optimizer__schedule": "constant", "optimizer__warmup": 0}
    scripted(monkeypatch, [0.6, 0.2])
    train(tmp_path / "run.yaml", data, steps=2, **changes, **schedule)
    assert checkpoints(run_dir) == ["step-000001", "step-000002"]
    (run_dir / "best.json").unlink()  # nothing depends on it
    scripted(monkeypatch, [0.5, 0.7, 0.3])
    train(tmp_path / "run.yaml", data, "auto", steps=5, **changes, **schedule)
    assert checkpoints(run_dir) == ["step-000004", "step-000005"]
    assert json.loads((run_dir / "best.json").read_text())["value"] == 0.7

    # Going back to step 4 forgets what came after.
    scripted(monkeypatch, [0.9])
    train(tmp_path / "run.yaml", data, str(run_dir / "checkpoints" / "step-000004"), steps=5, **changes, **schedule)
    assert json.loads((run_dir / "best.json").read_text())["step"] == 5


def test_the_best_checkpoint_is_exported(tmp_path, data, monkeypatch, capsys):
    changes, run_dir = best_settings(data, tmp_path)
    scripted(monkeypatch, [0.5, 0.2])
    train(tmp_path / "run.yaml", data, steps=2, **changes)
    (run_dir / "best.json").unlink()  # a run that was killed may have been about to write it
    best = run_dir / "checkpoints" / "step-000001"
    for name, source, flags in (("asked", run_dir, ["--checkpoint", "best"]), ("one", best, []), ("new", run_dir, [])):
        assert main(["export", str(source), "--out", str(tmp_path / name), *flags]) == 0
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("asked", "one", "new")}
    assert weights["asked"] == weights["one"] != weights["new"]

    capsys.readouterr()
    assert main(["export", str(best), "--out", str(tmp_path / "none"), "--checkpoint", "best"]) == 2
    assert "is a checkpoint itself" in capsys.readouterr().err
    scripted(monkeypatch, [0.1])
    train(tmp_path / "plain.yaml", data, steps=1, run_dir=str(tmp_path / "plain"), **settings(data))
    assert main(["export", str(tmp_path / "plain"), "--out", str(tmp_path / "none"), "--checkpoint", "best"]) == 2
    assert "checkpoint.best.metric" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_best_is_among_the_checkpoints_that_are_there(tmp_path):
    best = BestConfig(metric="i2t_R@1")
    rows = [{"step": step, "evaluation/i2t_R@1": value} for step, value in ((1, 0.4), (2, 0.9), (3, 0.4))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert find_best(best, tmp_path) is None
    for step in (1, 3):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "mmd2v.json").touch()
    assert find_best(best, tmp_path) == Best("i2t_R@1", "max", 0.4, 1)
    assert best_of(None, {}, 1) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": {"best": {"metric": "i2t_R1"}}}, "checkpoint.best.metric: unknown name 'i2t_R1'. Did you mean"),
        ({"checkpoint": {"best": {"metric": "knn_top1"}}, "evaluation": {}, "data__eval": None},
         "checkpoint.best: nothing is measured"),
        ({"evaluation": {"knn": {"train": "none", "test": "none"}}}, "evaluation.knn.train: none not found"),
        ({"evaluation": {"pairs": {"a": {"file": "none.tsv"}}}}, "none.tsv"),
        ({"evaluation": {"knn": {"train": "{data}/bank", "test": "{data}/queries", "k": 99}}},
         "evaluation.knn.k: found 99, expected 1..15"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_the_first_step(tmp_path, data, changes, message):
    named = json.loads(json.dumps(changes).replace("{data}", str(data)))
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run.yaml", data, **{**settings(data), **named})
    torch.distributed.destroy_process_group()
