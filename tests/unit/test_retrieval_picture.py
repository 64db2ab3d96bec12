"""The picture: right results outlined, long queries cut, any number of rows."""

import io

import numpy as np
import pytest
import torch
from export_samples import photo
from PIL import Image

from mmd2v.errors import UserError
from mmd2v.report.retrieval_picture import (
    PICTURE_SUFFIXES,
    Found,
    PictureRow,
    check_picture,
    draw_retrieval,
    retrieval_rows,
    write_retrieval_picture,
)

GREEN = (0x1A, 0x98, 0x50)


def outlined(page: Image.Image) -> int:
    """Pixels in the colour of right answers."""
    return sum(count for count, colour in page.getcolors(1 << 24) if colour == GREEN)


def row(query, right: list[bool | None]) -> PictureRow:
    return PictureRow(query, [Found(photo(i), 0.5 - i / 10, r) for i, r in enumerate(right)])


def test_only_right_answers_are_outlined():
    none = outlined(draw_retrieval([row("a dog", [False] * 5)]))
    one = outlined(draw_retrieval([row("a dog", [False, True, False, False, False])]))
    two = outlined(draw_retrieval([row("a dog", [False, True, False, False, True])]))
    assert none == outlined(draw_retrieval([row("a dog", [None] * 5)])) == 0
    assert 0 < one < two


def test_size_follows_rows_columns_and_title():
    small = draw_retrieval([row("a", [True] * 3)])
    wide, high = draw_retrieval([row("a", [True] * 5)]), draw_retrieval([row("a", [True] * 3)] * 2)
    titled = draw_retrieval([row("a", [True] * 3)], title="Results")
    assert wide.width > small.width and wide.height == small.height
    assert high.height > small.height and titled.height > small.height


@pytest.mark.parametrize(
    "query", ["word " * 200, "w" * 400, "", photo(9), photo(9).convert("RGBA"), photo(9, (3, 200))]
)
def test_queries_of_any_length_and_kind_fit(query):
    page = draw_retrieval([row(query, [True, False]), row("a short one", [False, False])])
    margin = page.crop((0, 0, 30, page.height))
    assert margin.getcolors() == [(margin.width * margin.height, (255, 255, 255))]


def test_photos_stand_upright_and_sixteen_bits_keep_their_grey():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    data = io.BytesIO()
    photo(3).rotate(90, expand=True).save(data, "PNG", exif=exif)
    turned = PictureRow("a", [Found(Image.open(data), 0.5)])
    assert draw_retrieval([turned]).tobytes() == draw_retrieval([row_of(photo(3))]).tobytes()

    grey = np.asarray(photo(3).convert("L"))
    deep = Image.fromarray((grey.astype(np.uint16) << 8) + 9)
    assert deep.mode == "I;16"
    expected = draw_retrieval([row_of(Image.fromarray(grey))])
    assert draw_retrieval([row_of(deep)]).tobytes() == expected.tobytes()


def row_of(image: Image.Image) -> PictureRow:
    return PictureRow("a", [Found(image, 0.5)])


def test_the_name_of_a_picture_is_checked(tmp_path):
    for suffix in PICTURE_SUFFIXES:
        file = tmp_path / f"found{suffix}"
        check_picture("--picture", file)
        write_retrieval_picture(file, [row("a", [True])])
        assert file.stat().st_size > 1000
    check_picture("--picture", tmp_path / "FOUND.PNG")
    with pytest.raises(UserError, match=r"^--picture: .*x\.pgn ends in '\.pgn', expected .* Did you mean '\.png'"):
        check_picture("--picture", tmp_path / "x.pgn")
    with pytest.raises(UserError, match=r"^--picture: .*found\.png is no folder"):
        check_picture("--picture", tmp_path / "found.png" / "x.png")


def test_a_picture_needs_a_row():
    with pytest.raises(ValueError, match="at least one row"):
        draw_retrieval([])


def test_rows_of_a_search_mark_the_own_image(tmp_path):
    images = torch.nn.functional.normalize(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    opened = []
    rows = retrieval_rows(["first", "second"], images[[3, 5]], images, [3, 0], lambda i: opened.append(i) or photo(i))
    assert len(opened) == 10 and opened[0] == 3 and opened[5] == 5
    assert [found.right for found in rows[0].found] == [True, False, False, False, False]
    assert rows[0].found[0].score == pytest.approx(1)
    write_retrieval_picture(tmp_path / "new" / "found.png", rows, "Title")
    with Image.open(tmp_path / "new" / "found.png") as page:
        assert page.width > 1500
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["found.png"]
