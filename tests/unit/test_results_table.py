"""The published figures and their corrected columns, and the tables that set our results beside them."""

import csv
import io
import json

import pytest
import yaml

from mmd2v.cli.main import main
from mmd2v.errors import UserError
from mmd2v.report.published import FILE, published
from mmd2v.report.results import read_results
from mmd2v.report.results_table import csv_text, markdown

RECALL = {f"{side}_R@{k}": value for side, value in (("i2t", 0.5), ("t2i", 0.25)) for k in (1, 5, 10)}
COCO = {"images": 5000, "captions": 25010}
FLICKR = {"images": 1000, "captions": 5000}


def test_corrected_columns_follow_from_the_printed_ones():
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    corrected = [row for row in content["rows"] if "corrected" in row.get("flickr30k", {})]
    # Every row of table 1 that the source measured itself, and none that it quotes.
    assert [row["model"] for row in corrected] == [
        "Data2Vec2", "MM-D2V2", "MM-D2V2 †", "MM-D2V2 7_2 †", "MM-D2V2 7 †"
    ]  # fmt: skip
    for row in corrected:
        printed, found = row["flickr30k"]["printed"], row["flickr30k"]["corrected"]
        assert found["i2t"] == [pytest.approx(5 * printed["i2t"][0]), None, None]
        assert found["t2i"] == [printed["t2i"][1], None, None]
    assert not [row for row in content["rows"] if "corrected" in row["coco"]]


def test_figures_hang_together():
    known = published()
    assert [len([row for row in known.rows if table in row.tables]) for table in (1, 2)] == [6, 5]
    for row in known.rows:
        for of_set, numbers in row.printed.items():
            assert row.sources[of_set]
            for side in ("i2t", "t2i"):
                values = [numbers[f"{side}_R@{k}"] for k in (1, 5, 10) if f"{side}_R@{k}" in numbers]
                assert values and values == sorted(values) and values[0] > 0 and values[-1] <= 1
    # The untrained pair is at the chance level, which shows which protocol a set's figures follow.
    untrained = next(row for row in known.rows if row.model == "Data2Vec2")
    assert untrained.printed["flickr30k"]["i2t_R@1"] == pytest.approx(1 / 5000)
    assert untrained.comparable["flickr30k"]["i2t_R@1"] == pytest.approx(1 / 1000)


@pytest.fixture
def write(tmp_path):
    def write(name, **record):
        (tmp_path / name).write_text(json.dumps(record))
        return tmp_path / name

    return write


def sets_of(*files):
    return [result.set for result in read_results(files, published())]


def test_the_set_is_known_by_name_or_by_its_counts(write):
    assert sets_of(write("a.json", model="m", **RECALL, **COCO)) == ["coco"]
    assert sets_of(write("b.json", model="m", shards=["/data/flickr30k/test"], **RECALL, **FLICKR)) == ["flickr30k"]
    # Flickr8k's test set has as many images and captions.
    assert sets_of(write("b8.json", model="m", shards=["/data/flickr8k/test"], **RECALL, **FLICKR)) == ["test"]
    ids = {"public_set": "Flickr30K, Karpathy's test split", "data": ["x.json"]}
    assert sets_of(write("ids.json", model="m", **ids, **RECALL, **FLICKR)) == ["flickr30k"]
    assert sets_of(write("no.json", model="m", **{**ids, "public_set": None}, **RECALL, **COCO)) == ["x.json"]
    assert sets_of(write("c.json", model="m", set="flickr8k", **RECALL, **FLICKR)) == ["flickr8k"]
    assert sets_of(write("d.json", model="m", shards=["/data/val"], **RECALL, images=10, captions=50)) == ["val"]
    # A part of a set is not set beside figures of the whole.
    part = write("e.json", model="m", set="coco", **RECALL, images=10, captions=50)
    assert sets_of(part) == ["coco, 10 images and 50 captions of it"]


def test_markdown_has_both_columns_and_says_what_is_missing(write):
    files = [write("a.json", model="Mine|x", **RECALL, **COCO)]
    text = markdown(read_results(files, published()), published())
    assert "| **Mine\\|x** | measured | 50.00 | 50.00 | 50.00 | 25.00 | 25.00 | 25.00 | [1] |" in text
    assert "[1] measured: a.json" in text
    dagger = next(line for line in text.splitlines() if line.startswith("| MM-D2V2 † |") and "38.50" in line)
    cells = dagger.split(" | ")
    assert cells[2:8] == ["38.50", "?", "?", "17.01", "?", "?"]
    assert cells[8:14] == ["7.70", "26.18", "37.60", "4.08", "17.01", "24.26"]
    assert "Mine|x: no result on flickr30k: run `mmd2v eval retrieval MODEL … --json FILE`" in text
    assert "no result: run `mmd2v eval pairs" in text
    for line in text.splitlines():
        if line.startswith("|---"):
            columns = line.count("|")
        elif line.startswith("| ") and "---" not in line and "Model" not in line:
            assert line.replace("\\|", "").count("|") == columns


