"""A folder (and its subfolders) of images, a ``.txt`` of the same name beside each."""

from __future__ import annotations

from collections.abc import Iterator

from mmd2v.data.captions import text_captions
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.image_files import Stamp, stamp
from mmd2v.data.shards import IMAGE_SUFFIXES
from mmd2v.data.sources.base import Record, image_id
from mmd2v.data.sources.caption_file import CaptionFile
from mmd2v.data.sources.peek import Peek
from mmd2v.errors import UserError


class Folder(CaptionFile):
    """Images in the order of their paths; a caption a line."""

    format = "folder"
    summary = "a folder of images, each beside a .txt with a caption a line"

    @staticmethod
    def detect(peek: Peek) -> bool:
        """See `Source.detect`."""
        return peek.path.is_dir()

    def _read(self, peek: Peek) -> list[Record]:
        path = peek.path
        if not path.is_dir():
            raise UserError(f"{path}: format folder needs a folder, found a file")
        files = sorted(entry for entry in path.rglob("*") if entry.is_file())
        images = [entry for entry in files if entry.suffix.lower().lstrip(".") in IMAGE_SUFFIXES]
        texts = {entry.with_suffix(""): entry for entry in files if entry.suffix.lower() == ".txt"}
        # Before they are read: one that is edited meanwhile is another file.
        self._texts = [stamp(entry) for entry in files if entry.suffix.lower() == ".txt"]
        without = [str(entry) for entry in images if entry.with_suffix("") not in texts]
        if without:
            found = f"{len(without)} of {len(images)} images have"
            self._bad(Damage(DamageKind.NO_CAPTION, f"{path}: {found} no .txt beside them, such as {without[0]}"))
        alone = sorted(set(texts) - {entry.with_suffix("") for entry in images})
        if alone:
            found = f"{len(alone)} .txt files have"
            self._bad(Damage(DamageKind.NO_IMAGE, f"{path}: {found} no image beside them, such as {texts[alone[0]]}"))
        records = []
        for entry in images:
            name = entry.relative_to(path).as_posix()
            record = Record(image_id(name), name, [])
            text = texts.get(entry.with_suffix(""))
            try:
                if text is None:
                    raise Damage(DamageKind.NO_CAPTION, f"{entry}: no .txt beside it")
                record.captions = list(text_captions(text.read_bytes(), str(text)))
            except Damage as damage:
                record.damage = self._bad(damage)
            records.append(record)
        for stem in alone:
            name = stem.relative_to(path).as_posix()
            damage = Damage(DamageKind.NO_IMAGE, f"{texts[stem]}: no image beside it")
            records.append(Record(name, name, ["absent"], damage=damage))
        return records

    def stamps(self) -> Iterator[Stamp]:
        """See `Source.stamps`: the captions too, each in a file of its own."""
        yield from self._texts
        yield from super().stamps()
