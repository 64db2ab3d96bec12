import errno
import json
import os
from pathlib import Path

import pytest
import torch
from data_samples import (
    captions_of,
    damaged_headers,
    encoded,
    insert_member,
    leftovers,
    write_images,
    write_json,
    write_tar,
)

from mmd2v.data.generate import facts_from_json, generate
from mmd2v.data.packing import ordered_map, pack
from mmd2v.data.shards import ShardSet
from mmd2v.data.sources import open_source
from mmd2v.data.synthetic import attributes, captions, scene
from mmd2v.data.transforms import decode_image
from mmd2v.errors import UserError


def packed(source, out, **kwargs):
    """Pack, and read everything back: id → (captions, JSON, image bytes)."""
    report = pack(source, out, **kwargs)
    data = ShardSet(str(out))
    samples = [data.read(*data.locate(n)) for n in range(len(data))]
    assert report.samples == len(data) and report.captions == sum(len(sample.captions) for sample in samples)
    return {sample.id: (list(sample.captions), sample.meta, bytes(sample.image)) for sample in samples}


def error(source, tmp_path, **kwargs):
    """The message of a failed pack, after making sure that it left nothing behind."""
    before = leftovers(tmp_path)
    with pytest.raises(UserError) as caught:
        pack(source, tmp_path / "out", **kwargs)
    assert leftovers(tmp_path) == before
    return str(caught.value)


def flickr(tmp_path, count=4):
    names = [f"{n}.jpg" for n in range(count)]
    write_images(tmp_path / "images", names)
    entries = [{"image": name, "caption": captions_of(n, 2)} for n, name in enumerate(names)]
    return write_json(tmp_path / "captions.json", entries), tmp_path / "images"


def test_flickr(tmp_path):
    source, images = flickr(tmp_path)
    samples = packed(source, tmp_path / "out", images=images, shard_size=3)
    assert list(samples) == ["0", "1", "2", "3"]
    texts, meta, image = samples["2"]
    assert texts == captions_of(2, 2) and image == encoded(2)
    assert (meta["width"], meta["height"]) == (48, 40)
    assert sorted(entry.name for entry in (tmp_path / "out").glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]


def test_flickr_with_a_row_a_caption(tmp_path):
    write_images(tmp_path, ["a/x.jpg", "b/x.jpg"])
    entries = [{"image": f"{d}/x.jpg", "caption": f"{d} {n}"} for n in range(2) for d in "ab"]
    samples = packed(write_json(tmp_path / "captions.json", entries), tmp_path / "out")
    assert {name: sample[0] for name, sample in samples.items()} == {"a/x": ["a 0", "a 1"], "b/x": ["b 0", "b 1"]}


@pytest.mark.parametrize("folders", [True, False])
def test_images_from_a_tar(tmp_path, folders):
    source, images = flickr(tmp_path)
    prefix = "./some/folder/" if folders else ""
    tar = write_tar(tmp_path / "i.tar", [(prefix + path.name, path.read_bytes()) for path in sorted(images.iterdir())])
    assert packed(source, tmp_path / "a", images=tar) == packed(source, tmp_path / "b", images=images)


@pytest.mark.parametrize("kind", damaged_headers())
def test_a_damaged_header_in_a_tar_of_images(tmp_path, caplog, kind):
    source = write_json(tmp_path / "c.json", [{"image": f"{n}.jpg", "caption": captions_of(n)} for n in range(4)])
    tar = write_tar(tmp_path / "i.tar", [(f"{n}.jpg", encoded(n)) for n in range(4)])
    insert_member(tar, damaged_headers()[kind], 2)
    message = error(source, tmp_path, images=tar)
    assert message.startswith(f"--images: {tar}: ") and "after 1.jpg" in message
    report = pack(source, tmp_path / "out", images=tar, skip_bad=True)
    assert (report.samples, report.skipped) == (2, {"no_image": 2})
    assert "after 1.jpg" in caplog.text and "the 2 images in front of that are used" in caplog.text


def test_a_byte_order_mark(tmp_path):
    write_images(tmp_path, ["0.jpg"])
    (tmp_path / "c.json").write_text('\ufeff[{"image": "0.jpg", "caption": "x"}]', encoding="utf-8")
    assert pack(tmp_path / "c.json", tmp_path / "out").samples == 1


