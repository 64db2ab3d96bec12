"""The demo's table: which measurements it shows, and what it says when they are missing."""

import json

import pytest

from mmd2v.data.generate import generate
from mmd2v.data.shards import ShardSet
from mmd2v.errors import UserError
from mmd2v.report.demo import recall_rows


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "test"
    generate(folder, split="test", count=20, size=16, seed=0, workers=1)
    return ShardSet(str(folder))


def write_metrics(folder, steps):
    rows = [
        {"step": step, "evaluation/i2t_R@1": step / 100, "evaluation/chance_i2t_R@1": 0.01, "loss": 1.0}
        for step in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_first_and_last_measurement_are_shown(tmp_path, shards):
    write_metrics(tmp_path, [0, 5, 9])
    rows = recall_rows(tmp_path, shards)
    assert list(rows) == ["chance", "untrained student", "student", "ceiling (true facts)"]
    found = [row["i2t_R@1"] for row in rows.values()]
    assert found[:3] == [0.01, 0.0, 0.09] and found[3] > 0.9


@pytest.mark.parametrize("steps", [[], [5, 9], [0]])
def test_a_run_without_both_is_refused(tmp_path, shards, steps):
    write_metrics(tmp_path, steps)
    with pytest.raises(UserError, match="expected that of step 0 and of a later one"):
        recall_rows(tmp_path, shards)
