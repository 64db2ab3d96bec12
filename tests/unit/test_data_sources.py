"""The formats beside caption files: Visual Genome, img2dataset's shards, text; and how a format is told."""

import gzip
import io
import json
import lzma
import tarfile

import pytest
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
from hypothesis import given
from hypothesis import strategies as st

from mmd2v.data.check import check_shards
from mmd2v.data.packing import pack
from mmd2v.data.shards import ShardSet
from mmd2v.data.sources import FORMATS, open_source
from mmd2v.data.sources import peek as peeking
from mmd2v.data.sources.peek import Peek, json_items
from mmd2v.data.transforms import decode_image
from mmd2v.errors import UserError


def packed(source, out, images=True, **kwargs):
    """Pack and read back: the report, and id → (captions, JSON, image bytes)."""
    report = pack(source, out, **kwargs)
    data = ShardSet(str(out))
    samples = {}
    for shard, count in enumerate(data.counts.tolist()):
        index = data.index(shard)
        with open(index.path, "rb") as handle:
            for row in range(count):
                sample = index.read(row, handle.fileno(), images=images)
                samples[sample.id] = (list(sample.captions), sample.meta, sample.image and bytes(sample.image))
    assert len(samples) == report.samples
    assert check_shards(str(out)).problems == []
    return report, samples


def refused(source, tmp_path, **kwargs):
    """The message of a failed pack that left nothing behind."""
    before = leftovers(tmp_path)
    with pytest.raises(UserError) as caught:
        pack(source, tmp_path / "out", **kwargs)
    assert leftovers(tmp_path) == before
    return str(caught.value)


# --------------------------------------------------------------------------------- Visual Genome


def region(number, image, phrase):
    return {
        "region_id": 1000 * image + number,
        "image_id": image,
        "x": 3,
        "y": 4,
        "width": 20,
        "height": 10,
        "phrase": phrase,
    }


def visual_genome(folder, count=5, regions=4):
    """``region_descriptions.json`` and both image folders as they are published."""
    write_images(folder, [f"VG_100K{'_2' if n % 2 else ''}/{n}.jpg" for n in range(1, count + 1)])
    content = [
        {"id": n, "regions": [region(k, n, text) for k, text in enumerate(captions_of(n, regions))]}
        for n in range(1, count + 1)
    ]
    return write_json(folder / "region_descriptions.json", content)


def test_visual_genome(tmp_path):
    source = visual_genome(tmp_path / "vg")
    report, samples = packed(source, tmp_path / "out", shard_size=2)
    assert (report.samples, report.captions, report.shards) == (5, 20, 3)
    assert list(samples) == ["1", "2", "3", "4", "5"]
    texts, meta, image = samples["3"]
    assert texts == captions_of(3, 4) and meta["image_id"] == 3 and image == encoded(2)


def test_visual_genome_from_folders_and_a_tar(tmp_path):
    source = visual_genome(tmp_path / "vg")
    places = [tmp_path / "vg/VG_100K", tmp_path / "vg/VG_100K_2"]
    images = [(f"{p.parent.name}/{p.name}", p.read_bytes()) for place in places for p in sorted(place.iterdir())]
    tar = write_tar(tmp_path / "vg.tar", images)
    expected = packed(source, tmp_path / "a")[1]
    assert packed(source, tmp_path / "b", images=places)[1] == expected
    assert packed(source, tmp_path / "c", images=[places[1], tar])[1] == expected
    assert "image 1: found no 1.jpg in" in refused(source, tmp_path, images=places[0])


def test_first_captions_alone(tmp_path):
    source = visual_genome(tmp_path / "vg")
    report, samples = packed(source, tmp_path / "out", max_captions=2, limit=3)
    assert report.captions == 6 and samples["2"][0] == captions_of(2, 2)


def test_visual_genome_with_blank_phrases_and_damage(tmp_path):
    source = visual_genome(tmp_path)
    content = json.loads(source.read_text())
    content[0]["regions"][1]["phrase"] = " \n"
    content[1]["regions"] = []
    content[2]["id"] = 4
    write_json(source, content)
    assert "image 2: no region with a phrase" in refused(source, tmp_path)
    assert "--skip-bad" in refused(source, tmp_path)
    report, samples = packed(source, tmp_path / "out", skip_bad=True)
    assert report.skipped == {"no_caption": 1, "duplicate_key": 1}
    assert list(samples) == ["1", "4", "5"]
    assert samples["1"][0] == [text for k, text in enumerate(captions_of(1, 4)) if k != 1]