def test_a_base_name_in_two_folders_of_a_tar_is_not_guessed(tmp_path):
    source = write_json(tmp_path / "c.json", [{"image": "x.jpg", "caption": "a"}])
    tar = write_tar(tmp_path / "i.tar", [("a/x.jpg", encoded(0)), ("b/x.jpg", encoded(1))])
    assert "1 of its 1 images are not in" in error(source, tmp_path, images=tar)
    source = write_json(tmp_path / "c.json", [{"image": "b/x.jpg", "caption": "a"}])
    assert packed(source, tmp_path / "o", images=tar)["b/x"][2] == encoded(1)


def coco_content():
    return {
        "info": {},
        "images": [{"id": 7, "file_name": "0007.jpg"}, {"id": 3, "file_name": "0003.jpg"}],
        "annotations": [
            {"image_id": 3, "id": 1, "caption": "three\n"},
            {"image_id": 7, "id": 2, "caption": "seven"},
            {"image_id": 3, "id": 3, "caption": " again three"},
        ],
    }


def test_coco(tmp_path):
    write_images(tmp_path, ["train/0007.jpg", "train/0003.jpg"])
    source = write_json(tmp_path / "captions.json", coco_content())
    samples = packed(source, tmp_path / "out", images=tmp_path / "train")
    assert {name: (s[0], s[1]["image_id"]) for name, s in samples.items()} == {
        "0007": (["seven"], 7),
        "0003": (["three", "again three"], 3),
    }


def karpathy_content():
    splits = ["train", "restval", "test", "train"]
    return {
        "dataset": "coco",
        "images": [
            {
                "filename": f"{n}.jpg",
                "filepath": "val2014",
                "cocoid": 100 + n,
                "split": split,
                "sentences": [{"raw": text, "tokens": []} for text in captions_of(n)],
            }
            for n, split in enumerate(splits)
        ],
    }


def test_karpathy_splits(tmp_path):
    write_images(tmp_path, [f"val2014/{n}.jpg" for n in range(4)])
    source = write_json(tmp_path / "dataset_coco.json", karpathy_content())
    samples = packed(source, tmp_path / "a", splits=("train", "restval"))
    assert {name: s[1]["image_id"] for name, s in samples.items()} == {"0": 100, "1": 101, "3": 103}
    assert samples["1"][1]["split"] == "restval" and samples["1"][0] == captions_of(1)
    # The images may lie without their folder too.
    assert list(packed(source, tmp_path / "b", images=tmp_path / "val2014", splits=("test",))) == ["2"]


@pytest.mark.parametrize(
    ("name", "header", "delimiter"),
    [
        ("c.csv", "image,caption", ","),
        ("c.tsv", "filepath\ttitle", "\t"),
        ("c.csv", "image_name| comment_number| comment", "|"),
        ("c.csv", "filepath\ttitle", "\t"),
        ("c.csv", "id;Image;Caption", ";"),
    ],
)
def test_csv(tmp_path, name, header, delimiter):
    write_images(tmp_path, ["0.jpg", "1.jpg"])
    rows = []
    for number, text in [(0, "first"), (1, '"second, with a comma"'), (0, "third")]:
        values = {"comment_number": "5", "id": "9"}
        fields = [field.strip() for field in header.split(delimiter)]
        picture = f"{number}.jpg"
        image_fields = ("image", "filepath", "image_name", "Image")
        rows.append(delimiter.join(values.get(f, picture if f in image_fields else text) for f in fields))
    source = tmp_path / name
    source.write_text("\ufeff" + "\r\n".join([header, *rows, ""]), encoding="utf-8")
    samples = packed(source, tmp_path / "out")
    assert {key: sample[0] for key, sample in samples.items()} == {
        "0": ["first", "third"],
        "1": ["second, with a comma"],
    }


def test_csv_columns_by_name(tmp_path):
    write_images(tmp_path, ["0.jpg"])
    source = tmp_path / "c.csv"
    source.write_text("caption,bild,text_de\nwrong,0.jpg,richtig\n")
    samples = packed(source, tmp_path / "out", image_column="bild", caption_column="text_de")
    assert samples["0"][0] == ["richtig"]


