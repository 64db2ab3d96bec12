"""Text-only runs in steps of tokens: two ranks, or one with accumulation, have the losses of one."""

import json
from pathlib import Path

import pytest
from harness import run_distributed_test
from text_runs import make_text_data, sentences, write_text_config, write_texts

from mmd2v.config.load import load_config
from mmd2v.data import token_lengths
from mmd2v.data.shards import ShardSet
from mmd2v.data.token_lengths import Counts, count_shard
from mmd2v.data.tokenizers import Tokenizer
from mmd2v.distributed.collectives import world_size
from mmd2v.train.loop import train
from mmd2v.train.metrics import read_metrics

STEPS = 3
OBJECTIVES = [
    {"kind": "cls_regression", "teacher": "bert", "modalities": ["text"]},
    {"kind": "attributes", "modality": "text", "classes": 3},
]


def _train(data: Path, folder: Path) -> dict[str, list]:
    """Records of each run, and which shards this rank has counted."""
    found: dict[str, list] = {"counted": []}

    def count(shards: ShardSet, shard: int, tokenizer: Tokenizer) -> Counts:
        found["counted"].append(shard)
        return count_shard(shards, shard, tokenizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_lengths, "count_shard", count)
        _train_both(data, folder, found)
    return found


def _train_both(data: Path, folder: Path, found: dict[str, list]) -> None:
    # Of a batch, or of a third of one: what is a mean over micro-batches must not depend on it.
    for name, micro in (("whole", None), ("thirds", 256 // 3 // world_size())):
        file = write_text_config(
            folder / f"world{world_size()}-{name}.yaml",
            data,
            steps=STEPS,
            objectives=OBJECTIVES,
            data__labels="vector",
            data__micro_batch_tokens=micro,
            data__trace=str(folder / f"trace-{name}"),
        )
        config = load_config(file)
        train(config)
        records = read_metrics(Path(config.run_dir) / "metrics.jsonl")
        found[name] = [r for r in records if "loss" in r]


def _train_samples(data: Path, folder: Path) -> list[dict]:
    """Records of two epochs of 20 texts with three captions each, in steps of samples."""
    config = load_config(
        write_text_config(
            folder / "samples.yaml",
            data,
            steps=None,
            epochs=2,
            objectives=OBJECTIVES,
            data__train__shards=str(data / "captions"),
            data__labels="vector",
            data__batch_tokens=None,
            data__captions_per_image=2,
            engine__batch_size=5,
        )
    )
    train(config)
    return read_metrics(Path(config.run_dir) / "metrics.jsonl")


def _alone(data: Path, folder: Path) -> dict[str, list]:
    return _train(data, folder) | {"samples": _train_samples(data, folder)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = make_text_data(tmp_path_factory.mktemp("data"))
    write_texts(folder / "captions", sentences(60), captions=3, labels=3)
    return folder


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> dict[int, tuple[Path, list[dict[str, list]]]]:
    """Number of ranks → folder, and what each rank has found."""
    found = {}
    for ranks in (2, 1):  # two first: its rank 0 counts the tokens while rank 1 waits
        folder = tmp_path_factory.mktemp(f"world{ranks}")
        runs_of = _alone if ranks == 1 else _train
        found[ranks] = folder, run_distributed_test(runs_of, ranks, args=(data, folder))
    return found


@pytest.mark.parametrize(("ranks", "name"), [(2, "whole"), (1, "thirds"), (2, "thirds")])
def test_losses_are_those_of_one_rank(runs, ranks, name):
    one, divided = runs[1][1][0]["whole"], runs[ranks][1][0][name]
    assert len(one) == len(divided) == STEPS
    for expected, found in zip(one, divided, strict=True):
        for key in ("loss", "loss/cls_regression_loss/text", "loss/attributes_loss", "gradient_norm"):
            assert found[key] == pytest.approx(expected[key], abs=1e-5)
        assert found["epoch"] == expected["epoch"]


def test_micro_batches_have_different_numbers_of_samples(runs):
    """Without this, the test above would hold for a mean of means too."""
    folder, _ = runs[2]
    lines = [(folder / f"trace-whole.rank{r}.jsonl").read_text().splitlines() for r in range(2)]
    sizes = [[len(json.loads(line)["ids"]) for line in of_rank] for of_rank in lines]
    assert any(a != b for a, b in zip(*sizes, strict=True))


def test_lengths_are_counted_once(data, runs):
    shards = len(list((data / "train").glob("*.tar")))
    assert len(list((data / "train").glob("*.lengths"))) == shards
    assert [rank["counted"] for rank in runs[2][1]] == [list(range(shards)), []]
    assert runs[1][1][0]["counted"] == []  # its files were there


def test_text_alone_in_steps_of_samples_with_several_captions(runs):
    records = runs[1][1][0]["samples"]
    assert [record["epoch"] for record in records] == [pytest.approx(step / 4) for step in range(1, 9)]
    for record in records:
        assert record["throughput(tokens/s)"] > 6 * record["throughput(samples/s)"]  # two captions of 3 tokens or more
        assert 0 < record["loss/attributes_loss"] < 2
