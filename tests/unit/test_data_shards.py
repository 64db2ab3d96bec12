import json
import os

import pytest
import webdataset
from data_samples import captions_of, encoded, leftovers, make_shards, write_json, write_tar

from mmd2v.data.damage import Damage
from mmd2v.data.shards import INDEX_SUFFIX, ShardIndex, ShardSet, expand_shards
from mmd2v.data.writer import ShardFolder, sample_key
from mmd2v.errors import UserError


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "set", 25, 10)


def names(paths):
    return [os.path.basename(path) for path in paths]


def test_plain_webdataset_reads_our_shards(shards):
    source = webdataset.WebDataset(expand_shards(str(shards)), shardshuffle=False).decode()
    samples = list(source)
    assert [sample["__key__"] for sample in samples] == [f"sample-{n:04d}" for n in range(25)]
    assert [sample["json"]["captions"] for sample in samples] == [captions_of(n) for n in range(25)]
    raw = webdataset.WebDataset(expand_shards(str(shards)), shardshuffle=False)
    assert [sample["jpg"] for sample in raw] == [encoded(n) for n in range(25)]


def test_index_file_equals_a_scan_of_the_tar(shards):
    for path in expand_shards(str(shards)):
        stored, scanned = ShardIndex.open(path), ShardIndex.scan(path)
        assert stored.keys == scanned.keys and stored.size == scanned.size
        assert (stored.spans == scanned.spans).all()


@pytest.mark.parametrize("keep", ["everything", "no manifest", "tars alone"])
def test_samples_are_read_by_position(shards, keep):
    if keep != "everything":
        (shards / "shards.json").unlink()
    if keep == "tars alone":
        for path in shards.glob("*" + INDEX_SUFFIX):
            path.unlink()
    data = ShardSet(str(shards))
    assert len(data) == 25 and data.counts.tolist() == [10, 10, 5]
    for n in (24, 0, 13, 10, 9):
        shard, row = data.locate(n)
        sample = data.read(shard, row)
        assert (sample.id, sample.captions) == (f"sample-{n:04d}", tuple(captions_of(n)))
        assert bytes(sample.image) == encoded(n)
        assert not sample.image.readonly
    assert [captions[0] for captions in data.captions()] == [captions_of(n)[0] for n in range(25)]


@pytest.mark.parametrize(("limit", "counts"), [(3, [3, 0, 0]), (10, [10, 0, 0]), (11, [10, 1, 0]), (99, [10, 10, 5])])
def test_limit_takes_the_first_samples(shards, limit, counts):
    assert ShardSet(str(shards), limit).counts.tolist() == counts


def test_limit_leaves_later_shards_unread(shards):
    (shards / "shards.json").unlink()
    (shards / "shard-000002.tar").write_bytes(b"damaged")
    assert len(ShardSet(str(shards), 12)) == 12


def test_shards_are_reproducible(tmp_path, shards):
    again = make_shards(tmp_path / "again", 25, 10)
    assert leftovers(again) == leftovers(shards)
    for name in leftovers(again):
        assert (again / name).read_bytes() == (shards / name).read_bytes()


def test_few_shards_stay_open(tmp_path):
    shards = make_shards(tmp_path / "set", 12, 1)
    data = ShardSet(str(shards), cache=2)
    before = len(os.listdir("/proc/self/fd"))
    for shard in range(12):
        data.read(shard, 0)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    data.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_specifications(shards):
    folder = str(shards)
    every = ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert names(expand_shards(folder)) == every
    assert names(expand_shards(f"{folder}/shard-{{000000..000002}}.tar")) == every
    assert names(expand_shards(f"{folder}/shard-*.tar")) == every
    odd = make_shards(shards.parent / "odd [1]{a", 1, 1)
    assert names(expand_shards(str(odd))) == names(expand_shards(str(odd / every[0]))) == every[:1]
    assert names(expand_shards([f"{folder}/shard-000002.tar", f"{folder}/shard-00000[01].tar"])) == [
        every[2],
        *every[:2],
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/shard-{{000000..000003}}.tar", "shard-000003.tar not found. Did you mean 'shard-000002.tar'"),
        ("{}/nothing-*.tar", "no file matches"),
        ("{}/shard-{{0..", "unbalanced braces"),
        ("{}x", "not found"),
        ("{}/sub/a.tar", "there is no folder"),
        ("http://127.0.0.1/a.tar.gz", "is compressed, expected an uncompressed .tar"),
    ],
)
def test_bad_specifications(shards, spec, message):
    with pytest.raises(UserError) as caught:
        expand_shards(spec.format(shards))
    assert message in str(caught.value)


