import io
import struct
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from mmd2v.data.image_header import image_size

VARIANTS = {
    "jpeg": ("JPEG", {}),
    "jpeg progressive": ("JPEG", {"progressive": True}),
    "jpeg 4:4:4": ("JPEG", {"subsampling": 0}),
    "jpeg with profile": ("JPEG", {"icc_profile": bytes(range(256)) * 400}),  # several APP2 segments with 0xFF inside
    "jpeg with comment": ("JPEG", {"comment": b"\xff\xc0 no frame \xff\xda"}),
    "png": ("PNG", {}),
    "webp lossy": ("WEBP", {"quality": 60}),
    "webp lossless": ("WEBP", {"lossless": True}),
    "webp extended": ("WEBP", {"exif": b"Exif\0\0", "icc_profile": b"x" * 100}),
    "gif": ("GIF", {}),
}


def encoded(variant, height, width, mode="RGB"):
    kind, options = VARIANTS[variant]
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(data, kind, **options)
    return data.getvalue()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (37, 5), (480, 640)])
def test_size_is_what_pillow_finds(variant, height, width):
    data = encoded(variant, height, width)
    assert Image.open(io.BytesIO(data)).size == (width, height)
    assert image_size(data) == (height, width)
    assert image_size(memoryview(data)) == (height, width)
    assert image_size(memoryview(bytearray(data))) == (height, width)


@pytest.mark.parametrize(
    ("variant", "mode"),
    [
        ("jpeg", "L"),
        ("jpeg", "CMYK"),
        ("png", "P"),
        ("png", "1"),
        ("png", "RGBA"),
        ("webp lossless", "RGBA"),
        ("gif", "P"),
    ],
)
def test_modes(variant, mode):
    assert image_size(encoded(variant, 31, 17, mode)) == (31, 17)


def test_exif_orientation_does_not_turn_the_stored_size():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    # The thumbnail is a whole JPEG inside the APP1 segment: its frame header must not be taken for the picture's.
    exif.get_ifd(0x8769)[0x927C] = encoded("jpeg", 8, 9)
    data = io.BytesIO()
    Image.new("RGB", (40, 20)).save(data, "JPEG", exif=exif)
    assert image_size(data.getvalue()) == (20, 40)


def test_animation():
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = io.BytesIO()
        frames[0].save(data, kind, save_all=True, append_images=frames[1:])
        assert image_size(data.getvalue()) == (20, 30)


def test_a_gif_frame_beyond_its_screen_counts():
    data = bytearray(encoded("gif", 20, 30))
    struct.pack_into("<HH", data, 6, 3, 2)  # a small screen around a large frame
    assert image_size(bytes(data)) == (20, 30)


def test_the_largest_sizes():
    jpeg = bytearray(encoded("jpeg", 8, 8))
    frame = jpeg.index(b"\xff\xc0")
    struct.pack_into(">HH", jpeg, frame + 5, 65_535, 65_534)
    assert image_size(bytes(jpeg)) == (65_535, 65_534)
    png = bytearray(encoded("png", 8, 8))
    struct.pack_into(">II", png, 16, 2**31 - 1, 2**31 - 2)
    assert image_size(bytes(png)) == (2**31 - 2, 2**31 - 1)
    assert image_size(b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6) == (2**24, 2**24)


def test_junk_between_jpeg_segments_is_skipped_as_libjpeg_does():
    data = encoded("jpeg", 21, 22)
    frame = data.index(b"\xff\xc0")
    junk = bytes(5000) + b"\xff\x00" + b"\xff" * 9 + b"\xff\x01" + b"\xff\xd0"
    assert image_size(data[:frame] + junk + data[frame:]) == (21, 22)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff\xe0\x00\x00" + b"\xff\xc0\x00\x11\x08\x00\x10\x00\x10",  # a segment shorter than its length
        b"\xff\xd8\xff\xda\x00\x02\xff\xc0\x00\x11\x08\x00\x10\x00\x10",  # a frame behind the scan
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\x04IDAT" + bytes(20),
        b"RIFF\0\0\0\0WEBPALPH" + bytes(20),
        b"RIFF\0\0\0\0WAVEfmt " + bytes(20),
        b"GIF88a" + bytes(20),
        b"BM" + bytes(40),
        b"<svg xmlns='http://www.w3.org/2000/svg' width='3' height='4'/>",
    ],
)
def test_unknown(data):
    assert image_size(data) is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_side_of_zero_is_no_image(variant):
    data = encoded(variant, 16, 16)
    found = {image_size(data[:cut]) for cut in range(len(data))}
    assert found == {None, (16, 16)}  # whole or nothing, wherever it is cut off
    if variant == "jpeg":
        frame = data.index(b"\xff\xc0")
        assert image_size(data[: frame + 5] + bytes(4) + data[frame + 9 :]) is None


STARTS = [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8"]


@given(st.sampled_from(STARTS), st.binary(max_size=300))
@example(b"\xff\xd8", b"\xff" * 300)
@example(b"GIF89a", b"\x21" * 300)
def test_garbage_gives_a_size_or_none(start, rest):
    size = image_size(memoryview(start + rest))
    assert size is None or (len(size) == 2 and min(size) > 0)


@given(st.sampled_from(sorted(VARIANTS)), st.integers(0, 400), st.integers(0, 255))
def test_damaged_headers_never_raise(variant, place, value):
    data = bytearray(encoded(variant, 12, 13))
    data[place % len(data)] = value
    size = image_size(bytes(data))
    assert size is None or min(size) > 0


@pytest.mark.parametrize("start", [b"\xff\xd8", b"GIF89a\0\0\0\0\0\0\0"])
@pytest.mark.parametrize("fill", [b"\xff", b"\xff\xe0\x00\x02", b"\x00", b"\x21", b"\x21\xff\x00", b"\xff\xff\xff\x00"])
def test_time_is_linear_in_the_worst_case(start, fill):
    begin = time.process_time()
    image_size(start + fill * (2_000_000 // len(fill)))
    assert time.process_time() - begin < 5
