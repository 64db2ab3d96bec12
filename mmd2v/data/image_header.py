"""Height and width of an encoded image, read from its header alone: no decoder runs, no pixel is touched.

Known are the formats shards hold: JPEG, PNG, WebP and GIF. The size is the stored one, before an EXIF orientation turns
the picture: what a decoder has to find memory for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Literal

from mmd2v.config.schema import DamageConfig
from mmd2v.data.damage import Damage, DamageKind

MAX_PIXELS: int = DamageConfig.model_fields["max_pixels"].default
"""Larger images count as damaged unless a config or a flag says otherwise."""

_PNG_START = b"\x89PNG\r\n\x1a\n"
_JPEG_START = b"\xff\xd8"
_LONELY = frozenset([0x01, *range(0xD0, 0xD9)])  # JPEG markers without a length: TEM, RST0–7, SOI
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0–15; the others are DHT, JPG, DAC
_FRAME_END = 0xD9
_SCAN_START = 0xDA
_APP1 = 0xE1
_EXIF_START = 6  # bytes "Exif\0\0" before the TIFF header, which torchvision does not look at
_ORIENTATION = 274
_GIF_END = b"\x3b"
_CHUNK = 4096  # bytes looked at together where markers are expected and something else lies


def image_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """Return (height, width) in pixels, as stored; None when the bytes are no image of a known format.

    Takes microseconds for a real file and never raises: its time is at most linear in the bytes, whatever they are.
    A size says nothing about the rest of the file, which may be damaged.
    """
    start = bytes(data[:32])
    if start.startswith(_JPEG_START):
        size = _jpeg(data)
    elif start.startswith(_PNG_START):
        size = _png(start)
    elif start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        size = _webp(start)
    elif start.startswith((b"GIF87a", b"GIF89a")):
        size = _gif(data)
    else:
        return None
    return size if size is not None and min(size) > 0 else None


def check_pixels(data: bytes | memoryview, most: int, where: str, setting: str = "") -> None:
    """Refuse an image of more than ``most`` pixels by its header, before memory is taken for any of them.

    ``setting`` is the config key or flag that holds ``most``, for the message.

    Raises:
        Damage: it has more, or no size can be read, so that no decoder may be let at it; starts with ``where``.
    """
    size = image_size(data)
    if size is None:
        found = f"found no size in its {len(data):,} bytes, expected a JPEG, PNG, WebP or GIF"
        raise Damage(DamageKind.IMAGE_UNDECODABLE, f"{where}: the image does not decode: {found}")
    if size[0] * size[1] > most:
        found = f"found an image of {size[1]:,} × {size[0]:,} pixels"
        named = f" ({setting})" if setting else ""
        raise Damage(DamageKind.IMAGE_TOO_LARGE, f"{where}: {found}, expected at most {most:,} pixels{named}")


def is_upright(jpeg: bytes | memoryview) -> bool:
    """Whether no EXIF orientation of a JPEG turns its picture, by the rules of torchvision's decoder. Never raises."""
    return not any(
        2 <= _orientation(bytes(jpeg[at + 2 + _EXIF_START : at + length])) <= 8
        for marker, at, length in _segments(jpeg)
        if marker == _APP1
    )


def first_frame(gif: bytes | memoryview) -> bytes:
    """The bytes of a GIF up to the end of its first frame, closed: a decoder finds no other frames to take memory for.

    What is cut off inside that frame stays so. The time is at most linear in the bytes.
    """
    at = _gif_frame(gif)
    if at + 10 > len(gif):
        return bytes(gif)
    colours = 3 << ((gif[at + 9] & 7) + 1) if gif[at + 9] & 0x80 else 0
    end = _past_blocks(gif, at + 10 + colours + 1)  # a byte before the blocks says how long codes are
    return bytes(gif[:end]) + _GIF_END


def _segments(jpeg: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Walk the marker segments up to the first scan, over junk between them as libjpeg does.

    Gives (marker, offset of its length, length); a length counts its own two bytes, and the segment may be cut off.
    """
    at, end = 2, len(jpeg)
    while at + 1 < end:
        if jpeg[at] != 0xFF:
            found = bytes(jpeg[at : at + _CHUNK]).find(b"\xff")
            at += found if found >= 0 else _CHUNK
            continue
        marker = jpeg[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        at += 2
        if marker == 0 or marker in _LONELY:
            continue
        if marker in (_FRAME_END, _SCAN_START) or at + 2 > end:
            return
        # libjpeg reads the two bytes and skips nothing more where they name fewer than themselves.
        length = max(2, int.from_bytes(jpeg[at : at + 2], "big"))
        yield marker, at, length
        at += length


def _jpeg(data: bytes | memoryview) -> tuple[int, int] | None:
    """The first frame header tells."""
    for marker, at, _ in _segments(data):
        if marker in _FRAMES:
            if at + 7 > len(data):
                return None
            height, width = struct.unpack_from(">3xHH", data, at)
            return height, width
    return None


def _orientation(tiff: bytes) -> int:
    """The orientation in the first directory of a TIFF header, 1–8; 0 without one."""
    order: Literal["little", "big"] | None = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None:
        return 0
    start = int.from_bytes(tiff[4:8], order)
    entries = int.from_bytes(tiff[start : start + 2], order)
    for at in range(start + 2, min(start + 2 + 12 * entries, len(tiff)), 12):
        if int.from_bytes(tiff[at : at + 2], order) == _ORIENTATION:
            return int.from_bytes(tiff[at + 8 : at + 10], order)
    return 0


def _png(start: bytes) -> tuple[int, int] | None:
    """The header chunk comes first in every PNG."""
    if len(start) < 24 or start[12:16] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", start, 16)
    return height, width


def _webp(start: bytes) -> tuple[int, int] | None:
    """The first chunk tells: VP8 is lossy, VP8L lossless, VP8X holds the canvas of anything more."""
    chunk = start[12:16]
    if chunk == b"VP8 " and len(start) >= 30 and start[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", start, 26)  # 14 bits each, two bits of scaling above them
        return height & 0x3FFF, width & 0x3FFF
    if chunk == b"VP8L" and len(start) >= 25 and start[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", start, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if chunk == b"VP8X" and len(start) >= 30:
        width, height = int.from_bytes(start[24:27], "little"), int.from_bytes(start[27:30], "little")
        return height + 1, width + 1
    return None


def _gif(data: bytes | memoryview) -> tuple[int, int] | None:
    """The logical screen, grown by the first frame if that is larger, as torchvision does."""
    if len(data) < 13:
        return None
    width, height = struct.unpack_from("<HH", data, 6)
    at = _gif_frame(data)
    if at + 9 <= len(data):
        frame_width, frame_height = struct.unpack_from("<HH", data, at + 5)
        return max(height, frame_height), max(width, frame_width)
    return height, width


def _gif_frame(data: bytes | memoryview) -> int:
    """Offset of the first frame; the number of bytes without one."""
    end = len(data)
    if end < 13:
        return end
    at = 13
    if data[10] & 0x80:
        at += 3 << ((data[10] & 7) + 1)  # the global colour table
    while at + 2 < end and data[at] == 0x21:  # extensions before the first frame
        at += 2
        # giflib takes what follows an empty first block for one more block, where others end the extension.
        at = _past_blocks(data, at + 1 + data[at])
    return at if at < end and data[at] == 0x2C else end


def _past_blocks(data: bytes | memoryview, at: int) -> int:
    """Offset behind a chain of blocks, each with its length before it, that an empty one ends."""
    end = len(data)
    while at < end and data[at]:
        at += 1 + data[at]
    return at + 1
