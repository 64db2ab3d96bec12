"""Caption files as they are found in the wild → one list of records, an image with all its captions each.

| format   | file                                                                                     |
|----------|------------------------------------------------------------------------------------------|
| flickr   | JSON list of ``{"image": NAME, "caption": [...] or "..."}``                              |
| coco     | JSON ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``     |
| karpathy | JSON ``{"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}``         |
| csv      | CSV or TSV with a header; one caption a row, an image may have many rows                 |
| folder   | a folder (and its subfolders) of images, a ``.txt`` of the same name beside each         |
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from mmd2v.data.captions import check_captions, text_captions
from mmd2v.data.shards import IMAGE_SUFFIXES
from mmd2v.errors import UserError, nearest, unknown_name

Format = Literal["auto", "flickr", "coco", "karpathy", "csv", "folder"]

_IMAGE_COLUMNS = ("image", "filepath", "image_name", "filename", "file_name", "image_path", "file", "path")
_CAPTION_COLUMNS = ("caption", "captions", "title", "comment", "text", "sentence", "raw")
_DELIMITERS = (",", "\t", "|", ";")


@dataclass
class Record:
    """One image of a caption file."""

    id: str
    """Stable: the image's name without its extension."""
    image: str
    """Name of the image file, as the caption file gives it."""
    captions: list[str]
    extras: dict[str, Any] = field(default_factory=dict)
    """Further keys of the sample's JSON."""


def read_source(
    source: str | Path,
    format: Format = "auto",
    splits: Sequence[str] = (),
    image_column: str | None = None,
    caption_column: str | None = None,
) -> list[Record]:
    """Read a caption file or folder.

    Args:
        source: the file or folder.
        format: see the table above; auto looks at the file.
        splits: which splits to take (karpathy: required).
        image_column: CSV column with image names; none: one of the usual names.
        caption_column: CSV column with captions; none: one of the usual names.

    Raises:
        UserError: unreadable, another format, an entry without image or caption, an empty caption, a duplicate id.
    """
    path = Path(source).expanduser()
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: not found, expected a caption file or a folder.{nearest(path.name, siblings)}")
    content = _load_json(path) if path.suffix == ".json" else None
    if format == "auto":
        format = _detect(path, content)
    if splits and format != "karpathy":
        raise UserError(f"--split: {path} has format {format}, which has no splits (only karpathy has)")
    if (image_column or caption_column) and format != "csv":
        raise UserError(f"--image-column, --caption-column: {path} has format {format}, which has no columns")
    if format in ("flickr", "coco", "karpathy") and content is None:
        raise UserError(f"{path}: format {format} is a .json file, found {path.suffix or 'a folder'}")
    if format == "folder" and not path.is_dir():
        raise UserError(f"{path}: format folder needs a folder, found a file")
    if format == "csv" and path.is_dir():
        raise UserError(f"{path}: format csv needs a file, found a folder")
    if format == "flickr":
        records = _flickr(path, content)
    elif format == "coco":
        records = _coco(path, content)
    elif format == "karpathy":
        records = _karpathy(path, content, splits)
    elif format == "csv":
        records = _csv(path, image_column, caption_column)
    else:
        records = _folder(path)
    if not records:
        raise UserError(f"{path}: found no image, expected at least one (format {format})")
    for record in records:
        record.captions = list(check_captions(record.captions, f"{path}: image {record.image}"))
    _check_unique(path, records)
    return records


def _check_unique(path: Path, records: list[Record]) -> None:
    counts = Counter(record.id for record in records)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        names = [record.image for record in records if record.id == repeated[0]]
        raise UserError(
            f"{path}: found {len(repeated)} duplicate ids, expected each once: '{repeated[0]}' "
            f"({counts[repeated[0]]} times: {', '.join(names[:3])})"
        )


def image_id(name: str) -> str:
    """The id of an image: its name without extension, with ``/`` between folders."""
    path = PurePosixPath(name.replace("\\", "/"))
    return str(path.with_suffix("")) if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES else str(path)


def _load_json(path: Path) -> Any:
    try:
        with open(path, encoding="utf-8") as handle:
            return json.load(handle)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None


def _detect(path: Path, content: Any) -> Format:
    if path.is_dir():
        return "folder"
    if path.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    if isinstance(content, list) and content and isinstance(content[0], dict) and "image" in content[0]:
        return "flickr"
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        if "annotations" in content:
            return "coco"
        if content["images"] and isinstance(content["images"][0], dict) and "sentences" in content["images"][0]:
            return "karpathy"
    if content is None:
        found = path.suffix or "file without extension"
        raise UserError(f"{path}: found a {found}, expected .json, .csv, .tsv or a folder; see --format")
    raise UserError(
        f"{path}: the JSON is none of: a list of {{image, caption}}; COCO captions (images, annotations); "
        "Karpathy's dataset (images with sentences)"
    )


def _entry(path: Path, what: str, number: int, entry: Any, keys: Iterable[str]) -> dict[str, Any]:
    """Check that a JSON entry is an object with these keys."""
    if not isinstance(entry, dict):
        raise UserError(f"{path}: {what} {number} is a {type(entry).__name__}, expected an object")
    for key in keys:
        if key not in entry:
            raise UserError(f"{path}: {what} {number} has no '{key}'.{nearest(key, entry)} Found: {', '.join(entry)}")
    return entry