def test_bad_visual_genome(tmp_path):
    write_images(tmp_path, ["1.jpg"])

    def of(content, **kwargs):
        return refused(write_json(tmp_path / "r.json", content), tmp_path, format="visual_genome", **kwargs)

    assert "found no image" in of([])
    assert "is no list, expected a list" in of({"regions": []})
    assert "'regions' is a int, no list" in of([{"id": 1, "regions": 3}])
    assert "region 0 has no 'phrase'. Did you mean 'phrse'?" in of([{"id": 1, "regions": [{"phrse": "x"}]}])
    assert "found image id 'x'" in of([{"id": "x", "regions": []}])
    assert "caption 0 is a int" in of([{"id": 1, "regions": [{"phrase": 3}]}])
    source = tmp_path / "r.json"
    source.write_text(json.dumps([{"id": 1, "regions": [region(0, 1, "x")]}, {"id": 2, "regions": []}])[:-5])
    assert "item 1 does not parse" in refused(source, tmp_path, format="visual_genome")


# ----------------------------------------------------------------------------- lists read in pieces


@given(st.lists(st.recursive(st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)), max_size=8))
def test_json_lists_come_item_by_item(tmp_path_factory, items):
    path = tmp_path_factory.mktemp("j") / "x.json"
    chunk, peeking._CHUNK = peeking._CHUNK, 3  # so that every item lies across pieces
    try:
        for text in (json.dumps(items), json.dumps(items, indent=3), json.dumps(items, ensure_ascii=False) + " \n"):
            path.write_text(text, encoding="utf-8")
            assert list(json_items(path)) == items
    finally:
        peeking._CHUNK = chunk


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no list"),
        ("{}", "no list"),
        ("[1, 2", "item 1 does not parse"),
        ("[1 2]", "item 1 is not followed"),
        ("[1,]", "item 1 does not parse"),
        ("[1] 2", "more behind the end"),
        ("[", "item 0 does not parse"),
    ],
)
def test_bad_json_lists(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        list(json_items(tmp_path / "x.json"))


# ----------------------------------------------------------------------------------- img2dataset


def downloaded(shard, number, kind="JPEG", **change):
    """The members of one sample as img2dataset writes them."""
    key = f"{shard:05d}{number:04d}"
    meta = {
        "caption": f"caption of {key}",
        "url": f"https://images.example/{key}",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": 48,
        "height": 40,
        "original_width": 480,
        "original_height": 400,
        "exif": "{}",
        "sha256": "00" * 32,
        **change,
    }
    suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
    return [
        (f"{key}.{suffix}", encoded(number, kind)),
        (f"{key}.txt", str(meta["caption"]).encode()),
        (f"{key}.json", json.dumps(meta, indent=4).encode()),
    ]


def img2dataset(folder, shards=3, samples=4, kind="JPEG"):
    folder.mkdir()
    for shard in range(shards):
        members = [member for n in range(samples) for member in downloaded(shard, n, kind)]
        write_tar(folder / f"{shard:05d}.tar", members)
        write_json(folder / f"{shard:05d}_stats.json", {"count": samples + 1, "successes": samples})
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    return folder


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_img2dataset(tmp_path, kind):
    source = img2dataset(tmp_path / "cc3m", kind=kind)
    assert open_source(source).total == 12
    report, samples = packed(source, tmp_path / "out", shard_size=5)
    assert (report.samples, report.captions, report.shards) == (12, 12, 3)
    assert list(samples)[:5] == ["000000000", "000000001", "000000002", "000000003", "000010000"]
    texts, meta, image = samples["000010002"]
    assert texts == ["caption of 000010002"]
    assert meta["url"] == "https://images.example/000010002" and meta["original_width"] == 480
    assert (meta["width"], meta["height"], meta["sha256"]) == (48, 40, "00" * 32)
    assert not {"key", "caption", "status", "exif"} & set(meta)
    assert decode_image(image).shape == (3, 40, 48) and image.startswith(b"\xff\xd8")


def test_the_first_samples_of_img2dataset(tmp_path):
    source = img2dataset(tmp_path / "cc3m")
    report, samples = packed(source, tmp_path / "out", limit=6, shard_size=4)
    assert list(samples) == [f"00000000{n}" for n in range(4)] + ["000010000", "000010001"]
    assert report.shards == 2


def test_one_shard_and_shards_without_statistics(tmp_path):
    source = img2dataset(tmp_path / "cc3m", shards=2)
    assert next(iter(packed(source / "00001.tar", tmp_path / "a")[1])) == "000010000"
    for path in source.glob("*_stats.json"):
        path.unlink()
    assert open_source(source).total is None
    assert packed(source, tmp_path / "b")[0].samples == 8


def test_keys_that_shards_share_become_different_ids(tmp_path):
    source = tmp_path / "own"
    source.mkdir()
    for name in ("a", "b"):
        write_tar(source / f"{name}.tar", [("x.jpg", encoded(0)), ("x.txt", b"a caption\nin two lines")])
    samples = packed(source, tmp_path / "out", format="img2dataset")[1]
    assert {name: sample[0] for name, sample in samples.items()} == {
        "a/x": ["a caption\nin two lines"],
        "b/x": ["a caption\nin two lines"],
    }


def test_damage_in_img2dataset_shards(tmp_path):
    source = img2dataset(tmp_path / "cc3m", shards=4)
    members = [
        *downloaded(1, 0),
        *downloaded(1, 1, caption=None)[::2],
        *downloaded(1, 2)[1:],
        *downloaded(1, 3, status="failed_to_download"),
        ("000010004.jpg", encoded(1)[:200]),
        ("000010004.txt", b"x"),
        ("000010005.jpg", encoded(1)),
        ("000010005.txt", b"\xff\xfe"),
        ("000010006.jpg", encoded(1)),
        ("000010006.json", b"{"),
        *downloaded(1, 0),
        *downloaded(1, 7, caption=" "),
    ]
    write_tar(source / "00001.tar", members)
    cut = source / "00002.tar"
    cut.write_bytes(cut.read_bytes()[: 512 * 12])
    (source / "00002_stats.json").unlink()
    (source / "00003.tar").write_bytes(b"no tar" * 300)
    assert "00001.tar: sample 000010001: no caption" in refused(source, tmp_path)
    report, samples = packed(source, tmp_path / "out", skip_bad=True)
    assert list(samples) == [f"00000000{n}" for n in range(4)] + ["000010000", "000020000"]
    assert report.skipped == {
        "no_caption": 2,
        "no_image": 2,
        "image_undecodable": 1,
        "bad_encoding": 1,
        "bad_meta": 1,
        "duplicate_key": 1,
        "shard_truncated": 1,
        "shard_unreadable": 1,
    }
    text = str(report)
    assert "left out 10 damaged ones" in text and "img2dataset did not finish it" in text
    assert "bad_meta: 1, the first: " in text


def test_a_header_that_names_more_bytes_than_there_are(tmp_path):
    source = img2dataset(tmp_path / "cc3m", shards=1)
    path = source / "00000.tar"
    with tarfile.open(path) as tar:
        second = tar.getmember("000000001.jpg")
        second.size = 10**13
        header = second.tobuf(tarfile.GNU_FORMAT)
        data = bytearray(path.read_bytes())
        data[second.offset : second.offset + 512] = header[-512:]
    path.write_bytes(data)
    report, samples = packed(source, tmp_path / "out", skip_bad=True)
    assert list(samples) == ["000000000"] and report.skipped == {"shard_truncated": 1}
    assert "000000001.jpg is said to have 10,000,000,000,000 bytes" in report.examples["shard_truncated"]


@pytest.mark.parametrize("kind", damaged_headers())
def test_damaged_headers_in_shards_and_archives(tmp_path, kind):
    source = img2dataset(tmp_path / "cc3m", shards=1)
    (source / "00000_stats.json").unlink()
    insert_member(source / "00000.tar", damaged_headers()[kind], 3)
    report, samples = packed(source, tmp_path / "out", skip_bad=True)
    assert list(samples) == ["000000000"] and sum(report.skipped.values()) == 1
    texts = write_tar(tmp_path / "t.tar", [(f"{n}.txt", b"Some words.") for n in range(4)])
    insert_member(texts, damaged_headers()[kind], 2)
    report, samples = packed(texts, tmp_path / "texts", images=False, format="text", skip_bad=True)
    assert list(samples) == ["t.tar/0-000000", "t.tar/1-000000"] and sum(report.skipped.values()) == 1


def test_bad_img2dataset(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "needs .tar shards in a folder, found none" in refused(tmp_path / "empty", tmp_path, format="img2dataset")
    source = img2dataset(tmp_path / "cc3m")
    assert "has no separate images" in refused(source, tmp_path, images=tmp_path)
    assert "--limit: found 0" in refused(source, tmp_path, limit=0)


# ------------------------------------------------------------------------------------------ text

BOOK = "It is a truth universally acknowledged.\nHe said so.\n\n" + "More words follow here. " * 5


def tar_bytes(members, mode="w"):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def texts_of(source, out, **kwargs):
    report, samples = packed(source, out, images=False, **kwargs)
    assert report.unit == "passages"
    with tarfile.open(out / "shard-000000.tar") as tar:
        assert {name.rpartition(".")[2] for name in tar.getnames()} == {"json"}
    assert all(set(meta) == {"id", "captions"} for _, meta, _ in samples.values())
    return {name: texts[0] for name, (texts, _, _) in samples.items()}


def test_books(tmp_path):
    (tmp_path / "books/austen").mkdir(parents=True)
    (tmp_path / "books/austen/emma.txt").write_text("\ufeff" + BOOK, encoding="utf-8")
    (tmp_path / "books/z.txt").write_text("The end.")
    (tmp_path / "books/empty.txt").write_text("\n")
    found = texts_of(tmp_path / "books", tmp_path / "out", passage_words=10)
    assert found == {
        "austen/emma-000000": "It is a truth universally acknowledged. He said so.",
        "austen/emma-000001": "More words follow here. More words follow here.",
        "austen/emma-000002": "More words follow here. More words follow here.",
        "austen/emma-000003": "More words follow here.",
        "z-000000": "The end.",
    }
    assert len(texts_of(tmp_path / "books", tmp_path / "whole")) == 2
    one = texts_of(tmp_path / "books/austen/emma.txt", tmp_path / "one", passage_words=10)
    assert list(one.values()) == list(found.values())[:4] and next(iter(one)) == "emma-000000"


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_json_lines(tmp_path, packing):
    rows = [{"text": "One document.", "meta": {}}, {"text": "Another\n\none."}, {"text": ""}]
    data = "\n".join(map(json.dumps, rows)).encode()
    source = tmp_path / f"c.jsonl{packing}"
    source.write_bytes(gzip.compress(data) if packing else data)
    assert texts_of(source, tmp_path / "out") == {
        f"{source.name}/00000000-000000": "One document.",
        f"{source.name}/00000001-000000": "Another one.",
    }


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz")])
def test_tars_of_text(tmp_path, suffix, mode):
    source = tmp_path / f"corpus{suffix}"
    members = [("./b/1.txt", b"One."), ("b/2.txt", b"Two."), ("b/._2.txt", b"\xff\0"), ("readme.md", b"x")]
    source.write_bytes(tar_bytes(members, mode))
    name = source.name
    assert texts_of(source, tmp_path / "out") == {f"{name}/b/1-000000": "One.", f"{name}/b/2-000000": "Two."}


def test_openwebtext(tmp_path):
    """A tar.xz of ``urlsf_subset*_data.xz``, each a compressed tar of .txt files."""
    pages = tar_bytes([(f"000{k}-x.txt", f"Page {k}.".encode()) for k in range(3)], "w:xz")
    inner = [(f"openwebtext/urlsf_subset0{n}_data.xz", pages) for n in range(2)]
    source = tmp_path / "openwebtext.tar.xz"
    source.write_bytes(tar_bytes(inner, "w:xz"))
    found = texts_of(source, tmp_path / "out")
    assert len(found) == 6
    assert found["openwebtext.tar.xz/openwebtext/urlsf_subset01_data.xz/0002-x-000000"] == "Page 2."
    (tmp_path / "owt").mkdir()
    (tmp_path / "owt/urlsf_subset00_data.xz").write_bytes(pages)
    assert next(iter(texts_of(tmp_path / "owt", tmp_path / "b"))) == "urlsf_subset00_data.xz/0000-x-000000"


def test_damaged_text(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "a.txt").write_bytes("Grüße.".encode("latin-1"))
    rows = [b'{"text": "Good."}', b"{", b'{"txt": "x"}', b"[]", b'{"text": "\xff"}', b'{"text": "Good too."}']
    (folder / "b.jsonl").write_bytes(b"\n".join(rows))
    (folder / "c.tar.xz").write_bytes(tar_bytes([("1.txt", b"x " * 10)], "w:xz")[:-8])
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 9)[:-12])
    (folder / "e.tar").write_bytes(lzma.compress(b"no tar"))
    (folder / "f.tar").write_bytes(tar_bytes([("1.txt", b"whole")])[:1024])
    assert "a.txt: not UTF-8" in refused(folder, tmp_path)
    report = pack(folder, tmp_path / "out", skip_bad=True)
    assert report.skipped["bad_meta"] == 2 and report.skipped["no_caption"] == 1
    assert report.skipped["bad_encoding"] == 2 and report.skipped["shard_truncated"] == 3
    assert sum(report.skipped.values()) == 9
    texts = [texts[0] for texts in ShardSet(str(tmp_path / "out")).captions()]
    assert {"Good.", "Good too."} <= set(texts) and "Did you mean 'txt'" in str(report)