def test_another_protocol_is_never_set_beside_the_standard_one(write):
    files = [write("flickr30k.json", model="Mine", protocol="image_per_caption", **RECALL, images=5000, captions=5000)]
    results = read_results(files, published())
    assert results[0].set == "flickr30k"
    text = markdown(results, published())
    row = next(line for line in text.splitlines() if line.startswith("| **Mine**") and "50.00" in line)
    assert row.split(" | ")[2:9] == [*["no result"] * 6, "50.00"]
    assert "no result on flickr30k by the standard protocol" in text


def test_csv_holds_every_number_with_its_source(write):
    files = [
        write("a.json", model="Mine", set="flickr30k", **RECALL, **FLICKR),
        write("k.json", model="Mine", knn_top1=0.75, chance_top1=0.1, k=10, test="/data/cifar/test"),
    ]
    rows = list(csv.DictReader(io.StringIO(csv_text(read_results(files, published()), published()))))
    assert all(row["source"] for row in rows)
    numbers = {(row["set"], row["model"], row["column"], row["number"]): row for row in rows}
    assert numbers["flickr30k", "Mine", "comparable", "i2t_R@1"]["percent"] == "50.0000"
    assert numbers["flickr30k", "MM-D2V2", "printed", "i2t_R@1"]["percent"] == "1.2000"
    corrected = numbers["flickr30k", "MM-D2V2", "comparable", "i2t_R@1"]
    assert corrected["percent"] == "6.0000" and "5 × printed" in corrected["source"]
    assert numbers["coco", "CLIP", "comparable", "t2i_R@10"]["percent"] == "72.2000"
    assert numbers["test", "Mine", "comparable", "top1"]["setting"] == "10-NN"


def test_the_mean_of_the_16_numbers_needs_all_four_sets(write):
    counts = published().pair_counts
    side = {f"{name}_R@{k}": 0.5 for name in ("second_to_first", "first_to_second") for k in (1, 5)}
    sets = {name: {"pairs": count, "mean": 0.1 * i, **side} for i, (name, count) in enumerate(counts.items())}
    some = {name: sets[name] for name in ("mrpc_train", "mrpc_test")}
    whole = write("a.json", model="Mine", pooling="mean", sets=sets)
    text = markdown(read_results([whole], published()), published())
    assert "| **Mine** | mean | mean of the 16 | 43,785 |  |  |  |  | 15.00 |" in text
    part = write("b.json", model="Mine", poolings={"cls": {"sets": some}})
    text = markdown(read_results([part], published()), published())
    assert (
        "Mine, cls: no result on qqp_train, qqp_dev: run `mmd2v eval pairs" in text and "mean of the 16 |" not in text
    )


def test_a_second_result_of_one_model_is_named_by_its_file(write):
    files = [write(f"{name}.json", model="Mine", **RECALL, **COCO) for name in ("first", "second")]
    assert [result.model for result in read_results(files, published())] == ["Mine", "Mine (second)"]


def test_what_is_wrong_with_a_file_is_named(write, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "bed.json", "not found. Did you mean 'bad.json'"),
        (tmp_path / "bad.json", "is no JSON"),
        (tmp_path / "empty", "holds no .json file"),
        (write("list.json", steps=3), "has none of the keys of a result"),
        (write("percent.json", **{**RECALL, "i2t_R@1": 42.0}), r"i2t_R@1 is 42.0, expected a fraction"),
    ]:
        with pytest.raises(UserError, match=message):
            read_results([path], published())


def test_command(write, tmp_path, capsys):
    write("a.json", model="Mine", **RECALL, **COCO)
    out = tmp_path / "out"
    assert main(["table", str(tmp_path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed == (out / "table.md").read_text(encoding="utf-8")
    assert (out / "table.csv").read_text().startswith("set,model,")
    picture = (out / "table.svg").read_bytes()
    assert picture.startswith(b"<?xml")
    assert main(["table", str(tmp_path / "a.json"), "--picture", str(tmp_path / "again.svg")]) == 0
    assert (tmp_path / "again.svg").read_bytes() == picture
    assert main(["table", "--picture", str(tmp_path / "table.jpg")]) == 2
    assert "expected one of .svg, .png, .pdf" in capsys.readouterr().err