def test_folder(tmp_path):
    write_images(tmp_path / "set", ["a/0.jpg", "b/1.png"])
    (tmp_path / "set/a/0.txt").write_text("one\n\ntwo\n")
    (tmp_path / "set/b/1.txt").write_text("three")
    samples = packed(tmp_path / "set", tmp_path / "out")
    assert {name: sample[0] for name, sample in samples.items()} == {"a/0": ["one", "two"], "b/1": ["three"]}


def test_other_formats_become_jpeg_and_resize_shrinks(tmp_path):
    (tmp_path / "big.png").write_bytes(encoded(0, "PNG", width=90, height=60))
    (tmp_path / "small.jpg").write_bytes(encoded(1, width=30, height=20))
    for name in ("big", "small"):
        (tmp_path / f"{name}.txt").write_text("x")
    whole = packed(tmp_path, tmp_path / "../whole")
    assert whole["big"][2].startswith(b"\xff\xd8")
    reference = decode_image((tmp_path / "big.png").read_bytes()).int()
    assert (decode_image(whole["big"][2]).int() - reference).abs().float().mean() < 3
    resized = packed(tmp_path, tmp_path / "../resized", resize=40)
    assert decode_image(resized["big"][2]).shape == (3, 40, 60)
    assert (resized["big"][1]["width"], resized["big"][1]["height"]) == (60, 40)
    assert resized["small"][2] == encoded(1, width=30, height=20)


def test_workers_change_nothing(tmp_path):
    source, images = flickr(tmp_path, 20)
    pack(source, tmp_path / "a", images=images, workers=1, shard_size=7)
    pack(source, tmp_path / "b", images=images, workers=5, shard_size=7)
    for name in leftovers(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# ------------------------------------------------------------------------------------- bad input


def test_absent_images(tmp_path):
    source, images = flickr(tmp_path, 6)
    for name in ("1.jpg", "2.jpg", "3.jpg", "5.jpg"):
        (images / name).unlink()
    message = error(source, tmp_path, images=images)
    assert f"{source}: 4 of its 6 images are not in {images}: 1.jpg, 2.jpg, 3.jpg and 1 more" in message
    assert "Did you mean" in message


def test_image_that_does_not_decode(tmp_path):
    source, images = flickr(tmp_path)
    (images / "2.jpg").write_bytes(encoded(2)[:150])
    assert "image 2.jpg: the image does not decode" in error(source, tmp_path, images=images)


def bomb(side):
    """A valid PNG of a few hundred bytes that would decode to ``side``² pixels."""
    import io

    from PIL import Image

    data = io.BytesIO()
    Image.new("1", (side, side)).save(data, "PNG")
    return data.getvalue()


def test_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    source, images = flickr(tmp_path)
    (images / "2.jpg").write_bytes(bomb(12_000))

    def careful(data, where):
        assert data != bomb(12_000)
        return decode_image(data, where)

    monkeypatch.setattr("mmd2v.data.transforms.decode_image", careful)
    message = error(source, tmp_path, images=images, workers=1)
    assert "image 2.jpg: found an image of 12,000 × 12,000 pixels, expected at most 100,000,000 pixels" in message
    monkeypatch.undo()
    report = pack(source, tmp_path / "out", images=images, skip_bad=True)
    assert report.samples == 3 and report.skipped == {"image_too_large": 1}
    assert "found an image of 48 × 40" in error(source, tmp_path / "out", images=images, max_pixels=48 * 40 - 1)


def test_names_that_lead_out_of_the_folder_are_absent(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(encoded(0))
    (tmp_path / "images").mkdir()
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg")):
        source = write_json(tmp_path / "c.json", [{"image": name, "caption": "x"}])
        assert "are not in" in error(source, tmp_path, images=tmp_path / "images")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image": "0.jpg", "caption": ["a", " "]}], "image 0.jpg: caption 1 is empty"),
        ([{"image": "0.jpg", "caption": []}], "image 0.jpg: no caption"),
        ([{"image": "0.jpg", "caption": [1]}], "caption 0 is a int"),
        ([{"image": "0.jpg", "caption": None}], "type NoneType"),
        ([{"image": "0.jpg", "captoin": "x"}], "entry 0 has no 'caption'. Did you mean 'captoin'?"),
        ([{"image": "", "caption": "x"}], "entry 0: found image name ''"),
        ([{"image": "0.jpg", "caption": "x"}, 5], "entry 1 is a int"),
        ([{"image": "0.jpg", "caption": ["x"]}, {"image": "0.jpg", "caption": ["y"]}], "1 duplicate ids"),
        ([{"image": "0.jpg", "caption": ["x"]}, {"image": "0.png", "caption": ["y"]}], "0.jpg, 0.png"),
        ([], "the JSON is none of"),
        ({"images": 3}, "the JSON is none of"),
        ({"images": [], "annotations": []}, "found no image"),
    ],
)
def test_bad_caption_files(tmp_path, content, message):
    write_images(tmp_path, ["0.jpg", "0.png"])
    assert message in error(write_json(tmp_path / "c.json", content), tmp_path)


