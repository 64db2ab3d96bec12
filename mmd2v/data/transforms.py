"""Image bytes → the uint8 square the student sees. Normalisation is the device's work.

Shapes: C = 3 channels (RGB), H W pixels of the decoded image, S side of the result.
"""

from __future__ import annotations

import io
import math
import re
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as _decode

from mmd2v.config.schema import ImageTransformConfig
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.draws import lazy_uniforms
from mmd2v.data.image_header import first_frame
from mmd2v.data.pillow import upright_rgb

_CROP_TRIES = 10  # as torchvision's RandomResizedCrop
_PNG_START = b"\x89PNG\r\n\x1a\n"
_GIF_START = b"GIF8"
_THIN = 32  # sides of an image as one to this, from where on its ends are cut off before it is resized


def decode_image(data: bytes | bytearray | memoryview, where: str = "image") -> torch.Tensor:
    """Decode JPEG, PNG, WebP or GIF bytes, upright by its EXIF orientation.

    Returns:
        uint8 [3, H, W], RGB; transparency is dropped, of an animation the first frame is taken, of 16 bits a channel
        the upper eight.

    Raises:
        Damage: the bytes do not decode; starts with ``where``.
    """
    if len(data) == 0:
        raise Damage(DamageKind.IMAGE_UNDECODABLE, f"{where}: the image is empty (0 bytes)")
    if bytes(data[: len(_PNG_START)]) == _PNG_START:
        return _decode_png(data, where)
    if bytes(data[:4]) == _GIF_START:
        data = first_frame(data)  # torchvision decodes them all, which takes memory that no limit of pixels knows of
    writable = data if isinstance(data, memoryview) and not data.readonly else bytearray(data)
    try:
        image = _decode(torch.frombuffer(writable, dtype=torch.uint8), ImageReadMode.RGB, apply_exif_orientation=True)
    except (RuntimeError, ValueError) as error:
        raise Damage(DamageKind.IMAGE_UNDECODABLE, f"{where}: the image does not decode: {_reason(error)}") from None
    return image[0] if image.ndim == 4 else image


def _reason(error: Exception) -> str:
    """What a decoder of torchvision says, without the name and the place of its source file."""
    first = str(error).splitlines()[0]
    return re.sub(r"^.*\.(?:cpp|cc|cu|h):\d+[\],]*\s*", "", first).split(". For ")[0]


def _decode_png(data: bytes | bytearray | memoryview, where: str) -> torch.Tensor:
    """Decode a PNG with Pillow: torchvision 0.29 ends the process at one with a flipped bit."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            pixels = np.asarray(upright_rgb(image))
    except Exception as error:  # Pillow's decoders raise all kinds, of which OSError is the least
        raise Damage(DamageKind.IMAGE_UNDECODABLE, f"{where}: the image does not decode: {error}") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


class Crop(NamedTuple):
    """A training crop, in pixels of the decoded image."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def random_crop(
    height: int, width: int, config: ImageTransformConfig, *, seed: int, epoch: int, sample_id: str
) -> Crop:
    """Choose the crop and flip of a sample: a pure function of the arguments.

    The box follows torchvision's RandomResizedCrop: area uniform in ``crop_scale``, log of the ratio uniform in
    ``crop_ratio``, ten tries, then the largest centred box of an allowed ratio. A scale of (1, 1) keeps the image
    whole.
    """
    draws = lazy_uniforms(3 + 2 * _CROP_TRIES, "crop and flip", seed, epoch, sample_id)
    flip, down, across = next(draws), next(draws), next(draws)
    flips = flip < config.flip
    if config.crop_scale == (1.0, 1.0):
        return Crop(0, 0, height, width, flips)
    low, high = config.crop_scale
    log_low, log_high = map(math.log, config.crop_ratio)
    for area_draw, ratio_draw in zip(draws, draws, strict=True):  # two at a time
        area = height * width * (low + (high - low) * area_draw)
        ratio = math.exp(log_low + (log_high - log_low) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(down * (height - h + 1)), int(across * (width - w + 1)), h, w, flips)
    ratio = min(max(width / height, config.crop_ratio[0]), config.crop_ratio[1])
    w = min(width, max(1, round(height * ratio)))
    h = min(height, max(1, round(width / ratio)))
    return Crop((height - h) // 2, (width - w) // 2, h, w, flips)


def resize(image: torch.Tensor, height: int, width: int, interpolation: str) -> torch.Tensor:
    """Resize uint8 [3, H, W] to [3, height, width], antialiased, in integer arithmetic."""
    if image.shape[-2:] == (height, width):
        return image
    # torchvision's own resize goes through float for bilinear on some processors; torch's uint8 kernel never does,
    # and is fastest on the layout that decoding gives (channels last), which a crop breaks.
    rows = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    # A dimension added by index has the stride of the channels, from which torch concludes that the image is not
    # channels last, and takes a kernel that needs half as long again.
    rows = rows.as_strided((1, *rows.shape), (rows.numel(), *rows.stride()))
    return functional.interpolate(rows, (height, width), mode=interpolation, antialias=True)[0]


def train_transform(
    image: torch.Tensor, config: ImageTransformConfig, *, seed: int, epoch: int, sample_id: str
) -> torch.Tensor:
    """Crop, then resize, then flip: uint8 [3, H, W] → [3, S, S]."""
    height, width = image.shape[-2:]
    box = random_crop(height, width, config, seed=seed, epoch=epoch, sample_id=sample_id)
    image = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
    image = resize(image, config.size, config.size, config.interpolation)
    return image.flip(-1) if box.flip else image


def eval_transform(image: torch.Tensor, config: ImageTransformConfig) -> torch.Tensor:
    """Shortest side to S and centre crop, or squash to a square: uint8 [3, H, W] → [3, S, S]."""
    size = config.size
    if config.eval_resize == "squash":
        return resize(image, size, size, config.interpolation)
    image = _without_ends(image)
    height, width = image.shape[-2:]
    short = min(height, width)
    # Truncation and the rounding of the offsets are torchvision's (Resize, CenterCrop).
    new_height, new_width = int(size * height / short), int(size * width / short)
    image = resize(image, new_height, new_width, config.interpolation)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return image[:, top : top + size, left : left + size]


def _without_ends(image: torch.Tensor) -> torch.Tensor:
    """Cut what a centre crop leaves out anyway off both ends of a very thin image; others stay as they are.

    Resized whole, a line of 65,535 pixels would take gigabytes. Far more is kept than the resize looks at.
    """
    height, width = image.shape[-2:]
    short = min(height, width)
    # Whole squares go, so that the pixels of the resized image stay where they are.
    squares = max(0, max(height, width) // short - _THIN) // 2
    cut = squares * short
    return image[:, cut : height - cut] if height > width else image[:, :, cut : width - cut]


def shrink(image: torch.Tensor, short_side: int) -> torch.Tensor:
    """Make the shorter side ``short_side`` pixels, aspect kept; smaller images stay as they are."""
    height, width = image.shape[-2:]
    short = min(height, width)
    if short <= short_side:
        return image
    new_height, new_width = round(height * short_side / short), round(width * short_side / short)
    return resize(image, new_height, new_width, "bicubic")
