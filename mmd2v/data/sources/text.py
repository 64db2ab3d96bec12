"""Plain text for distillation without images: documents, cut into passages.

| source                                   | documents                                                            |
|------------------------------------------|----------------------------------------------------------------------|
| a ``.txt``                               | one                                                                  |
| a ``.jsonl``, ``.jsonl.gz``              | one a line, under the key "text"                                     |
| a ``.tar``, ``.tar.gz``, ``.tar.xz``, …  | the ``.txt`` inside, also of tars inside as OpenWebText's ``_data.xz`` |
| a folder and its subfolders              | all of these                                                         |

Paragraphs are separated by blank lines, as in the books of Project Gutenberg, whose lines are cut at a width. The id of
a passage tells its document and place: ``books/emma-000012``, ``corpus.jsonl/00000317-000000``.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.image_files import Stamp, stamp
from mmd2v.data.shards import IMAGE_SUFFIXES
from mmd2v.data.sources.base import Record, Source, SourceOptions
from mmd2v.data.sources.passages import passages
from mmd2v.data.sources.peek import Peek
from mmd2v.data.tar_members import READ_ERRORS, decompressed, streamed_members
from mmd2v.errors import UserError, nearest

PASSAGE_WORDS = 256  # at most, unless asked for otherwise
_LINES = (".jsonl", ".jsonl.gz")
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".xz")
_SUFFIXES = (".txt", *_LINES, *_TARS)
_PIECE = 1 << 20  # bytes read at once
_LONGEST_WORD = 1 << 16  # characters; what goes on longer is no text
_BLANK_LINE = re.compile(r"\n\s*\n")
_DEEPEST = 3  # tars inside tars


class Text(Source):
    """Documents in the order of their paths, passages in the order of the document; no text is held in memory."""

    format = "text"
    summary = "plain text, for text distillation: .txt, .jsonl, tars of .txt, or a folder of them"
    takes = frozenset({"passage_words"})
    unit = "passages"
    has_images = False
    total = None

    def __init__(self, peek: Peek, options: SourceOptions) -> None:
        """Raises UserError: no text there."""
        self.path = peek.path
        self._words = PASSAGE_WORDS if options.passage_words is None else options.passage_words
        if peek.path.is_dir():
            found = (Path(folder) / name for folder, _, names in os.walk(peek.path) for name in names)
            self._files = sorted(path for path in found if _is_text(path.name))
        else:
            self._files = [peek.path] if _is_text(peek.path.name) else []
        if not self._files:
            raise UserError(f"{self.path}: format {self.format} needs {', '.join(_SUFFIXES)} files, found none")

    @staticmethod
    def detect(peek: Peek) -> bool:
        """See `Source.detect`: text, and no image beside it."""
        if peek.suffix == ".tar":
            return any(_is_text(name) for name in peek.names)
        if not peek.path.is_dir():
            return peek.suffix in _SUFFIXES
        text = False
        for name in peek.tree():
            if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
                return False
            text = text or _is_text(name)
        return text

    def records(self) -> Iterator[Record]:
        """See `Source.records`."""
        seen: set[int] = set()
        for path in self._files:
            name = path.relative_to(self.path).as_posix() if path != self.path else path.name
            if _is_repeat(name, seen):
                yield _repeat(name, str(path))
                continue
            try:
                with open(path, "rb") as stream:
                    yield from self._file(name, str(path), stream, _DEEPEST)
            except OSError as error:
                text = f"{path}: cannot be read: {error.strerror or error}"
                yield Record(name, None, [], damage=Damage(DamageKind.SHARD_UNREADABLE, text))

    def stamps(self) -> Iterator[Stamp]:
        """See `Source.stamps`."""
        yield from map(stamp, self._files)

    def _file(self, name: str, where: str, stream: IO[bytes], deepest: int) -> Iterator[Record]:
        """Records of one file, whatever it is; a damaged end is a damaged record."""
        lower = name.lower()
        try:
            if lower.endswith(".txt"):
                yield from self._document(name[: -len(".txt")], words_of(_decoded(stream, where), where))
            elif lower.endswith(_LINES):
                yield from self._json_lines(name, where, stream)
            elif deepest:
                seen: set[int] = set()
                for member, content in streamed_members(stream, where):
                    if _is_text(member):
                        inside = str(PurePosixPath(member)).lstrip("/")
                        if _is_repeat(inside, seen):
                            yield _repeat(f"{name}/{inside}", f"{where}: {inside}")
                            continue
                        yield from self._file(f"{name}/{inside}", f"{where}: {inside}", content, deepest - 1)
            else:
                raise Damage(DamageKind.SHARD_UNREADABLE, f"{where}: more than {_DEEPEST} tars inside each other")
        except Damage as damage:
            yield Record(name, None, [], damage=damage)

    def _document(self, name: str, words: Iterable[list[str] | None]) -> Iterator[Record]:
        for number, passage in enumerate(passages(words, self._words)):
            yield Record(f"{name}-{number:06d}", None, [passage])

    def _json_lines(self, name: str, where: str, stream: IO[bytes]) -> Iterator[Record]:
        """Documents of a JSON Lines file. A damaged line is one damaged record."""
        number = 0
        try:
            for number, row in enumerate(decompressed(stream)):
                if not row.strip():
                    continue
                line = f"{where}, line {number + 1}"
                document = f"{name}/{number:08d}"
                try:
                    text = _text_of(row, line)
                    yield from self._document(document, words_of([text], line))
                except Damage as damage:
                    yield Record(document, None, [], damage=damage)
        except READ_ERRORS as error:
            message = f"{where}: cannot be read behind line {number + 1}: {error}"
            raise Damage(DamageKind.SHARD_TRUNCATED, message) from None


def _is_text(name: str) -> bool:
    """Whether a file may hold text, by its name; ``._NAME`` is what macOS leaves beside NAME in archives."""
    return name.lower().endswith(_SUFFIXES) and not PurePosixPath(name).name.startswith("._")


def _is_repeat(name: str, seen: set[int]) -> bool:
    """Whether the ids of a file's passages are those of an earlier one: ``a.txt`` and ``a.TXT`` are the same document.

    Remembers it in ``seen`` by 64 bits, as an archive may have millions.
    """
    document = hash(name[: -len(".txt")] + ".txt" if name.lower().endswith(".txt") else name)
    if document in seen:
        return True
    seen.add(document)
    return False


def _repeat(name: str, where: str) -> Record:
    message = f"{where}: an earlier text has the same name, up to the case of its ending"
    return Record(name, None, [], damage=Damage(DamageKind.DUPLICATE_KEY, message))


def _text_of(row: bytes, where: str) -> str:
    """The text of a line of JSON. Raises `Damage`."""
    try:
        value = json.loads(row)
    except UnicodeDecodeError as error:
        raise Damage(DamageKind.BAD_ENCODING, f"{where}: not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise Damage(DamageKind.BAD_META, f"{where}: does not parse as JSON: {error}") from None
    if not isinstance(value, dict):
        raise Damage(DamageKind.BAD_META, f"{where}: found a {type(value).__name__}, expected an object with 'text'")
    if not isinstance(value.get("text"), str):
        hint = nearest("text", value)
        found = ", ".join(map(str, value)) or "nothing"
        raise Damage(DamageKind.NO_CAPTION, f"{where}: no string under 'text'.{hint} Found: {found}")
    return value["text"]


def _decoded(stream: IO[bytes], where: str) -> Iterator[str]:
    """Decode a UTF-8 file piece by piece. Raises `Damage`."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        while data := stream.read(_PIECE):
            yield decoder.decode(data)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise Damage(DamageKind.BAD_ENCODING, f"{where}: not UTF-8: {error}") from None
    except READ_ERRORS as error:
        raise Damage(DamageKind.SHARD_TRUNCATED, f"{where}: cannot be read to its end: {error}") from None


def words_of(pieces: Iterable[str], where: str) -> Iterator[list[str] | None]:
    """Split text that comes in pieces into words, some at a time, with None where a blank line ends a paragraph.

    Raises:
        Damage: a word has no end; starts with ``where``.
    """
    rest = ""
    for piece in pieces:
        text = rest + piece
        # The last word may go on in the next piece, and so may the white space behind it.
        last = text.rstrip()
        end = len(last.rsplit(maxsplit=1)[0]) if len(last.split(maxsplit=1)) > 1 else 0
        yield from _split(text[:end])
        rest = text[end:]
        if len(rest) > _LONGEST_WORD:
            message = f"{where}: found a word of more than {_LONGEST_WORD:,} characters, expected text"
            raise Damage(DamageKind.CAPTION_TOO_LONG, message)
    yield from _split(rest)


def _split(text: str) -> Iterator[list[str] | None]:
    for number, paragraph in enumerate(_BLANK_LINE.split(text)):
        if number:
            yield None
        yield paragraph.split()
