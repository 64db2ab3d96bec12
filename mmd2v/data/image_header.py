"""Height and width of an encoded image, read from its header alone: no decoder runs, no pixel is touched.

Known are the formats shards hold: JPEG, PNG, WebP and GIF. The size is the stored one, before an EXIF orientation turns
the picture: what a decoder has to find memory for.
"""

from __future__ import annotations

import struct

from mmd2v.data.damage import Damage, DamageKind

_PNG_START = b"\x89PNG\r\n\x1a\n"
_JPEG_START = b"\xff\xd8"
_LONELY = frozenset([0x01, *range(0xD0, 0xD9)])  # JPEG markers without a length: TEM, RST0–7, SOI
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0–15; the others are DHT, JPG, DAC
_FRAME_END = 0xD9
_SCAN_START = 0xDA
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


def check_pixels(data: bytes | memoryview, most: int, where: str) -> None:
    """Refuse an image of more than ``most`` pixels by its header, before memory is taken for any of them.

    Raises:
        Damage: it has more; starts with ``where``.
    """
    size = image_size(data)
    if size is not None and size[0] * size[1] > most:
        found = f"found an image of {size[1]:,} × {size[0]:,} pixels"
        raise Damage(DamageKind.IMAGE_TOO_LARGE, f"{where}: {found}, expected at most {most:,} pixels")


def _jpeg(data: bytes | memoryview) -> tuple[int, int] | None:
    """Walk the marker segments to the first frame header, over junk between them as libjpeg does."""
    at, end = 2, len(data)
    while at + 1 < end:
        if data[at] != 0xFF:
            found = bytes(data[at : at + _CHUNK]).find(b"\xff")
            at += found if found >= 0 else _CHUNK
            continue
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        at += 2
        if marker == 0 or marker in _LONELY:
            continue
        if marker in (_FRAME_END, _SCAN_START) or at + 2 > end:
            return None
        if marker in _FRAMES:
            if at + 7 > end:
                return None
            height, width = struct.unpack_from(">3xHH", data, at)
            return height, width
        (length,) = struct.unpack_from(">H", data, at)
        if length < 2:
            return None
        at += length
    return None


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
    """The logical screen, grown by the first frame if that reaches beyond it, as decoders do."""
    if len(data) < 13:
        return None
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at, end = 13, len(data)
    if flags & 0x80:
        at += 3 << ((flags & 7) + 1)  # the global colour table
    while at + 1 < end and data[at] == 0x21:  # extensions before the first frame
        at += 2
        while at < end and data[at]:
            at += 1 + data[at]
        at += 1
    if at + 9 <= end and data[at] == 0x2C:
        left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, at + 1)
        return max(height, top + frame_height), max(width, left + frame_width)
    return height, width
