"""JSON list of ``{"image": NAME, "caption": [...] or "..."}``."""

from __future__ import annotations

from mmd2v.data.sources.base import Record, image_id, image_name, json_entry
from mmd2v.data.sources.caption_file import CaptionFile
from mmd2v.data.sources.peek import Peek
from mmd2v.errors import UserError


class Flickr(CaptionFile):
    """A caption as a string means one row a caption: rows of one image are put together."""

    format = "flickr"
    summary = 'JSON list of {"image", "caption"}'

    @staticmethod
    def detect(peek: Peek) -> bool:
        """See `Source.detect`."""
        return isinstance(peek.first_item, dict) and "image" in peek.first_item

    def _read(self, peek: Peek) -> list[Record]:
        path, content = peek.path, self._require_json(peek)
        if not isinstance(content, list):
            raise UserError(f"{path}: format flickr is a JSON list, found a {type(content).__name__}")
        records: list[Record] = []
        single: dict[str, Record] = {}
        for number, raw in enumerate(content):
            entry = json_entry(path, "entry", number, raw, ("image", "caption"))
            image = image_name(path, "entry", number, entry["image"])
            caption = entry["caption"]
            if isinstance(caption, str):
                if image in single:
                    single[image].captions.append(caption)
                    continue
                single[image] = Record(image_id(image), image, [caption])
                records.append(single[image])
            else:
                records.append(Record(image_id(image), image, caption))
        return records
