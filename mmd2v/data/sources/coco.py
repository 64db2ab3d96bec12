"""COCO captions: JSON ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmd2v.data.sources.base import Record, image_id, image_name, json_entry
from mmd2v.data.sources.caption_file import CaptionFile
from mmd2v.data.sources.peek import Peek
from mmd2v.errors import UserError


class Coco(CaptionFile):
    """Images in file order, captions in the order of the annotations."""

    format = "coco"
    summary = "COCO's captions_*.json"

    @staticmethod
    def detect(peek: Peek) -> bool:
        """See `Source.detect`."""
        content = peek.content if peek.first_item is None else None
        return isinstance(content, dict) and isinstance(content.get("images"), list) and "annotations" in content

    def _read(self, peek: Peek) -> list[Record]:
        path, content = peek.path, self._require_json(peek)
        keys = ("images", "annotations")
        if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
            raise UserError(f"{path}: format coco is a JSON object with lists 'images' and 'annotations'")
        records: dict[Any, Record] = {}
        for number, raw in enumerate(content["images"]):
            entry = json_entry(path, "images entry", number, raw, ("id", "file_name"))
            image = image_name(path, "images entry", number, entry["file_name"])
            _check_id(path, f"images entry {number}", "id", entry["id"])
            if entry["id"] in records:
                raise UserError(f"{path}: images entry {number}: duplicate image id {entry['id']}")
            records[entry["id"]] = Record(image_id(image), image, [], {"image_id": entry["id"]})
        for number, raw in enumerate(content["annotations"]):
            entry = json_entry(path, "annotations entry", number, raw, ("image_id", "caption"))
            _check_id(path, f"annotations entry {number}", "image_id", entry["image_id"])
            if entry["image_id"] not in records:
                raise UserError(
                    f"{path}: annotations entry {number}: image id {entry['image_id']} is not among 'images'"
                )
            records[entry["image_id"]].captions.append(entry["caption"])
        return list(records.values())


def _check_id(path: Path, what: str, key: str, value: Any) -> None:
    if not isinstance(value, int | str):
        raise UserError(f"{path}: {what}: '{key}' is a {type(value).__name__}, expected a number or text")