def test_texts_with_one_name(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "a.TXT", "b.txt"):
        (tmp_path / "in" / name).write_text("Some words.")
    members = [("x.txt", b"One."), ("./x.txt", b"Two."), ("y.txt", b"Three.")]
    write_tar(tmp_path / "in/t.tar", members)
    assert "a.txt: an earlier text has the same name" in refused(tmp_path / "in", tmp_path)
    report, samples = packed(tmp_path / "in", tmp_path / "out", images=False, skip_bad=True)
    assert list(samples) == ["a-000000", "b-000000", "t.tar/x-000000", "t.tar/y-000000"]
    assert report.skipped == {"duplicate_key": 2}


def test_bad_text(tmp_path):
    (tmp_path / "t").mkdir()
    assert "needs .txt" in refused(tmp_path / "t", tmp_path, format="text")
    (tmp_path / "t/a.txt").write_text(" ")
    assert "found no sample to pack" in refused(tmp_path / "t", tmp_path)
    assert "--passage-words: found 0" in refused(tmp_path / "t", tmp_path, passage_words=0)
    assert "has no separate images" in refused(tmp_path / "t", tmp_path, images=tmp_path)


def test_a_set_is_text_or_images_not_both(tmp_path):
    (tmp_path / "a.txt").write_text("Text.")
    pack(tmp_path / "a.txt", tmp_path / "text")
    report = check_shards(str(tmp_path / "text"))
    assert report.problems == [] and (report.texts, report.images) == (1, 0)
    assert "1 texts without image" in str(report)
    tar = write_tar(tmp_path / "i.tar", [("x.jpg", encoded(0)), ("x.txt", b"x"), ("y.txt", b"y")])
    for order in ([str(tmp_path / "text"), str(tar)], [str(tar), str(tmp_path / "text")]):
        problems = check_shards(order).problems
        assert len(problems) == 2
        assert any("a-000000: no image member" in problem for problem in problems)
        assert any("i.tar: sample y: no image member" in problem for problem in problems)