def test_bad_coco(tmp_path):
    write_images(tmp_path, ["0007.jpg", "0003.jpg"])

    def changed(**change):
        return error(write_json(tmp_path / "c.json", {**coco_content(), **change}), tmp_path)

    assert "image id 8 is not among 'images'" in changed(annotations=[{"image_id": 8, "caption": "x"}])
    assert "image 0007.jpg: no caption" in changed(annotations=[{"image_id": 3, "caption": "x"}])
    assert "duplicate image id 7" in changed(images=[{"id": 7, "file_name": "a"}, {"id": 7, "file_name": "b"}])
    assert "images entry 0 has no 'file_name'" in changed(images=[{"id": 7}])
    assert "lists 'images' and 'annotations'" in changed(annotations=3)


def test_bad_karpathy(tmp_path):
    write_images(tmp_path, [f"val2014/{n}.jpg" for n in range(4)])
    source = write_json(tmp_path / "d.json", karpathy_content())
    assert "--split: missing" in error(source, tmp_path) and "train (2 images)" in error(source, tmp_path)
    assert "Did you mean 'restval'" in error(source, tmp_path, splits=("restvl",))
    source, images = flickr(tmp_path)
    assert "which has no splits" in error(source, tmp_path, images=images, splits=("test",))


def test_bad_csv(tmp_path):
    write_images(tmp_path, ["0.jpg"])
    source = tmp_path / "c.csv"

    def of(text):
        source.write_text(text)
        return error(source, tmp_path)

    assert "the header needs a column" in of("a,b\n0.jpg,x\n")
    assert "line 3: the caption of 0.jpg is empty" in of("image,caption\n0.jpg,x\n0.jpg,\n")
    assert "line 2: found 1 fields" in of("image,caption\n0.jpg\n")
    assert "found no image" in of("image,caption\n")
    source.write_bytes(b"image,caption\n0.jpg,\xff\xfe\n")
    assert "cannot be read as CSV" in error(source, tmp_path)


def test_bad_folder(tmp_path):
    write_images(tmp_path / "set", ["0.jpg", "1.jpg"])
    (tmp_path / "set/0.txt").write_text("x")
    assert "1 of 2 images have no .txt" in error(tmp_path / "set", tmp_path)
    (tmp_path / "set/1.txt").write_text("\n")
    assert "1.txt: no caption" in error(tmp_path / "set", tmp_path)
    (tmp_path / "set/2.txt").write_text("x")
    assert "1 .txt files have no image" in error(tmp_path / "set", tmp_path)


