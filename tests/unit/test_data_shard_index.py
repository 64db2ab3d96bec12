"""Damaged shards, duplicate keys, text-only samples, and what an index of many samples costs."""

import json
import os
import tarfile
import time
import tracemalloc

import numpy as np
import pytest
from data_samples import captions_of, encoded, make_shards, write_tar
from hypothesis import given
from hypothesis import strategies as st

from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.shard_index import Keys
from mmd2v.data.shards import INDEX_SUFFIX, ShardIndex, ShardSet
from mmd2v.errors import UserError

SHARD = "shard-000001.tar"


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "set", 25, 10)


def cut(path, size):
    with open(path, "r+b") as handle:
        handle.truncate(size)


def kinds(samples):
    return [sample.kind if isinstance(sample, Damage) else sample.id for sample in samples]


# --------------------------------------------------------------------------------------------- keys


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), max_size=30))
def test_keys_are_kept(keys):
    packed = Keys.of(keys)
    assert len(packed) == len(keys) and list(packed) == keys and packed == keys
    assert packed == Keys(packed.blob, len(keys))
    assert packed.repeats() == {row for row, key in enumerate(keys) if key in keys[:row]}
    assert [packed[-place - 1] for place in range(len(keys))] == keys[::-1]
    assert packed[1:3] == keys[1:3]


def test_odd_keys():
    with pytest.raises(IndexError):
        Keys.of(["a"])[1]
    with pytest.raises(ValueError, match="found 2 keys, expected 3"):
        Keys(b"a\0b", 3)
    assert list(Keys.of(["\udcff"])) == ["\udcff"], "names that are not UTF-8 are kept as tarfile reads them"


def test_an_index_of_many_samples_is_small_and_fast(tmp_path):
    keys = [f"folder/sample-{number:012d}" for number in range(10_000)]
    index = ShardIndex(str(tmp_path / "a.tar"), Keys.of(keys), np.arange(60_000).reshape(-1, 3, 2), 1)
    index.write()
    tracemalloc.start()
    loaded = ShardIndex.load(index.path + INDEX_SUFFIX, index.path)
    loaded.span(9_999)
    resident = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert resident < 1_000_000
    assert loaded.keys == keys and (loaded.spans == index.spans).all()

    def seconds(call):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    # Bounds with room for a busy machine; measured 0.5 ms and 0.9 ms.
    assert seconds(lambda: ShardIndex.load(index.path + INDEX_SUFFIX, index.path)) < 0.005
    assert seconds(loaded.keys.repeats) < 0.005


# ------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_cut_shard_gives_what_is_in_front_of_the_cut(shards, index, manifest):
    path = shards / SHARD
    spans = ShardIndex.open(str(path)).spans
    cut(path, int(spans[7, 0].sum()) - 1)  # inside the image of sample 7
    if not index:
        os.unlink(str(path) + INDEX_SUFFIX)
    if not manifest:
        (shards / "shards.json").unlink()
    strict = pytest.raises(Damage, match=SHARD)
    if manifest:
        data = ShardSet(str(shards))
        with strict as caught:
            data.read(1, 0)
        assert caught.value.kind is DamageKind.SHARD_TRUNCATED
    else:
        with strict:
            ShardSet(str(shards))
    data = ShardSet(str(shards), tolerant=True)
    count = int(data.counts[1])
    assert count == (10 if manifest or index else 7), "without both, only the samples that are whole are known"
    found = kinds(data.read_many([(1, row) for row in range(count)]))
    assert found[:7] == [f"sample-{10 + row:04d}" for row in range(7)]
    assert found[7:] == [DamageKind.SHARD_TRUNCATED] * (count - 7)
    assert data.read(2, 4).id == "sample-0024"