# ----------------------------------------------------------------------------------- which format


def test_formats_are_told_by_a_look(tmp_path, shared):
    visual_genome(tmp_path / "vg")
    img2dataset(tmp_path / "cc3m")
    write_images(tmp_path / "pictures/deep/er", ["0.jpg"])
    (tmp_path / "pictures/0.txt").write_text("x")
    (tmp_path / "books").mkdir()
    (tmp_path / "books/a.txt").write_text("x")
    (tmp_path / "x.tar.xz").write_bytes(b"")
    (tmp_path / "x.jsonl.gz").write_bytes(b"")
    (tmp_path / "x.TSV").write_bytes(b"")
    write_tar(tmp_path / "text.tar", [("a/1.txt", b"x")])
    expected = {
        "vg/region_descriptions.json": "visual_genome",
        "cc3m": "img2dataset",
        "cc3m/00000.tar": "img2dataset",
        "pictures": "folder",
        "books": "text",
        "books/a.txt": "text",
        "x.tar.xz": "text",
        "x.jsonl.gz": "text",
        "text.tar": "text",
        "x.TSV": "csv",
    }
    paths = {tmp_path / name: kind for name, kind in expected.items()}
    paths |= {
        shared / "flickr8k/flickr8k_val.json": "flickr",
        shared / "coco_mini/captions_train2017.json": "coco",
        shared / "karpathy/coco_karpathy_test.json": "flickr",
    }
    for path, kind in paths.items():
        assert next(name for name, source in FORMATS.items() if source.detect(Peek(path))) == kind, path


def test_karpathy_captions_without_their_images(shared, tmp_path):
    message = refused(shared / "karpathy/coco_karpathy_test.json", tmp_path)
    assert "5,000 of its 5,000 images are not in" in message and "val2014/COCO_val2014_000000391895.jpg" in message


def test_unknown_format(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert "Did you mean 'flickr'" in refused(tmp_path / "a.txt", tmp_path, format="flicker")


def test_sentences_of_real_pairs(shared, tmp_path):
    """The unlabelled sentences of a paraphrase corpus as text."""
    rows = (shared / "mrpc/msr_paraphrase_test.txt").read_text(encoding="utf-8-sig").splitlines()[1:400]
    sentences = [row.split("\t")[3] for row in rows]
    source = tmp_path / "mrpc.jsonl"
    source.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences))
    found = texts_of(source, tmp_path / "out", shard_size=100)
    assert list(found.values()) == [" ".join(sentence.split()) for sentence in sentences]
