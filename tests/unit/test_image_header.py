import io
import struct
import time

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as torchvision_decode

from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.image_header import check_pixels, first_frame, image_size, is_upright

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


def decoded(data, **options):
    """uint8 [..., 3, H, W], as torchvision decodes it."""
    return torchvision_decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB, **options)


@pytest.mark.parametrize("marker", [0xFE, 0xE0, 0xE1, 0xE5])
@pytest.mark.parametrize("length", [0, 1])
def test_a_segment_shorter_than_its_own_length_hides_nothing(marker, length):
    data = encoded("jpeg", 21, 22)
    data = data[:2] + bytes([0xFF, marker, 0, length]) + data[2:]
    assert decoded(data).shape == (3, 21, 22)
    assert image_size(data) == (21, 22)


def test_what_shows_no_size_reaches_no_decoder():
    data = encoded("jpeg", 21, 22)
    with pytest.raises(
        Damage, match=r"^x: .*found no size in its 40 bytes, expected a JPEG, PNG, WebP or GIF"
    ) as caught:
        check_pixels(data[:40], 10**9, "x")
    assert caught.value.kind == DamageKind.IMAGE_UNDECODABLE


def test_the_limit_of_pixels_is_named_with_its_setting():
    data = encoded("png", 21, 22)
    check_pixels(data, 21 * 22, "x")
    with pytest.raises(
        Damage, match=r"^x: found an image of 22 × 21 pixels, expected at most 461 pixels \(a\.b\)$"
    ) as caught:
        check_pixels(data, 21 * 22 - 1, "x", "a.b")
    assert caught.value.kind == DamageKind.IMAGE_TOO_LARGE


def animation(**options):
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "blue", "green")]
    data = io.BytesIO()
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], **options)
    return data.getvalue()


@pytest.mark.parametrize("options", [{}, {"comment": b"a word"}, {"loop": 0}, {"transparency": 0, "disposal": 2}])
def test_the_first_frame_of_an_animation_alone(options):
    data = animation(**options)
    whole, first = decoded(data), decoded(first_frame(memoryview(data)))
    assert whole.shape == (3, 3, 20, 30) and first.shape == (3, 20, 30)
    assert torch.equal(first, whole[0])
    still = encoded("gif", 20, 30)
    assert first_frame(still) == still


def test_an_empty_block_of_an_extension_hides_no_frame():
    # giflib goes on behind it with one more block, which may hold what looks like a frame.
    data = encoded("gif", 20, 30)
    at = 13 + (3 << ((data[10] & 7) + 1))
    false_frame = b"\x2c" + bytes(43)
    data = data[:6] + bytes(4) + data[10:at] + b"\x21\xfe\x00" + false_frame + bytes(2) + data[at:]
    assert decoded(data).shape == (3, 20, 30)
    assert image_size(data) == (20, 30)
    assert decoded(first_frame(data)).shape == (3, 20, 30)


@given(
    st.sampled_from(["still", "animation"]), st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=3)
)
def test_a_gif_that_decodes_has_one_frame_of_its_size(kind, changes):
    data = bytearray(encoded("gif", 20, 30) if kind == "still" else animation(comment=b"x"))
    for place, value in changes:
        data[-place % len(data)] = value  # from the end: the colour table takes most of the beginning
    size = image_size(bytes(data))
    if size is None or size[0] * size[1] > 10**6:
        return
    try:
        found = decoded(first_frame(bytes(data)))
    except RuntimeError:
        return
    assert found.shape == (3, *size)


def with_segments(data, *segments):
    return (
        data[:2]
        + b"".join(
            bytes([0xFF, marker]) + (2 + len(content)).to_bytes(2, "big") + content for marker, content in segments
        )
        + data[2:]
    )


def exif(orientation, order="big", before=0):
    """An Exif segment with some entries before the orientation."""
    entries = [(1, 3, 1, 6)] * before + [(274, 3, 1, orientation)]
    mark = b"MM" if order == "big" else b"II"
    tiff = mark + (42).to_bytes(2, order) + (8).to_bytes(4, order) + len(entries).to_bytes(2, order)
    for tag, kind, count, value in entries:
        tiff += tag.to_bytes(2, order) + kind.to_bytes(2, order) + count.to_bytes(4, order)
        tiff += value.to_bytes(2, order) + bytes(2)
    return 0xE1, b"Exif\0\0" + tiff + bytes(4)


@pytest.mark.parametrize("order", ["big", "little"])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("first", [[], [(0xE0, b"JFIF\0" + bytes(9)), (0xED, bytes(5_000))]])
def test_upright_is_what_the_decoder_does_not_turn(order, before, orientation, first):
    data = with_segments(encoded("jpeg", 21, 22), *first, exif(orientation, order, before))
    turned = decoded(data, apply_exif_orientation=True)
    same = torch.equal(turned, decoded(data)) if turned.shape == (3, 21, 22) else False
    assert is_upright(data) == is_upright(memoryview(data)) == same == (orientation not in range(2, 9))


@given(st.integers(0, 120), st.integers(0, 255), st.integers(0, 8), st.sampled_from(["big", "little"]))
def test_nothing_upright_is_turned(place, value, orientation, order):
    data = bytearray(with_segments(encoded("jpeg", 21, 22), exif(orientation, order, 1), exif(6)))
    data[place] = value
    if is_upright(bytes(data)):
        try:
            turned = decoded(data, apply_exif_orientation=True)
        except RuntimeError:
            return
        assert torch.equal(turned, decoded(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
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
    is_upright(memoryview(start + rest))
    first_frame(memoryview(start + rest))
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
    data = start + fill * (2_000_000 // len(fill))
    image_size(data)
    is_upright(data)
    first_frame(data)
    assert time.process_time() - begin < 5
