"""Visual Genome's ``region_descriptions.json``: an image with all phrases of its regions, as VLMo and BEiT-3 use it.

The file is a JSON list of ``{"id": IMAGE, "regions": [{"region_id", "image_id", "x", "y", "width", "height",
"phrase"}]}`` (700 MB, five million phrases); the images are ``VG_100K/IMAGE.jpg`` and ``VG_100K_2/IMAGE.jpg``.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from functools import partial
from typing import Any

from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.image_files import Stamp, open_images, stamp
from mmd2v.data.sources.base import Record, Source, SourceOptions, json_entry
from mmd2v.data.sources.peek import Peek, json_items
from mmd2v.errors import UserError


class VisualGenome(Source):
    """Read entry by entry. Phrases without a letter are left out: the published file has such regions."""

    format = "visual_genome"
    summary = "Visual Genome's region_descriptions.json, an image with all its phrases"

    def __init__(self, peek: Peek, options: SourceOptions) -> None:
        """Raises UserError: no list of images with regions."""
        self.path = peek.path
        if peek.suffix != ".json":
            raise UserError(f"{self.path}: format {self.format} is a .json file, found {peek.suffix or 'a folder'}")
        next(json_items(self.path), None)  # another format is told at once
        self._files = open_images(options.images or (self.path.parent,), tree=True, tolerant=options.skip_bad)
        self.total = self._count()
        if not self.total:
            raise UserError(f"{self.path}: found no image, expected at least one (format {self.format})")

    @staticmethod
    def detect(peek: Peek) -> bool:
        """See `Source.detect`."""
        return isinstance(peek.first_item, dict) and "regions" in peek.first_item

    def _count(self) -> int:
        """Entries of the file. A phrase cannot hold this key: its quotation marks would be escaped."""
        if self.path.stat().st_size == 0:
            return 0
        with open(self.path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            count, at = 0, data.find(b'"regions"')
            while at >= 0:
                count, at = count + 1, data.find(b'"regions"', at + 1)
        return count

    def records(self) -> Iterator[Record]:
        """See `Source.records`."""
        seen: set[int] = set()
        for number, raw in enumerate(json_items(self.path)):
            entry = json_entry(self.path, "entry", number, raw, ("regions",))
            image = self._image_number(number, entry)
            record = Record(str(image), f"{image}.jpg", self._phrases(image, entry), {"image_id": image})
            where = f"{self.path}: image {image}"
            stored = self._files.find(f"{image}.jpg")
            if image in seen:
                record.damage = Damage(DamageKind.DUPLICATE_KEY, f"{where}: duplicate image id")
            elif not record.captions:
                record.damage = Damage(
                    DamageKind.NO_CAPTION, f"{where}: no region with a phrase, expected at least one"
                )
            elif stored is None:
                text = f"{where}: found no {image}.jpg in {self._files.name} and its subfolders"
                record.damage = Damage(DamageKind.NO_IMAGE, text)
            else:
                record.read = partial(self._files.read, stored)
            seen.add(image)
            yield record

    def _image_number(self, number: int, entry: dict[str, Any]) -> int:
        """The image's id: of the entry, or of its regions, as another version of the file has it."""
        regions = entry["regions"]
        first = regions[0] if isinstance(regions, list) and regions else None
        image = entry.get("id", entry.get("image_id", first.get("image_id") if isinstance(first, dict) else None))
        if not isinstance(image, int):
            raise UserError(f"{self.path}: entry {number}: found image id {image!r}, expected a number under 'id'")
        return image

    def _phrases(self, image: int, entry: dict[str, Any]) -> list[str]:
        what = f"image {image}, region"
        if not isinstance(entry["regions"], list):
            raise UserError(f"{self.path}: image {image}: 'regions' is a {type(entry['regions']).__name__}, no list")
        regions = (json_entry(self.path, what, i, raw, ("phrase",)) for i, raw in enumerate(entry["regions"]))
        return [region["phrase"] for region in regions if not _is_blank(region["phrase"])]

    def stamps(self) -> Iterator[Stamp]:
        """See `Source.stamps`."""
        yield stamp(self.path)
        yield from self._files.stamps()


def _is_blank(phrase: Any) -> bool:
    return isinstance(phrase, str) and not phrase.strip()
