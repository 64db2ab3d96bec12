"""The data engine in real training processes: uneven shards on two ranks, damage, kills, mixtures, and who is late."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from data_samples import write_tar
from mmd2v_process import MMD2VProcess, run_mmd2v
from training_runs import make_data, write_config
from waiting import holding, wait_until

from mmd2v.data.shards import ShardSet
from mmd2v.train.metrics import read_metrics

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
BATCH = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """48 scenes in shards of very different sizes, one of them empty, without indexes."""
    folder = make_data(tmp_path_factory.mktemp("data"))
    shards = ShardSet(str(folder / "train"))
    samples = [shards.read(*shards.locate(place)) for place in range(len(shards))]
    (folder / "uneven").mkdir()
    start = 0
    for number, size in enumerate((19, 1, 7, 0, 18, 3)):
        members = []
        for sample in samples[start : start + size]:
            members += [
                (f"{sample.key}.jpg", bytes(sample.image)),
                (f"{sample.key}.json", json.dumps(sample.meta).encode()),
            ]
        write_tar(folder / "uneven" / f"part-{number}.tar", members)
        start += size
    assert start == 48
    return folder


def config(file: Path, data: Path, **changes) -> Path:
    """A light run over the uneven shards that traces what it consumes."""
    settings = {
        "steps": 18,  # three epochs
        "data__train": {"shards": str(data / "uneven")},
        "data__shuffle_shards": 2,
        "data__workers": 2,
        "data__trace": str(file.parent / file.stem / "trace"),
        "teachers": {},
        "objectives": [{"kind": "contrastive"}],
        "model__layers": [{"kind": "shared"}],
        "engine__batch_size": BATCH,
        "checkpoint__every": 4,
        **changes,
    }
    return write_config(file, data, **settings)


def run(arguments: list[object], ranks: int = 1, expect: int = 0) -> str:
    result = run_mmd2v(arguments, env=ENVIRONMENT, ranks=ranks)
    assert (result.returncode == 0) == (expect == 0), result.stdout + result.stderr
    return result.stdout + result.stderr


def traced(file: Path, ranks: int) -> dict[int, list[str]]:
    """Step → the ids of all ranks."""
    found: dict[int, list[str]] = {}
    for rank in range(ranks):
        path = file.parent / file.stem / f"trace.rank{rank}.jsonl"
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["step"], []).extend(record["ids"])
    return dict(sorted(found.items()))


def losses(file: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(file.parent / "runs" / file.stem / "metrics.jsonl") if "loss" in r]


def assert_three_epochs(steps: dict[int, list[str]]) -> None:
    assert list(steps) == list(range(18))
    assert {len(ids) for ids in steps.values()} == {BATCH}
    stream = [name for ids in steps.values() for name in sorted(ids)]
    for epoch in range(3):
        assert len(set(stream[48 * epoch : 48 * (epoch + 1)])) == 48


def test_two_ranks_on_uneven_shards_agree_on_every_step(data, tmp_path):
    one, two = config(tmp_path / "one.yaml", data), config(tmp_path / "two.yaml", data, data__workers=1)
    run(["train", one])
    run(["train", two], ranks=2)
    assert_three_epochs(traced(one, 1))
    assert_three_epochs(traced(two, 2))
    assert {k: sorted(v) for k, v in traced(one, 1).items()} == {k: sorted(v) for k, v in traced(two, 2).items()}
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_killed_in_mid_epoch_and_resumed_nothing_is_repeated_or_lost(data, tmp_path):
    whole, killed = config(tmp_path / "whole.yaml", data), config(tmp_path / "killed.yaml", data)
    run(["train", whole])
    metrics = tmp_path / "runs" / "killed" / "metrics.jsonl"
    process = MMD2VProcess(["train", killed], ENVIRONMENT | holding(12))

    def is_there():
        assert process.poll() is None
        return metrics.exists() and len(losses(killed)) >= 6

    try:
        wait_until(is_there)
    finally:
        process.kill()
    run(["train", killed, "--resume", "auto", "--data.workers", "1"])  # another number of workers
    assert traced(killed, 1) == traced(whole, 1)
    assert losses(killed) == losses(whole)
    # With another order the epoch would repeat some samples and miss others.
    longer = ["--steps", "20", "--data.shuffle_shards", "5"]
    said = run(["train", killed, "--resume", "auto", *longer], expect=1)
    assert "data.shuffle_shards: checkpoint 2, this run 5" in said


def damaged_copy(data: Path, folder: Path) -> Path:
    """The uneven shards, with one image cut in half."""
    folder.mkdir()
    for path in sorted((data / "uneven").glob("*.tar")):
        (folder / path.name).write_bytes(path.read_bytes())
    index = ShardSet(str(folder)).index(0)
    start, size = index.spans[5, 0].tolist()
    with open(folder / "part-0.tar", "r+b") as handle:
        handle.seek(start + size // 4)
        handle.write(bytes(size - size // 4))
    return folder


def test_damage_is_counted_told_and_recorded_on_two_ranks_as_on_one(data, tmp_path):
    shards = {"shards": str(damaged_copy(data, tmp_path / "broken"))}
    settings = {"data__train": shards, "data__damage": {"limit": 0.1}, "logging__every": 6}
    one, two = config(tmp_path / "one.yaml", data, **settings), config(tmp_path / "two.yaml", data, **settings)
    told = run(["train", one])
    run(["train", two], ranks=2)
    assert told.count("damaged samples") == 1  # met in three epochs, told once
    assert "left out 1 damaged samples, 1 of at most 4 so far (image_undecodable 1)" in told
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for name in ("one", "two"):
        records = [json.loads(line) for line in (tmp_path / "runs" / name / "damage.jsonl").read_text().splitlines()]
        ((kind, shard, row),) = {(r["kind"], Path(r["shard"]).name, r["row"]) for r in records}
        assert (len(records), kind, shard, row) == (1, "image_undecodable", "part-0.tar", 5)
    names = Counter(name for ids in traced(one, 1).values() for name in ids)
    assert names[f"{tmp_path}/broken/part-0.tar#5"] == 3  # its slot was kept, once an epoch


def test_past_the_limit_all_ranks_stop_with_one_message(data, tmp_path):
    # The default limit allows none of 48 samples; that is found at the next report and not in the middle of a step.
    shards = {"shards": str(damaged_copy(data, tmp_path / "broken"))}
    file = config(tmp_path / "stop.yaml", data, data__train=shards, logging__every=2)
    said = run(["train", file], ranks=2, expect=1)
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert len(errors) == 1, said
    assert "data.damage.limit: found 1 damaged samples (image_undecodable 1), expected at most 0" in errors[0]
    assert "part-0.tar" in errors[0] and "mmd2v data check" in errors[0]
    assert "Traceback" not in said


def test_damage_is_remembered_over_a_resume(data, tmp_path):
    shards = {"shards": str(damaged_copy(data, tmp_path / "broken"))}
    file = config(tmp_path / "go.yaml", data, data__train=shards, data__damage={"limit": 0.03}, checkpoint__every=6)
    run(["train", file, "--steps", "6"])
    said = run(["train", file, "--steps", "12", "--resume", "auto"])
    assert "damaged samples" not in said  # known since the first epoch
    assert len((tmp_path / "runs" / "go" / "damage.jsonl").read_text().splitlines()) == 1


def mixture(data: Path, mix: str) -> dict:
    sets = {
        "scenes": {"shards": str(data / "uneven"), "weight": 3},
        "more": {"shards": str(data / "test"), "weight": 1},
    }
    return {"data__train": {"sets": sets, "mix": mix}, "steps": 8}


def test_a_mixture_is_resumed_exactly_and_counts_its_epochs(data, tmp_path):
    whole = config(tmp_path / "whole.yaml", data, **mixture(data, "weighted"))
    parted = config(tmp_path / "parted.yaml", data, **mixture(data, "weighted"))
    run(["train", whole])
    run(["train", parted, "--steps", "4"])
    run(["train", parted, "--resume", "auto"])
    assert traced(parted, 1) == traced(whole, 1)
    of_set = Counter(name.split("/")[0] for ids in traced(whole, 1).values() for name in ids)
    last = [r for r in read_metrics(tmp_path / "runs" / "whole" / "metrics.jsonl") if "loss" in r][-1]
    assert last["epoch/scenes"] == pytest.approx(of_set["scenes"] / 48)
    assert last["epoch/more"] == pytest.approx(of_set["more"] / 12)


def test_round_robin_gives_both_ranks_the_same_set(data, tmp_path):
    file = config(tmp_path / "turns.yaml", data, **mixture(data, "round_robin"))
    run(["train", file], ranks=2)
    steps = [{name.split("/")[0] for name in ids} for ids in traced(file, 2).values()]
    assert steps == [{"more"}, {"scenes"}] * 4  # the YAML's order
