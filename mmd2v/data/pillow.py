"""Pillow images as the encoders see image files."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return RGB, turned by the EXIF orientation; of 16 bits a pixel the upper eight, as `decode_image` takes them.

    Pillow's own conversion clips 16-bit values at 255, which turns most pictures white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