def _name(path: Path, what: str, number: int, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{path}: {what} {number}: found image name {value!r}, expected a file name")
    return value.strip()


def _flickr(path: Path, content: Any) -> list[Record]:
    """A caption as a string means one row a caption: rows of one image are put together."""
    if not isinstance(content, list):
        raise UserError(f"{path}: format flickr is a JSON list, found a {type(content).__name__}")
    records: list[Record] = []
    single: dict[str, Record] = {}
    for number, raw in enumerate(content):
        entry = _entry(path, "entry", number, raw, ("image", "caption"))
        image = _name(path, "entry", number, entry["image"])
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


def _coco(path: Path, content: Any) -> list[Record]:
    """Images in file order, captions in the order of the annotations."""
    keys = ("images", "annotations")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise UserError(f"{path}: format coco is a JSON object with lists 'images' and 'annotations'")
    records: dict[Any, Record] = {}
    for number, raw in enumerate(content["images"]):
        entry = _entry(path, "images entry", number, raw, ("id", "file_name"))
        image = _name(path, "images entry", number, entry["file_name"])
        if entry["id"] in records:
            raise UserError(f"{path}: images entry {number}: duplicate image id {entry['id']}")
        records[entry["id"]] = Record(image_id(image), image, [], {"image_id": entry["id"]})
    for number, raw in enumerate(content["annotations"]):
        entry = _entry(path, "annotations entry", number, raw, ("image_id", "caption"))
        if entry["image_id"] not in records:
            raise UserError(f"{path}: annotations entry {number}: image id {entry['image_id']} is not among 'images'")
        records[entry["image_id"]].captions.append(entry["caption"])
    return list(records.values())


def _karpathy(path: Path, content: Any, splits: Sequence[str]) -> list[Record]:
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f"{path}: format karpathy is a JSON object with a list 'images'")
    keys = ("filename", "split", "sentences")
    entries = [_entry(path, "images entry", i, raw, keys) for i, raw in enumerate(content["images"])]
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
        name = _name(path, "images entry", number, entry["filename"])
        image = str(PurePosixPath(entry["filepath"]) / name) if entry.get("filepath") else name
        if not isinstance(entry["sentences"], list):
            raise UserError(f"{path}: images entry {number}: 'sentences' is no list")
        what = f"image {name}, sentence"
        captions = [_entry(path, what, i, sentence, ("raw",))["raw"] for i, sentence in enumerate(entry["sentences"])]
        extras = {"split": entry["split"]}
        if "cocoid" in entry:
            extras["image_id"] = entry["cocoid"]
        records.append(Record(image_id(name), image, captions, extras))
    return records


def _csv(path: Path, image_column: str | None, caption_column: str | None) -> list[Record]:
    # Captions longer than the module's default of 128 KiB a field do exist.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    records: dict[str, Record] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            header = handle.readline()
            delimiter, names = _columns(path, header, image_column, caption_column)
            reader = csv.reader(handle, delimiter=delimiter)
            image_at, caption_at = names
            for row in reader:
                line = reader.line_num + 1
                if not row:
                    continue
                if len(row) <= max(names):
                    raise UserError(f"{path}, line {line}: found {len(row)} fields, expected at least {max(names) + 1}")
                image = _name(path, "line", line, row[image_at])
                caption = row[caption_at]
                if not caption.strip():
                    raise UserError(f"{path}, line {line}: the caption of {image} is empty")
                records.setdefault(image, Record(image_id(image), image, [])).captions.append(caption)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}") from None
    return list(records.values())


def _columns(
    path: Path, header: str, image_column: str | None, caption_column: str | None
) -> tuple[str, tuple[int, int]]:
    """Find the delimiter and the places of the two columns in a header line."""
    wanted = (
        (image_column,) if image_column else _IMAGE_COLUMNS,
        (caption_column,) if caption_column else _CAPTION_COLUMNS,
    )
    fields: list[str] = []
    for delimiter in _DELIMITERS:
        split = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        if len(split) > len(fields):
            fields = split
        lowered = [name.lower() for name in split]
        places = [
            next((lowered.index(name.lower()) for name in names if name.lower() in lowered), None) for names in wanted
        ]
        if places[0] is not None and places[1] is not None:
            return delimiter, (places[0], places[1])
    raise UserError(
        f"{path}: the header needs a column for the image ({', '.join(wanted[0])}) and one for the caption "
        f"({', '.join(wanted[1])}); found: {', '.join(fields) or 'nothing'}. "
        "Name them with --image-column and --caption-column"
    )


def _folder(path: Path) -> list[Record]:
    files = sorted(entry for entry in path.rglob("*") if entry.is_file())
    images = [entry for entry in files if entry.suffix.lower().lstrip(".") in IMAGE_SUFFIXES]
    texts = {entry.with_suffix(""): entry for entry in files if entry.suffix.lower() == ".txt"}
    without = [str(entry) for entry in images if entry.with_suffix("") not in texts]
    if without:
        found = f"{len(without)} of {len(images)} images have"
        raise UserError(f"{path}: {found} no .txt beside them, such as {without[0]}")
    alone = sorted(set(texts) - {entry.with_suffix("") for entry in images})
    if alone:
        raise UserError(f"{path}: {len(alone)} .txt files have no image beside them, such as {texts[alone[0]]}")
    records = []
    for entry in images:
        name = entry.relative_to(path).as_posix()
        text = texts[entry.with_suffix("")]
        records.append(Record(image_id(name), name, list(text_captions(text.read_bytes(), str(text)))))
    return records
