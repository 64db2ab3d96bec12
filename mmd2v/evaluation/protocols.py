"""What counts as one image: the published protocol, and the one behind a well-known wrong column.

Shapes: M images, N captions, I items that images are ranked as (M or N), E width of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from mmd2v.errors import unknown_name

Protocol = Literal["karpathy", "image_per_caption"]
"""karpathy: an image is one candidate, and any of its captions is right. image_per_caption: every caption owns a copy
of its image, and that copy alone is right for it; recall comes out too low."""

DEFAULT_PROTOCOL: Protocol = "karpathy"


@dataclass(frozen=True)
class RankedSet:
    """What is ranked against what, and which images and captions belong together when images are resampled."""

    image_IE: torch.Tensor
    text_NE: torch.Tensor
    caption_item_N: torch.Tensor
    """int64 [N], the item that is right for a caption."""
    unit_of_item_I: torch.Tensor
    """int64 [I], the image that an item is, or is a copy of."""

    @property
    def unit_of_caption_N(self) -> torch.Tensor:
        """int64 [N], the image of each caption."""
        return self.unit_of_item_I[self.caption_item_N]


def ranked_set(
    image_ME: torch.Tensor, text_NE: torch.Tensor, caption_image_N: torch.Tensor, protocol: Protocol = DEFAULT_PROTOCOL
) -> RankedSet:
    """Arrange an encoded set as ``protocol`` asks. Raises UserError for a name that is none."""
    if protocol not in get_args(Protocol):
        raise unknown_name("--protocol", protocol, get_args(Protocol))
    captions = torch.arange(len(text_NE), device=image_ME.device)
    if protocol == "image_per_caption":
        return RankedSet(image_ME[caption_image_N], text_NE, captions, caption_image_N)
    return RankedSet(image_ME, text_NE, caption_image_N, torch.arange(len(image_ME), device=image_ME.device))
