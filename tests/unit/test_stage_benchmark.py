"""The measurement of a unimodal stage: three rows by one rule, and the share of the gap."""

import json
import sys
from pathlib import Path

import pytest
from export_samples import small_export
from test_run_table import module  # noqa: F401 - a fixture

HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"


@pytest.fixture
def pairs(tmp_path) -> Path:
    file = tmp_path / "pairs.txt"
    sentences = ["a red circle", "two blue squares", "a green star", "one dog", "a cat"]
    rows = [f"1\t{i}\t{i + 9}\t{text}\t{text} again\n" for i, text in enumerate(sentences)]
    file.write_text(HEADER + "".join(rows), encoding="utf-8")
    return file


def test_text_stage_writes_three_rows_and_the_share(module, tmp_path, pairs, monkeypatch):  # noqa: F811
    stages = module("stages")
    export = small_export(tmp_path)
    config = tmp_path / "stage.yaml"
    text = (export / "config.yaml").read_text().replace("path: tokenizer", f"path: {export}/tokenizer")
    config.write_text(text)
    monkeypatch.setattr(sys, "argv", ["stages.py", "text", "--config", str(config)])
    out = tmp_path / "result"
    stages.main(stages.Text(config=config, distilled=export, pairs=pairs, out=out, teacher_blocks=2))
    record = json.loads(out.with_suffix(".json").read_text())
    assert list(record["rows"]) == ["first 1 blocks, untrained", "1 blocks, distilled", "all 2 blocks: the teacher"]
    assert record["count"] == 5 and str(tmp_path) not in out.with_suffix(".json").read_text()
    for row in record["rows"].values():
        numbers = [row[f"{way}_R@{k}"] for way in ("second_to_first", "first_to_second") for k in (1, 5)]
        assert row["mean"] == pytest.approx(sum(numbers) / 4)
    first, _, last = (row["mean"] for row in record["rows"].values())
    assert ("of the gap" if last > first else "There is no gap") in out.with_suffix(".md").read_text()