def test_every_cut_of_a_tar_keeps_the_samples_in_front_of_it(tmp_path):
    path = write_tar(
        tmp_path / "x.tar",
        [(f"{n}.{end}", data) for n in range(4) for end, data in (("jpg", encoded(n)), ("txt", b"caption"))],
    )
    whole = ShardIndex.scan(str(path))
    ends = whole.spans.sum(axis=2).max(axis=1).tolist()
    mark = -(-ends[-1] // 512) * 512  # where the end-of-archive mark starts
    for size in range(path.stat().st_size - 512, 0, -256):
        cut(path, size)
        expected = sum(end <= size for end in ends)
        if expected == 0:
            with pytest.raises(Damage):
                ShardIndex.scan(str(path), tolerant=True)
            continue
        if size >= mark + 512:
            assert len(ShardIndex.scan(str(path))) == 4
            continue
        with pytest.raises(Damage):
            ShardIndex.scan(str(path))
        assert len(ShardIndex.scan(str(path), tolerant=True)) == expected, size


def test_garbage_inside_a_tar(shards):
    path = shards / SHARD
    spans = ShardIndex.open(str(path)).spans
    os.unlink(str(path) + INDEX_SUFFIX)
    with open(path, "r+b") as handle:
        handle.seek(int(spans[4, 0, 0]) - 512)
        handle.write(b"\xff" * 512)
    data = ShardSet(str(shards), tolerant=True)
    found = kinds(data.read_many([(1, row) for row in range(10)]))
    assert found == [f"sample-001{row}" for row in range(4)] + [DamageKind.SHARD_TRUNCATED] * 6


def test_a_member_of_a_negative_size(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.{kind}", b"text") for n in range(3) for kind in ("jpg", "txt")])
    header = tarfile.TarInfo("2.jpg")
    header.size = -512
    block = bytearray(path.read_bytes())
    block[4 * 1024 : 4 * 1024 + 512] = header.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(block)
    with pytest.raises(Damage, match="after sample 1: found a member of -512 bytes"):
        ShardIndex.scan(str(path))
    assert list(ShardIndex.scan(str(path), tolerant=True).keys) == ["0", "1"]


def test_a_name_with_a_zero_byte(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.txt", "b.txt"):
            info = tarfile.TarInfo(name)
            info.pax_headers = {"path": f"{name}\0.jpg"}
            tar.addfile(info)
    assert list(ShardIndex.scan(str(path)).keys) == ["a", "b"]


@pytest.mark.parametrize("span", [[-2, 0], [0, -1], [-1, -1], [-(2**62), 5]])
def test_an_index_with_negative_numbers(shards, span):
    path = str(shards / SHARD)
    index = ShardIndex.open(path)
    index.spans = index.spans.copy()
    index.spans[3, 0] = span
    index.write()
    with pytest.raises(Damage, match="not a shard index of this version"):
        ShardIndex.open(path)


def test_a_missing_shard(shards):
    (shards / SHARD).unlink()
    with pytest.raises(UserError, match=rf"{shards} lacks {SHARD} that its shards\.json lists"):
        ShardSet(str(shards))
    for spec in (str(shards), str(shards / "shard-{000000..000002}.tar")):
        data = ShardSet(spec, tolerant=True)
        assert data.counts.tolist() == [10, 10, 5]
        found = kinds(data.read_many([(0, 9), (1, 0), (1, 9), (2, 0)]))
        assert found == ["sample-0009", *[DamageKind.SHARD_UNREADABLE] * 2, "sample-0020"]
    with pytest.raises(UserError, match="shard-000003"):
        ShardSet(str(shards / "shard-{000000..000003}.tar"), tolerant=True)


def test_a_failed_shard_is_not_tried_for_each_sample(shards, monkeypatch):
    scans = []
    scan = ShardIndex.scan.__func__
    monkeypatch.setattr(ShardIndex, "scan", classmethod(lambda cls, *a, **k: scans.append(a) or scan(cls, *a, **k)))
    (shards / SHARD).write_bytes(b"junk" * 1000)
    os.unlink(str(shards / SHARD) + INDEX_SUFFIX)
    data = ShardSet(str(shards), tolerant=True)
    assert kinds(data.read_many([(1, row) for row in range(10)])) == [DamageKind.SHARD_UNREADABLE] * 10
    assert len(scans) == 1
    data._failures[1] = (time.monotonic() - 1, data._failures[1][1])
    data.read_many([(1, 0)])
    assert len(scans) == 2, "after a while it is tried again"


@pytest.mark.parametrize("tolerant", [False, True])
def test_duplicate_keys(tmp_path, tolerant):
    members = [(f"{key}.{end}", data) for key in "aba" for end, data in (("jpg", encoded(0)), ("txt", b"caption"))]
    data = ShardSet(str(write_tar(tmp_path / "x.tar", members)), tolerant=tolerant)
    assert kinds(data.read_many([(0, 0), (0, 1), (0, 2)])) == ["a", "b", DamageKind.DUPLICATE_KEY]
    with pytest.raises(Damage, match=r"x\.tar: sample a: an earlier sample of the shard has the same key"):
        data.read(0, 2, images=False)


# --------------------------------------------------------------------------------- samples of text


def test_text_alone(tmp_path, monkeypatch):
    members = [("a.txt", b"one"), ("b.jpg", encoded(1)), ("b.json", json.dumps({"captions": captions_of(1)}).encode())]
    data = ShardSet(str(write_tar(tmp_path / "x.tar", members)))
    assert kinds(data.read_many([(0, 0), (0, 1)])) == [DamageKind.NO_IMAGE, "b"]
    requested = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, b, o: requested.append(sum(map(len, b))) or preadv(f, b, o))
    one, two = data.read_many([(0, 0), (0, 1)], images=False)
    assert (one.captions, one.image) == (("one",), None)
    assert (two.captions, two.image) == (tuple(captions_of(1)), None)
    assert requested == [3, len(members[2][1])], "the image must not be read"


# -------------------------------------------------------------------------------------------- scale


def write_large_manifest(folder, count):
    record = {"version": 1, "shards": {f"shard-{n:06d}.tar": [10_000, 5 * 10**8, f"{n:064x}"] for n in range(count)}}
    (folder / "shards.json").write_text(json.dumps(record))
    return str(folder / "shards.json")


def test_a_hundred_thousand_shards_open_at_once(tmp_path):
    spec = write_large_manifest(tmp_path, 100_000)
    start = time.process_time()
    data = ShardSet(spec)
    assert time.process_time() - start < 5, "measured 0.5 s; the rest is for a busy machine"
    assert len(data) == 10**9
    assert data.locate(10**9 - 1) == (99_999, 9_999)


def test_memory_of_many_shards(tmp_path):
    spec = write_large_manifest(tmp_path, 10_000)
    tracemalloc.start()
    data = ShardSet(spec)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept / len(data.paths) < 250 and most / len(data.paths) < 1000, "bytes a shard"
