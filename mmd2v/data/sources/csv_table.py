"""CSV or TSV with a header; one caption a row, an image may have many rows."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.sources.base import Record, image_id, image_name
from mmd2v.data.sources.caption_file import CaptionFile
from mmd2v.data.sources.peek import Peek
from mmd2v.errors import UserError

_IMAGE_COLUMNS = ("image", "filepath", "image_name", "filename", "file_name", "image_path", "file", "path")
_CAPTION_COLUMNS = ("caption", "captions", "title", "comment", "text", "sentence", "raw")
_DELIMITERS = (",", "\t", "|", ";")


class CsvTable(CaptionFile):
    """Images in the order of their first rows, captions in the order of the rows."""

    format = "csv"
    summary = "CSV or TSV with a header, a caption a row"
    takes = frozenset({"images", "image_column", "caption_column"})

    @staticmethod
    def detect(peek: Peek) -> bool:
        """See `Source.detect`."""
        return peek.suffix in (".csv", ".tsv")

    def _read(self, peek: Peek) -> list[Record]:
        path = peek.path
        if path.is_dir():
            raise UserError(f"{path}: format csv needs a file, found a folder")
        # Captions longer than the module's default of 128 KiB a field do exist.
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        records: dict[str, Record] = {}
        try:
            with open(path, encoding="utf-8-sig", newline="") as handle:
                header = handle.readline()
                delimiter, places = _columns(path, header, self.options.image_column, self.options.caption_column)
                reader = csv.reader(handle, delimiter=delimiter)
                image_at, caption_at = places
                for row in reader:
                    line = reader.line_num + 1
                    if not row:
                        continue
                    if len(row) <= max(places):
                        found = f"found {len(row)} fields"
                        raise UserError(f"{path}, line {line}: {found}, expected at least {max(places) + 1}")
                    image = image_name(path, "line", line, row[image_at])
                    caption = row[caption_at]
                    record = records.setdefault(image, Record(image_id(image), image, []))
                    if caption.strip():
                        record.captions.append(caption)
                    else:
                        text = f"{path}, line {line}: the caption of {image} is empty"
                        record.damage = self._bad(Damage(DamageKind.NO_CAPTION, text))
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
