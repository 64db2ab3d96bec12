"""JPEGs that travel encoded and are decoded, cropped and resized where the model is.

For nodes whose GPUs wait for their cores: nvJPEG decodes a batch at a time, and the loader's processes only choose the
crops. Files nvJPEG does not take as they are (no JPEG, or turned by EXIF) are decoded by the loader as ever.

Shapes: e encoded images among the B of a batch, S side of the result.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from mmd2v.config.schema import ImageTransformConfig
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.image_header import image_size
from mmd2v.data.transforms import Crop, decode_image, random_crop, resize

_JPEG_START = b"\xff\xd8\xff"
_EXIF = b"Exif\0\0"
_EXIF_WITHIN = 4096  # bytes from the start in which the marker stands where there is one
_ORIENTATION, _UPRIGHT = 274, (None, 1)


@dataclass(frozen=True)
class EncodedImages:
    """What the device is to decode, all on the CPU: nvJPEG reads the bytes from there."""

    rows: torch.Tensor
    """int64 [e], rows of the batch."""
    data: torch.Tensor
    """uint8 [sum of sizes], the files end to end."""
    sizes: tuple[int, ...]
    """e numbers of bytes."""
    crops: tuple[Crop, ...]
    """e boxes, in pixels of the decoded images."""
    shards: dict[int, str]
    """Row → path of its shard, for messages."""

    @classmethod
    def pack(cls, images: Sequence[tuple[int, str, memoryview, Crop]]) -> EncodedImages | None:
        """Put (row, shard, file, crop) of a batch's images together; None without any."""
        if not images:
            return None
        rows, shards, files, crops = zip(*images, strict=True)
        data = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
        named = dict(zip(rows, shards, strict=True))
        return cls(torch.tensor(rows), data, tuple(map(len, files)), tuple(crops), named)


def crop_of_upright_jpeg(
    data: memoryview, config: ImageTransformConfig, *, seed: int, epoch: int, sample_id: str, where: str
) -> Crop | None:
    """The training crop of a JPEG that can be decoded as it is, chosen by its header; None for any other file.

    Raises:
        Damage: a JPEG without a readable header.
    """
    if bytes(data[:3]) != _JPEG_START or not _is_upright(data):
        return None
    size = image_size(data)
    if size is None:
        raise Damage(DamageKind.IMAGE_UNDECODABLE, f"{where}: the image does not decode: its header has no size")
    return random_crop(*size, config, seed=seed, epoch=epoch, sample_id=sample_id)


def _is_upright(data: memoryview) -> bool:
    if _EXIF not in bytes(data[:_EXIF_WITHIN]):
        return True
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:  # reads the header alone
            return image.getexif().get(_ORIENTATION) in _UPRIGHT
    except (OSError, SyntaxError, ValueError):
        return False  # the loader's decoder will say what is wrong


def decode_on(images_BCSS: torch.Tensor, encoded: EncodedImages, interpolation: str) -> dict[int, str]:
    """Decode, crop, resize and flip into their rows of uint8 ``images_BCSS`` [B, 3, S, S], on its device.

    The resize is in float on CUDA, so that pixels may differ by a level or two from the loader's. Returns row → what is
    wrong, of the images that do not decode; their rows stay as they were.
    """
    side = images_BCSS.shape[-1]
    files = list(encoded.data.split(list(encoded.sizes)))
    decoded: Sequence[torch.Tensor | None]
    broken: dict[int, str] = {}
    try:
        decoded = decode_jpeg(files, mode=ImageReadMode.RGB, device=images_BCSS.device)
    except (RuntimeError, ValueError):
        # One of them is broken, or of a kind that nvJPEG does not know.
        decoded = [_decode_alone(row, file, broken) for row, file in zip(encoded.rows.tolist(), files, strict=True)]
    for row, image, crop in zip(encoded.rows.tolist(), decoded, encoded.crops, strict=True):
        if image is None:
            continue
        image = image[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        image = _resize(image.to(images_BCSS.device), side, interpolation)
        images_BCSS[row] = image.flip(-1) if crop.flip else image
    return broken


def _decode_alone(row: int, file: torch.Tensor, broken: dict[int, str]) -> torch.Tensor | None:
    """Decode one file on the CPU, or note what is wrong with it."""
    try:
        return decode_image(memoryview(file.numpy()))
    except Damage as damage:
        broken[row] = str(damage)
        return None


def _resize(image: torch.Tensor, side: int, interpolation: str) -> torch.Tensor:
    if image.device.type == "cpu":
        return resize(image, side, side, interpolation)
    rows = functional.interpolate(image[None].float(), (side, side), mode=interpolation, antialias=True)[0]
    return rows.round_().clamp_(0, 255).to(torch.uint8)
