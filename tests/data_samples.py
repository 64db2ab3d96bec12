"""Small generated data sets for the data tests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmd2v.data.packing import Sample, write_shards


def picture(number: int, width: int = 48, height: int = 40) -> np.ndarray:
    """A smooth uint8 [H, W, 3] picture, different for every number."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (3 + number % 5) + k) + np.cos(y / (4 + number % 3) - k + number) for k in range(3)]
    return ((np.stack(waves, -1) + 2) * 63).astype(np.uint8)


def encoded(number: int, format: str = "JPEG", **size: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture(number, **size)).save(data, format)
    return data.getvalue()


def captions_of(number: int, count: int = 3) -> list[str]:
    return [f"caption {place} of picture {number}" for place in range(count)]


def make_shards(folder: Path, count: int, shard_size: int, captions: int = 3, **extras: Any) -> Path:
    samples = (
        Sample(
            f"sample-{n:04d}", encoded(n), {"captions": captions_of(n, captions), "vector": [float(n), 0.5], **extras}
        )
        for n in range(count)
    )
    write_shards(samples, folder, total=count, shard_size=shard_size, what="writing")
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def damaged_headers() -> dict[str, bytes]:
    """What a damaged header may be: name → the member, as bytes of a tar."""
    sparse = tarfile.TarInfo("x.jpg")
    sparse.pax_headers = {"GNU.sparse.map": "x,y", "GNU.sparse.size": "z"}
    huge, pax = tarfile.TarInfo("x.jpg"), tarfile.TarInfo("x.jpg")
    huge.size = pax.size = 2**62
    pax.type = tarfile.XHDTYPE
    return {
        "sparse": sparse.tobuf(tarfile.PAX_FORMAT),
        "huge": huge.tobuf(tarfile.GNU_FORMAT),
        "huge pax": pax.tobuf(tarfile.GNU_FORMAT),
        "no header": b"x" * 512,
    }


def insert_member(tar: Path, header: bytes, member: int) -> Path:
    """Put a header in front of so many members of a tar."""
    with tarfile.open(tar) as opened:
        at = opened.getmembers()[member].offset
    data = tar.read_bytes()
    tar.write_bytes(data[:at] + header + data[at:])
    return tar


def write_images(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encoded(number))
    return folder


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def leftovers(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(str(entry.relative_to(folder)) for entry in folder.rglob("*"))
