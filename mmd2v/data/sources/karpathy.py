"""Karpathy's splits: JSON ``{"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}``."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

from mmd2v.data.sources.base import Record, image_id, image_name, json_entry
from mmd2v.data.sources.caption_file import CaptionFile
from mmd2v.data.sources.peek import Peek
from mmd2v.errors import UserError, unknown_name


class Karpathy(CaptionFile):
    """The images of the splits asked for, in file order."""

    format = "karpathy"
    summary = "Karpathy's dataset_*.json, with --split"
    takes = frozenset({"images", "splits"})

    @staticmethod
    def detect(peek: Peek) -> bool:
        """See `Source.detect`."""
        content = peek.content if peek.first_item is None else None
        images = content.get("images") if isinstance(content, dict) else None
        return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "sentences" in images[0]

    def _read(self, peek: Peek) -> list[Record]:
        path, content, splits = peek.path, self._require_json(peek), self.options.splits
        if not isinstance(content, dict) or not isinstance(content.get("images"), list):
            raise UserError(f"{path}: format karpathy is a JSON object with a list 'images'")
        keys = ("filename", "split", "sentences")
        entries = [json_entry(path, "images entry", i, raw, keys) for i, raw in enumerate(content["images"])]
        counts = Counter(str(entry["split"]) for entry in entries)
        if not splits:
            listing = ", ".join(f"{name} ({count:,} images)" for name, count in sorted(counts.items()))
            raise UserError(f"--split: missing; {path} has {listing}. Name one or more (COCO trains on: train restval)")
        for split in splits:
            if split not in counts:
                raise unknown_name(f"--split of {path}", split, counts)
        records = []
        for number, entry in enumerate(entries):
            if entry["split"] not in splits:
                continue
            name = image_name(path, "images entry", number, entry["filename"])
            folder = entry.get("filepath") or ""
            if not isinstance(folder, str):
                raise UserError(
                    f"{path}: images entry {number}: 'filepath' is a {type(folder).__name__}, expected a folder's name"
                )
            image = str(PurePosixPath(folder) / name)
            if not isinstance(entry["sentences"], list):
                raise UserError(f"{path}: images entry {number}: 'sentences' is no list")
            what = f"image {name}, sentence"
            sentences = enumerate(entry["sentences"])
            captions = [json_entry(path, what, i, sentence, ("raw",))["raw"] for i, sentence in sentences]
            extras = {"split": entry["split"]}
            if "cocoid" in entry:
                extras["image_id"] = entry["cocoid"]
            records.append(Record(image_id(name), image, captions, extras))
        return records
