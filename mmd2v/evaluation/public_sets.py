"""The public test sets everybody reports on, told by the ids of their images, and how many captions they have.

A file that bears the name of such a set and holds others is the commonest way to a number that no paper has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mmd2v.errors import UserError


@dataclass(frozen=True)
class PublicSet:
    """A split as it was published."""

    name: str
    images: int
    captions: int
    ids: str
    """SHA-256 of the sorted names of its images, without folder and extension, a line each."""
    files: tuple[str, ...]
    """Usual names of files that hold this split alone."""
    whole: str
    """Usual name of the file that holds all splits."""
    split: str = "test"


PUBLIC_SETS = (
    PublicSet(
        "COCO, Karpathy's test split",
        5_000,
        25_010,
        "2462b97e600404bb563e70fb738a2d14db090d20aaf620058a2fd864c5da8925",
        ("coco_karpathy_test.json",),
        "dataset_coco.json",
    ),
    PublicSet(
        "Flickr30K, Karpathy's test split",
        1_000,
        5_000,
        "8abcfe974e8a20e781dead219d89624b17953a3d00706cd9633e964740db3836",
        ("flickr30k_test.json",),
        "dataset_flickr30k.json",
    ),
)


def ids_digest(ids: Sequence[str]) -> str:
    """SHA-256 of ids, a line each, in the order given: what ``ids_sha256`` of a result is."""
    return hashlib.sha256("".join(f"{one}\n" for one in ids).encode()).hexdigest()


def names_digest(ids: Sequence[str]) -> str:
    """SHA-256 that does not depend on order or folders of images."""
    return ids_digest(sorted(PurePosixPath(one).name for one in ids))


def check_public(
    data: Sequence[str], splits: Sequence[str], ids: Sequence[str], captions: int, limit: int | None
) -> str | None:
    """Return the name of the public set that was measured, None for another or a part of one.

    Raises UserError where ids or file name say that it is one, and the counts or the ids are others.
    """
    if limit is not None:
        return None
    digest = names_digest(ids)
    for public in PUBLIC_SETS:
        by_ids = digest == public.ids
        if not by_ids and not _is_named(public, data, splits):
            continue
        if (len(ids), captions) != (public.images, public.captions):
            raise UserError(
                f"{', '.join(data)}: found {len(ids):,} images and {captions:,} captions, but {public.name} has "
                f"{public.images:,} and {public.captions:,}; a part of it goes by another file name"
            )
        if not by_ids:
            raise UserError(
                f"{', '.join(data)}: its {public.images:,} image ids are not those of {public.name}: wrong ids, or a "
                "set that should go by another file name"
            )
        return public.name
    return None


def _is_named(public: PublicSet, data: Sequence[str], splits: Sequence[str]) -> bool:
    names = [Path(one).name for one in data]
    return len(names) == 1 and (
        names[0] in public.files or (names[0] == public.whole and tuple(splits) == (public.split,))
    )