def test_more_bad_specifications(shards, tmp_path):
    with pytest.raises(UserError, match="named twice"):
        expand_shards([str(shards), str(shards / "shard-000001.tar")])
    with pytest.raises(UserError, match="empty list"):
        expand_shards([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.tar"):
        expand_shards(str(tmp_path / "empty"))


def test_foreign_shards(tmp_path):
    """Members as other tools write them: a folder in the name, .txt captions, .json beside it, capital letters."""
    image, two = encoded(0), b"first caption\n\nsecond\n"
    members = [
        ("./a/one.JPEG", image),
        ("./a/one.txt", two),
        ("./a/two.png", encoded(1, "PNG")),
        ("./a/two.json", json.dumps({"caption": " one string "}).encode()),
        ("./a/two.txt", b"the json wins"),
        ("./a/two.npy", b"ignored"),
    ]
    data = ShardSet(str(write_tar(tmp_path / "x.tar", members)))
    assert data.read(0, 0).captions == ("first caption", "second")
    assert data.read(0, 0).id == "./a/one"
    assert data.read(0, 1).captions == ("one string",)


META = json.dumps({"captions": ["fine"]}).encode()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.json", META)], "no image member"),
        ([("k.jpg", b"x")], r"no \.json and no \.txt"),
        ([("k.jpg", b"x"), ("k.json", b"{")], "does not parse"),
        ([("k.jpg", b"x"), ("k.json", b"[1]")], "expected an object"),
        ([("k.jpg", b"x"), ("k.json", b'{"text": 1}')], "neither 'captions' nor 'caption'"),
        ([("k.jpg", b"x"), ("k.json", b'{"captions": []}')], "no caption"),
        ([("k.jpg", b"x"), ("k.json", b'{"captions": ["a", " "]}')], "caption 1 is empty"),
        ([("k.jpg", b"x"), ("k.json", b'{"captions": ["a", 3]}')], "caption 1 is a int"),
        ([("k.jpg", b"x"), ("k.json", b'{"captions": 3}')], "type int"),
        ([("k.jpg", b"x"), ("k.txt", b"\n \n")], "no caption"),
        ([("k.jpg", b"x"), ("k.txt", b"\xff\xfe")], "not UTF-8"),
    ],
)
def test_bad_samples_name_shard_and_sample(tmp_path, members, message):
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=message) as caught:
        ShardSet(str(path)).read(0, 0)
    assert str(caught.value).startswith(f"{path}: sample k: ")


def test_damaged_tars(shards):
    path = str(shards / "shard-000001.tar")
    data = (shards / "shard-000001.tar").read_bytes()
    ends = ShardIndex.open(path).spans[7]

    def damaged(content, scan=False):
        with open(path, "wb") as handle:
            handle.write(content)
        with pytest.raises(UserError) as caught:
            ShardIndex.scan(path) if scan else ShardSet(str(shards), cache=1).read(1, 7)
        assert path in str(caught.value)
        return str(caught.value)

    assert "incomplete or was replaced" in damaged(data[: len(data) // 2])
    assert "ends early after sample sample-001" in damaged(data[: len(data) // 2], scan=True)
    assert "ends early" in damaged(data[: int(-(-ends.sum(axis=1).max() // 512) * 512)], scan=True)
    assert path in damaged(b"", scan=True)
    assert "not a readable" in damaged(b"junk" * 1000, scan=True)
    assert "no header at byte" in damaged(data[:512] + b"\x01" * (len(data) - 512), scan=True)


def test_index_of_another_shard(shards):
    path = str(shards / "shard-000000.tar")
    whole = (shards / f"shard-000000.tar{INDEX_SUFFIX}").read_bytes()
    for content in (b"", b"nonsense", whole[:-1], whole.replace(b"index_1", b"index_2")):
        with open(path + INDEX_SUFFIX, "wb") as handle:
            handle.write(content)
        with pytest.raises(Damage, match=r"\.tar\.idx: not a shard index of this version"):
            ShardIndex.open(path)


def test_manifest_that_promises_too_much(shards):
    record = json.loads((shards / "shards.json").read_text())
    record["shards"]["shard-000002.tar"][0] = 8
    write_json(shards / "shards.json", record)
    with pytest.raises(UserError, match=r"shard-000002\.tar: found 5 samples, expected 8"):
        ShardSet(str(shards)).read(2, 0)
    write_json(shards / "shards.json", {"version": 1, "shards": 3})
    with pytest.raises(UserError, match="not a shard manifest"):
        ShardSet(str(shards))


def test_set_without_samples(tmp_path):
    write_tar(tmp_path / "x.tar", [("readme.md", b"nothing")])
    with pytest.raises(UserError, match="no sample"):
        ShardSet(str(tmp_path))


@pytest.mark.parametrize("sample_id", ["a.b.c", "val/x.y", "/top/x", "ünï côde", "a%2Eb", "../up", "x" * 200])
def test_keys_survive_webdataset(tmp_path, sample_id):
    with ShardFolder(tmp_path, 5) as folder:
        folder.write(sample_id, encoded(0), {"captions": ["a"]})
    (sample,) = webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False).decode()
    assert sample["__key__"] == sample_key(sample_id)
    assert sample["json"]["id"] == sample_id
    assert ShardSet(str(tmp_path)).read(0, 0).id == sample_id


def test_different_ids_have_different_keys():
    ids = ["a.b", "a%2Eb", "a/b", "a%2Fb", "/a", "%2Fa", "a b", "a+b", "a%20b"]
    assert len({sample_key(name) for name in ids}) == len(ids)