def test_bad_places(tmp_path):
    source, images = flickr(tmp_path)
    assert "Did you mean 'captions.json'" in error(tmp_path / "caption.json", tmp_path, images=images)
    assert "--images" in error(source, tmp_path, images=tmp_path / "image")
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    assert "no readable, uncompressed tar" in error(source, tmp_path, images=tmp_path / "broken.tar")
    (tmp_path / "c.json").write_text("{")
    assert "cannot be read as JSON" in error(tmp_path / "c.json", tmp_path)
    (tmp_path / "c.xml").write_text("{")
    assert "found a .xml, expected .json, .csv, .tsv, .txt, .jsonl, .tar or a folder" in error(
        tmp_path / "c.xml", tmp_path
    )
    assert "format coco is a JSON object" in error(source, tmp_path, images=images, format="coco")
    assert "needs a folder" in error(source, tmp_path, format="folder")
    assert "which has no columns" in error(source, tmp_path, image_column="x")
    assert "--shard-size: found 0" in error(source, tmp_path, images=images, shard_size=0)
    assert "--resize: found -3" in error(source, tmp_path, images=images, resize=-3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    assert "exists and is not an empty folder" in error(source, tmp_path, images=images)


def test_full_disk_leaves_nothing(tmp_path, monkeypatch, capfd):
    source, images = flickr(tmp_path, 8)

    def full(image, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mmd2v.data.writer.os.fsync", lambda handle: full(None, None))
    assert "out: cannot be written: the disk is full" in error(source, tmp_path, images=images, shard_size=3)
    assert "Traceback" not in capfd.readouterr().err


def test_ordered_map_keeps_order_and_stops_at_an_error():
    assert list(ordered_map(lambda n: n * n, range(100), 4)) == [n * n for n in range(100)]
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(lambda n: 1 // (n - 5), range(10), 3))


def test_sources_keep_file_order(tmp_path):
    write_images(tmp_path, [f"{n}.jpg" for n in (1, 2, 3)])
    source = write_json(tmp_path / "c.json", [{"image": f"{n}.jpg", "caption": "x"} for n in (3, 1, 2)])
    assert [record.id for record in open_source(source).records()] == ["3", "1", "2"]


# -------------------------------------------------------------------------------- generated world


def test_generated_world(tmp_path):
    report = generate(tmp_path / "w", split="test", count=7, size=32, seed=5, captions_per_image=2, shard_size=4)
    assert (report.samples, report.captions, report.shards) == (7, 14, 2)
    data = ShardSet(str(tmp_path / "w"))
    for n in range(7):
        sample = data.read(*data.locate(n))
        world = scene(5, "test", n)
        drawn = captions(world, 5, 2)
        assert sample.captions == tuple(caption.text for caption in drawn)
        assert [facts_from_json(record) for record in sample.meta["facts"]] == [caption.facts for caption in drawn]
        assert sample.meta["attributes"] == attributes(world).tolist()
        assert scene(**sample.meta["scene"]) == world
        assert decode_image(sample.image).shape == (3, 32, 32)
    assert len({data.read(*data.locate(n)).id for n in range(7)}) == 7


def test_generated_world_does_not_depend_on_processes(tmp_path):
    common = {"split": "train", "count": 600, "size": 16, "seed": 1}
    generate(tmp_path / "a", **common, workers=1)
    generate(tmp_path / "b", **common, workers=2)
    for name in leftovers(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "tset"}, "Did you mean 'test'"),
        ({"count": 0}, "--count: found 0"),
        ({"size": 2}, "--size: found 2"),
        ({"captions_per_image": 0}, "--captions: found 0"),
        ({"seed": -1}, "--seed: found -1"),
    ],
)
def test_bad_worlds(tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        generate(tmp_path / "w", **{"split": "train", "count": 3, "size": 16, "seed": 0, **change})
    assert message in str(caught.value)
    assert leftovers(tmp_path) == []


# -------------------------------------------------------------------------------------- real data


def test_flickr8k(shared, tmp_path):
    folder = shared / "flickr8k"
    source = folder / "flickr8k_val.json"
    report = pack(source, tmp_path / "val", images=folder / "flickr8k_val_images_160px.tar", shard_size=400)
    assert (report.samples, report.captions, report.shards) == (1000, 5000, 3)
    expected = json.loads(source.read_text())
    data = ShardSet(str(tmp_path / "val"))
    for n in range(0, 1000, 97):
        sample = data.read(*data.locate(n))
        assert sample.id == Path(expected[n]["image"]).stem
        assert sample.captions == tuple(text.strip() for text in expected[n]["caption"])


def test_coco_mini(shared, tmp_path):
    folder = shared / "coco_mini"
    source = folder / "captions_train2017.json"
    samples = packed(source, tmp_path / "coco", images=folder / "train2017.tar", resize=64)
    content = json.loads(source.read_text())
    assert len(samples) == len(content["images"]) == 80
    assert sum(len(sample[0]) for sample in samples.values()) == len(content["annotations"])
    for _, meta, image in samples.values():
        decoded = decode_image(image)
        assert min(decoded.shape[1:]) == 64 and (meta["height"], meta["width"]) == tuple(decoded.shape[1:])
        assert decoded.dtype == torch.uint8


def test_nothing_is_imported_for_rendering():
    """Processes that render scenes must not wait for torch."""
    import subprocess
    import sys

    code = "import sys, mmd2v.data.generate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
