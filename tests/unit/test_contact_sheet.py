import json

import numpy as np
import pytest
from data_samples import captions_of, encoded, make_shards, write_tar
from PIL import Image

from mmd2v.data.packing import pack
from mmd2v.data.shards import ShardSet
from mmd2v.report.contact_sheet import Cell, draw_samples, draw_sheet, write_sheet
from mmd2v.report.lettering import cut, font, wrap


@pytest.fixture
def shards(tmp_path):
    return ShardSet(str(make_shards(tmp_path / "set", 30, 7)))


def test_the_seed_chooses(shards):
    chosen = draw_samples(shards, 8, 0)
    ids = [cell.id for cell in chosen]
    assert ids == [cell.id for cell in draw_samples(shards, 8, 0)] == sorted(ids)
    assert len(set(ids)) == 8 and ids != [cell.id for cell in draw_samples(shards, 8, 1)]
    number = int(ids[3].rpartition("-")[2])
    assert chosen[3].text == captions_of(number)[0] and chosen[3].more == 2
    assert chosen[3].image.size == (48, 40)
    assert len(draw_samples(shards, 100, 0)) == 30


def test_the_sheet_is_the_same_each_time(shards, tmp_path):
    for name in ("a.png", "b.png"):
        write_sheet(tmp_path / name, draw_samples(shards, 8, 3), "set")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_images_stand_whole_in_their_places():
    cell = Cell("red", Image.new("RGB", (300, 100), (255, 0, 0)), "a caption")
    pixels = np.asarray(draw_sheet([cell], ""))
    rows, columns = np.nonzero((pixels == (255, 0, 0)).all(-1))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert width == 400 and abs(height - width / 3) <= 1


def test_rows_follow_the_count():
    def size(count):
        return draw_sheet([Cell(str(n), None, "text") for n in range(count)], "t").size

    assert size(7)[0] == size(6)[0] > size(5)[0]
    assert size(12)[1] == size(7)[1] > size(6)[1]
    with pytest.raises(ValueError):
        draw_sheet([], "nothing")


@pytest.mark.parametrize("text", ["word " * 300, "w" * 900, "", "a", "词" * 500])
@pytest.mark.parametrize("image", [None, Image.new("RGB", (3, 900), "blue")])
def test_nothing_runs_out_of_its_place(text, image):
    page = draw_sheet([Cell("id" * 200, image, text, more=4)] * 2, "title " * 200)
    for strip in (page.crop((0, 0, 40, page.height)), page.crop((page.width - 40, 0, page.width, page.height))):
        assert strip.getcolors() == [(strip.width * strip.height, (255, 255, 255))]
    gap = page.crop((48 + 400, 128, 48 + 400 + 36, page.height))
    assert gap.getcolors() == [(gap.width * gap.height, (255, 255, 255))]


def test_damaged_samples_say_so(tmp_path):
    members = [("a.jpg", encoded(0)), ("a.txt", b"x"), ("b.jpg", b"no image"), ("b.txt", b"y"), ("c.json", b"{")]
    cells = draw_samples(ShardSet(str(write_tar(tmp_path / "x.tar", members))), 9, 0)
    assert [cell.bad for cell in cells] == [False, True, True]
    assert "does not decode" in cells[1].text and cells[2].text.startswith("bad_meta: ") and cells[2].id == "c"
    assert draw_sheet(cells, "x").width > 100


def test_texts(tmp_path):
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": f"Text {n}."}) for n in range(5)))
    pack(tmp_path / "c.jsonl", tmp_path / "out")
    cells = draw_samples(ShardSet(str(tmp_path / "out")), 2, 0)
    assert all(cell.image is None and cell.text.startswith("Text ") and not cell.bad for cell in cells)


def test_images_are_kept_as_large_as_they_are_drawn(tmp_path, monkeypatch):
    members = [
        ("a.jpg", encoded(0, width=1600, height=300)),
        ("a.txt", b"wide"),
        ("b.jpg", encoded(1)),
        ("b.txt", b"x"),
    ]
    shards = ShardSet(str(write_tar(tmp_path / "x.tar", members)))
    assert [cell.image.size for cell in draw_samples(shards, 2, 0)] == [(400, 75), (48, 40)]
    monkeypatch.setattr("mmd2v.report.contact_sheet.MAX_PIXELS", 100_000)
    wide, small = draw_samples(shards, 2, 0)
    assert wide.bad and wide.image is None and wide.text.startswith("image_too_large") and not small.bad


def test_lines():
    letters = font(20)
    lines = wrap("one two three four five six seven", letters, 100)
    assert " ".join(lines) == "one two three four five six seven"
    assert all(letters.getlength(line) <= 100 for line in lines) and len(lines) > 2
    short = wrap("one two three four five six seven", letters, 100, most=2)
    assert short[0] == lines[0] and short[1].endswith("…") and letters.getlength(short[1]) <= 100
    assert wrap("one two", letters, 100, most=2) == ["one two"]
    assert "".join(wrap("x" * 100, letters, 100)) == "x" * 100
    assert len(wrap("abc", letters, 1)) == 3
    assert cut("short", letters, 500) == "short" and letters.getlength(cut("x" * 100, letters, 90)) <= 90
