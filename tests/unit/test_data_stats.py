import json

import numpy as np
import pytest
from data_samples import captions_of, encoded, make_shards, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from mmd2v.config.schema import TokenizerConfig
from mmd2v.data.packing import pack
from mmd2v.data.stats import PERCENTILES, Distribution, data_stats
from mmd2v.data.tokenizers import load_tokenizer, train_tokenizer
from mmd2v.errors import UserError
from mmd2v.report.stats_picture import check_stats_picture, write_stats_picture


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(0, 30))
def test_distributions_are_exact(values, limit):
    numbers = Distribution(values)
    for percent in PERCENTILES:
        assert numbers.percentile(percent) == np.percentile(values, percent, method="inverted_cdf")
    assert numbers.percentile(100) == max(values)
    assert numbers.mean == pytest.approx(np.mean(values))
    assert numbers.above(limit) == pytest.approx(np.mean(np.array(values) > limit))


@pytest.fixture
def mixed(tmp_path):
    """Three images of different sizes and formats with 1, 2 and 3 captions."""
    images = [encoded(0, width=30, height=20), encoded(1, "PNG", width=50, height=60), encoded(2, width=70, height=80)]
    members = []
    for n, (suffix, data) in enumerate(zip(("jpg", "png", "jpg"), images, strict=True)):
        members += [(f"{n}.{suffix}", data), (f"{n}.json", json.dumps({"captions": captions_of(n, n + 1)}).encode())]
    return write_tar(tmp_path / "mixed.tar", members)


def test_numbers(mixed):
    stats = data_stats(str(mixed))
    assert (stats.shards, stats.images, stats.texts, stats.captions) == (1, 3, 0, 6)
    assert stats.bytes == mixed.stat().st_size
    assert stats.captions_each == {1: 1, 2: 1, 3: 1}
    assert (stats.widths, stats.heights) == ({30: 1, 50: 1, 70: 1}, {20: 1, 60: 1, 80: 1})
    assert stats.words == {5: 6}
    record = stats.to_json()
    assert record["image_width"] == {"min": 30, "mean": 50.0, "p50": 50, "p90": 70, "p95": 70, "p99": 70, "max": 70}
    assert "caption_tokens" not in record and stats.longer is None
    assert "3 images, 6 captions" in str(stats) and "tokens" not in str(stats)


@pytest.fixture
def tokenizer(tmp_path):
    learned = train_tokenizer((text for n in range(9) for text in captions_of(n)), "wordlevel", 100)
    (tmp_path / "t.json").write_text(learned.to_str())
    return TokenizerConfig(path=str(tmp_path / "t.json"), max_length=6)


def test_tokens(mixed, tokenizer):
    stats = data_stats(str(mixed), tokenizer)
    lengths = load_tokenizer(tokenizer.model_copy(update={"max_length": 1000})).encode_batch(captions_of(1, 2))[1]
    assert stats.tokens == {7: 6} and set(lengths.tolist()) == {7}
    assert stats.longer == 1.0 and stats.to_json()["longer_than_max_length"] == 1.0
    assert "100.00 % of the captions are longer than 6 tokens" in str(stats)
    longer = data_stats(str(mixed), tokenizer.model_copy(update={"max_length": 7}))
    assert longer.longer == 0.0


def test_a_header_behind_a_large_profile(tmp_path):
    import io

    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (33, 22)).save(data, "JPEG", icc_profile=bytes(200_000))
    stats = data_stats(str(write_tar(tmp_path / "x.tar", [("a.jpg", data.getvalue()), ("a.txt", b"x")])))
    assert (stats.widths, stats.heights) == ({33: 1}, {22: 1})


def test_damage_is_counted(tmp_path):
    members = [
        ("a.jpg", encoded(0)),
        ("a.txt", b"fine"),
        ("b.jpg", b"no image at all"),
        ("b.txt", b"still a caption"),
        ("c.jpg", encoded(0)),
        ("c.json", b"{"),
    ]
    stats = data_stats(str(write_tar(tmp_path / "x.tar", members)))
    assert (stats.images, stats.captions, stats.unknown_sizes) == (2, 2, 1)
    assert stats.damaged == {"bad_meta": 1}
    assert "1 images have no header" in str(stats) and "1 damaged (bad_meta 1)" in str(stats)


def test_a_shard_that_is_damaged_as_a_whole(tmp_path):
    shards = make_shards(tmp_path / "s", 6, 3)
    path = shards / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    stats = data_stats(str(shards))
    assert stats.images == 3 and stats.damaged == {"shard_truncated": 1}


@pytest.mark.parametrize("harm", ["cut", "no tar"])
def test_a_damaged_shard_without_manifest(tmp_path, harm):
    shards = make_shards(tmp_path / "s", 9, 3)
    for path in [*shards.glob("*.idx"), shards / "shards.json"]:
        path.unlink()
    path = shards / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:2000] if harm == "cut" else b"x" * 5000)
    stats = data_stats(str(shards))
    assert (stats.shards, stats.images) == (3, 6)
    assert stats.damaged == {"shard_truncated" if harm == "cut" else "shard_unreadable": 1}
    with pytest.raises(UserError, match=r"shard-000001\.tar"):
        data_stats(str(path))


def test_texts(tmp_path):
    (tmp_path / "a.txt").write_text("One two three.\n\n" * 50)
    pack(tmp_path / "a.txt", tmp_path / "out", passage_words=7)
    stats = data_stats(str(tmp_path / "out"))
    assert (stats.images, stats.texts, stats.captions) == (0, 25, 25)
    assert stats.words == {6: 25} and "25 texts without image" in str(stats)
    write_stats_picture(tmp_path / "p.png", stats, "texts")


def test_what_the_same_images_say_decoded(shared, tmp_path):
    folder = shared / "coco_mini"
    pack(folder / "captions_train2017.json", tmp_path / "coco", images=folder / "train2017.tar")
    stats = data_stats(str(tmp_path / "coco"))
    content = json.loads((folder / "captions_train2017.json").read_text())
    assert stats.widths == Distribution(image["width"] for image in content["images"])
    assert stats.heights == Distribution(image["height"] for image in content["images"])
    assert stats.words == Distribution(len(entry["caption"].split()) for entry in content["annotations"])


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_pictures_are_the_same_each_time(mixed, tokenizer, tmp_path, suffix):
    stats = data_stats(str(mixed), tokenizer)
    for name in "ab":
        write_stats_picture(tmp_path / f"{name}{suffix}", stats, "mixed")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    if suffix == ".svg":
        text = (tmp_path / "a.svg").read_text()
        assert "<svg" in text and text.count('id="axes_') == 4  # captions, words, tokens, sizes


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    st.lists(st.integers(1, 70_000), min_size=1, max_size=30),
)
def test_bars_hold_every_value(words, sizes):
    from matplotlib.figure import Figure

    from mmd2v.report.stats_picture import _histogram

    axes = Figure().subplots()
    _histogram(axes, [Distribution(words), Distribution(sizes)], ["red", "blue"], ["a", "b"])
    heights = [sum(bar.get_height() for bar in bars) for bars in axes.containers]
    assert heights == [len(words), len(sizes)] and len(axes.patches) <= 2 * 40


def test_bad_pictures(tmp_path):
    with pytest.raises(UserError, match=r"--picture: x\.pgn ends in '\.pgn'.* Did you mean '\.png'"):
        check_stats_picture("--picture", "x.pgn")
    (tmp_path / "d.png").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        check_stats_picture("--picture", tmp_path / "d.png")
