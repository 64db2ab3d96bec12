"""JPEGs that travel encoded and are decoded, cropped and resized where the model is.

For nodes whose GPUs wait for their cores: nvJPEG decodes a batch at a time, and the loader's processes only choose the
crops. Files nvJPEG does not take as they are (no JPEG, or turned by EXIF) are decoded by the loader as ever.

Shapes: e encoded images among the B of a batch, S side of the result.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from mmd2v.config.schema import ImageTransformConfig
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.image_header import image_size, is_upright
from mmd2v.data.transforms import Crop, decode_image, random_crop, resize

logger = logging.getLogger(__name__)

_JPEG_START = b"\xff\xd8\xff"


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
    places: dict[int, tuple[str, int]]
    """Row → its shard and its row there, for messages."""

    @classmethod
    def pack(cls, images: Sequence[tuple[int, tuple[str, int], memoryview, Crop]]) -> EncodedImages | None:
        """Put (row, place, file, crop) of a batch's images together; None without any."""
        if not images:
            return None
        rows, places, files, crops = zip(*images, strict=True)
        data = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
        named = dict(zip(rows, places, strict=True))
        return cls(torch.tensor(rows), data, tuple(map(len, files)), tuple(crops), named)


def crop_of_upright_jpeg(
    data: memoryview, config: ImageTransformConfig, *, seed: int, epoch: int, sample_id: str, where: str
) -> Crop | None:
    """The training crop of a JPEG that can be decoded as it is, chosen by its header; None for any other file.

    Raises:
        Damage: a JPEG without a readable header.
    """
    if bytes(data[:3]) != _JPEG_START or not is_upright(data):
        return None
    size = image_size(data)
    if size is None:
        raise Damage(DamageKind.IMAGE_UNDECODABLE, f"{where}: the image does not decode: its header has no size")
    return random_crop(*size, config, seed=seed, epoch=epoch, sample_id=sample_id)


def decode_on(images_BCSS: torch.Tensor, encoded: EncodedImages, interpolation: str) -> dict[int, str]:
    """Decode, crop, resize and flip into their rows of uint8 ``images_BCSS`` [B, 3, S, S], on its device.

    The resize is in float on CUDA, so that pixels may differ by a level or two from the loader's. Returns row → what is
    wrong, of the images that do not decode; their rows stay as they were.

    Raises:
        torch.OutOfMemoryError: the device has no room for the pixels.
    """
    side = images_BCSS.shape[-1]
    files = list(encoded.data.split(list(encoded.sizes)))
    decoded: Sequence[torch.Tensor | None]
    broken: dict[int, str] = {}
    try:
        decoded = decode_jpeg(files, mode=ImageReadMode.RGB, device=images_BCSS.device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        # One of them is broken, or of a kind that nvJPEG does not know; or it is not there at all.
        decoded = [_decode_alone(row, file, broken) for row, file in zip(encoded.rows.tolist(), files, strict=True)]
        if not broken:
            _warn_of_slow_decoding(str(error).partition("\n")[0][:200])
    for row, image, crop in zip(encoded.rows.tolist(), decoded, encoded.crops, strict=True):
        if image is None:
            continue
        image = image[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        image = _resize(image.to(images_BCSS.device), side, interpolation)
        images_BCSS[row] = image.flip(-1) if crop.flip else image
    return broken


@cache  # a broken nvJPEG says the same every step
def _warn_of_slow_decoding(reason: str) -> None:
    logger.warning(
        "data.decode: the device cannot decode a batch of images that are all right (%s); the training process decodes "
        "such batches itself, one image after the other, while the device waits. `data.decode: loader` leaves them to "
        "the loader's workers",
        reason,
    )


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
