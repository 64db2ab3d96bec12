import json
import shutil

import pytest
from data_samples import encoded, make_shards, write_json, write_tar

from mmd2v.data.check import check_shards
from mmd2v.data.shards import ShardIndex
from mmd2v.errors import UserError


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "set", 12, 5)


def test_good_shards(shards):
    report = check_shards(str(shards))
    assert report.problems == []
    assert (report.shards, report.images, report.captions) == (3, 12, 36)
    assert (report.fewest_captions, report.most_captions) == (3, 3)
    assert "12 readable images" in str(report) and "0 problems" in str(report)


def test_unreadable_members_are_named(tmp_path):
    meta = b'{"captions": ["x"]}'
    members = [
        ("a.jpg", encoded(0)),
        ("a.json", meta),
        ("b.jpg", encoded(1)[:90]),
        ("b.json", meta),
        ("c.jpg", encoded(2)),
        ("d.json", meta),
        ("e.jpg", encoded(3)),
        ("e.json", b'{"captions": []}'),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    report = check_shards(str(path))
    assert (report.images, len(report.problems)) == (1, 4)
    for problem, (key, text) in zip(
        report.problems, [("b", "decode"), ("c", "no .json"), ("d", "no image"), ("e", "no caption")], strict=True
    ):
        assert problem.startswith(f"{path}: sample {key}: ") and text in problem


def test_duplicate_ids_over_shards(shards, tmp_path):
    shutil.copy(shards / "shard-000002.tar", tmp_path / "copy.tar")
    problems = check_shards([str(shards), str(tmp_path / "copy.tar")]).problems
    assert len(problems) == 2
    assert "copy.tar: sample sample-0010: duplicate id, also of" in problems[0]
    assert "shard-000002.tar: sample sample-0010" in problems[0]


def test_many_duplicates_are_counted_and_cost_one_scan_a_shard(shards, tmp_path, monkeypatch):
    shutil.copytree(shards, tmp_path / "copy")
    scanned = []
    original = ShardIndex.scan.__func__
    scan = classmethod(lambda kind, path, **options: scanned.append(path) or original(kind, path, **options))
    monkeypatch.setattr(ShardIndex, "scan", scan)
    monkeypatch.setattr("mmd2v.data.check.MOST_PROBLEMS", 10)
    report = check_shards([str(shards), str(tmp_path / "copy")])
    assert report.problem_count == 12 and len(report.problems) == 10 and "12 problems" in str(report)
    assert all(": duplicate id, also of " in problem for problem in report.problems)
    assert len(scanned) <= 2 * 6  # to check each, and once more for the names


def test_addresses_are_refused(shards, tmp_path):
    (tmp_path / "list.txt").write_text("https://user:word@host/a.tar?key=1\n")
    for spec in ("https://user:word@host/a.tar?key=1", str(tmp_path / "list.txt"), [str(shards), "pipe:cat x"]):
        with pytest.raises(UserError, match=r"is no local file.* Copy the whole folder here") as caught:
            check_shards(spec)
        assert "word" not in str(caught.value) and "key" not in str(caught.value)


def test_damaged_and_replaced_shards(shards):
    path = shards / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    problems = check_shards(str(shards)).problems
    assert any("shard-000001.tar: not a readable, uncompressed tar" in problem for problem in problems)
    assert any("lists 5 samples in shard-000001.tar, found 0" in problem for problem in problems)
    path.unlink()
    assert any(
        "lists shard-000001.tar, which is not there" in problem for problem in check_shards(str(shards)).problems
    )


def test_wrong_index(shards):
    index = ShardIndex.open(str(shards / "shard-000000.tar"))
    index.spans[0, 0, 0] += 512
    index.write()
    assert any("does not describe the shard" in problem for problem in check_shards(str(shards)).problems)


def test_no_shards_is_an_error(tmp_path):
    with pytest.raises(UserError):
        check_shards(str(tmp_path / "none"))


def test_checksums(shards):
    assert check_shards(str(shards)).checksums == 3
    path = shards / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    place = data.index(b"caption 0 of picture 7")
    data[place : place + 7] = b"CAPTION"  # nothing that decoding would notice
    path.write_bytes(data)
    report = check_shards(str(shards))
    assert report.checksums == 2
    assert len(report.problems) == 1 and f"{path}: found SHA-256 " in report.problems[0]


def test_manifests_without_checksums(shards):
    manifest = shards / "shards.json"
    record = json.loads(manifest.read_text())
    record["shards"] = {name: entry[:2] for name, entry in record["shards"].items()}
    write_json(manifest, record)
    report = check_shards(str(shards))
    assert report.problems == [] and report.checksums == 0 and "checksums" not in str(report)
    record["shards"]["shard-000000.tar"][1] += 1
    write_json(manifest, record)
    (problem,) = check_shards(str(shards)).problems
    assert "shard-000000.tar: found " in problem and "by the shards.json beside it" in problem
    record["shards"]["shard-000000.tar"] = [5, 1, 7]
    write_json(manifest, record)
    assert any("not a shard manifest of this version" in problem for problem in check_shards(str(shards)).problems)
