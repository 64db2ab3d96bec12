"""Broken tars, indexes, manifests and JSON of every kind: an answer or a clear error, no crash and no hang."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from data_samples import encoded, make_shards
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mmd2v.data.captions import meta_captions, parse_meta, text_captions
from mmd2v.data.damage import Damage
from mmd2v.data.image_header import image_size
from mmd2v.data.manifest import MANIFEST_NAME
from mmd2v.data.shards import RawSample, ShardSet
from mmd2v.data.sources import SourceOptions, open_source
from mmd2v.data.transforms import decode_image
from mmd2v.errors import UserError

LIMIT = 5.0  # seconds of processor time for one broken input: far from a loop without end
MANY = int(os.environ.get("MMD2V_FUZZ_EXAMPLES", "20000"))

# Where a tar's numbers lie: sizes, checksums and types decide how far a reader jumps.
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "drop", "double", "field"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=4,
)
numbers = st.one_of(st.integers(), st.floats(), st.booleans(), st.none())
values = st.recursive(
    st.one_of(numbers, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)


def edited(data: bytes, changes) -> bytes:
    """Apply some damage to bytes: bits, cuts, losses, repetitions, and nonsense in a header's fields."""
    for kind, where, new in changes:
        at = int(where * max(0, len(data) - 1))
        if kind == "flip":
            data = data[:at] + bytes([data[at] ^ new[0]]) + data[at + 1 :] if data else new
        elif kind == "cut":
            data = data[:at]
        elif kind == "drop":
            data = data[:at] + data[at + len(new) * 37 :]
        elif kind == "double":
            data = data[:at] + data[at : at + 700] + data[at:]
        else:
            header = at // 512 * 512 + 100 + new[0] % 60  # mode, ids, size, time, checksum, type of a tar header
            data = data[:header] + new + data[header + len(new) :]
    return data


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("fuzz") / "set", 5, 5)


def read_all(folder: Path) -> None:
    """Open and read everything, as training does."""
    began = time.process_time()
    try:
        shards = ShardSet(str(folder), tolerant=True)
    except UserError:
        shards = None
    if shards is not None:
        places = [(shard, row) for shard, count in enumerate(shards.counts.tolist()) for row in range(count)]
        assert len(places) < 10_000
        for images in (True, False):
            for sample in shards.read_many(places, images=images):
                assert isinstance(sample, (RawSample, Damage))
                if isinstance(sample, RawSample) and images:
                    image_size(sample.image)
        shards.close()
    assert time.process_time() - began < LIMIT


def broken_tar(whole: Path, tmp_path: Path, changes, indexed: bool) -> None:
    folder = tmp_path / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in whole.iterdir():
        if path.suffix == ".tar":
            (folder / path.name).write_bytes(edited(path.read_bytes(), changes))
        elif indexed:
            shutil.copy(path, folder)
    read_all(folder)


def broken_beside(whole: Path, tmp_path: Path, changes) -> None:
    """The tar is whole; its index and the manifest are not."""
    folder = tmp_path / "beside"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.write_bytes(edited(path.read_bytes(), changes))
    read_all(folder)


def some(examples: int):
    unlimited = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, suppress_health_check=unlimited)


@some(150)
@given(changes=edits, indexed=st.booleans())
def test_broken_tars(whole, tmp_path, changes, indexed):
    broken_tar(whole, tmp_path, changes, indexed)


@some(100)
@given(changes=edits)
def test_broken_indexes_and_manifests(whole, tmp_path, changes):
    broken_beside(whole, tmp_path, changes)


@some(100)
@given(value=values)
def test_manifests_of_any_json(whole, tmp_path, value):
    folder = tmp_path / "manifest"
    if not folder.exists():
        shutil.copytree(whole, folder)
    (folder / MANIFEST_NAME).write_text(json.dumps({"version": 1, "samples": 5, "shards": value}))
    read_all(folder)


@pytest.mark.parametrize("name", ["", ".", "..", "../a.tar", "a/b.tar"])
def test_a_manifest_names_files_beside_it(whole, tmp_path, name):
    folder = tmp_path / "manifest"
    shutil.copytree(whole, folder)
    (folder / MANIFEST_NAME).write_text(json.dumps({"version": 1, "samples": 5, "shards": {name: [9995, 0]}}))
    with pytest.raises(UserError, match="expected the name of a file beside it"):
        ShardSet(str(folder), tolerant=True)


@some(300)
@given(data=st.one_of(st.binary(max_size=60), values.map(lambda value: json.dumps(value).encode())))
def test_a_samples_text_of_any_bytes(data):
    for read in (lambda: meta_captions(parse_meta(data, "x"), "x"), lambda: text_captions(data, "x")):
        try:
            captions = read()
        except Damage:
            continue
        assert captions and all(caption.strip() and caption.encode() for caption in captions)


def test_json_of_any_depth_is_damage():
    for data in (b"[" * 200_000, b'{"captions":' * 50_000):
        with pytest.raises(Damage):
            parse_meta(data, "x")


@some(150)
@given(
    value=values,
    shape=st.sampled_from(
        ["plain", "flickr", "coco", "coco ids", "coco annotations", "karpathy", "karpathy images", "regions"]
    ),
    mark=st.booleans(),
)
@example(value=[1], shape="coco ids", mark=False)
@example(value=[1], shape="coco annotations", mark=False)
@example(value=5, shape="karpathy images", mark=False)
def test_caption_files_of_any_json(tmp_path, value, shape, mark):
    content = {
        "plain": value,
        "flickr": [{"image": value, "caption": value}, value],
        "coco": {
            "images": [{"id": 1, "file_name": value}, value],
            "annotations": [value, {"image_id": 1, "caption": value}],
        },
        "regions": [{"id": 1, "regions": [{"phrase": value}, value]}, value],
        "coco ids": {
            "images": [{"id": value, "file_name": "a.jpg"}],
            "annotations": [{"image_id": value, "caption": "x"}],
        },
        "coco annotations": {
            "images": [{"id": 1, "file_name": "a.jpg"}],
            "annotations": [{"image_id": value, "caption": "x"}],
        },
        "karpathy": {"images": [{"filename": "a.jpg", "split": value, "sentences": value}]},
        "karpathy images": {
            "images": [{"filename": "a.jpg", "filepath": value, "split": "test", "sentences": [{"raw": "x"}]}]
        },
    }[shape]
    path = tmp_path / "captions.json"
    path.write_text(("\ufeff" if mark else "") + json.dumps(content))
    options = SourceOptions(splits=("test",)) if shape.startswith("karpathy") else None
    try:
        list(open_source(path, options=options).records())
    except UserError as error:
        assert str(error)


@some(200)
@given(changes=edits, format=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]))
def test_broken_images(changes, format):
    began = time.process_time()
    try:
        image = decode_image(edited(encoded(3, format), changes), "x")
        assert image.shape[0] == 3
    except Damage:
        pass
    assert time.process_time() - began < LIMIT


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_more_broken_files(whole, tmp_path):
    """The same, for as long as it takes: MMD2V_FUZZ_EXAMPLES sets how many."""

    @some(MANY)
    @given(changes=edits, indexed=st.booleans(), beside=st.booleans())
    def many(changes, indexed, beside):
        if beside:
            broken_beside(whole, tmp_path, changes)
        else:
            broken_tar(whole, tmp_path, changes, indexed)

    many()
