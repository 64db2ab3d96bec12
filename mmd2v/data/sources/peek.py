"""A first look at a source, by which its format is told; what was read for it is not read again."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from mmd2v.data.tar_members import TAR_ERRORS
from mmd2v.errors import UserError

_CHUNK = 1 << 20  # characters read at once
_SPACE = " \t\n\r"


class Peek:
    """A file or folder, looked at once.

    Attributes:
        path: where it is; it exists.
        suffix: of a file, in lower case with its dot, ``.jsonl.gz`` and the like whole; ``""`` of a folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
        packed = len(suffixes) == 2 and suffixes[0] in (".tar", ".jsonl", ".txt")
        self.suffix = "" if path.is_dir() else "".join(suffixes if packed else suffixes[-1:])

    @cached_property
    def content(self) -> Any:
        """The whole of a ``.json``; None of anything else. Raises UserError: it does not parse."""
        if self.suffix != ".json":
            return None
        try:
            with open(self.path, encoding="utf-8-sig") as handle:
                return json.load(handle)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: cannot be read as JSON: {error}") from None

    @cached_property
    def first_item(self) -> Any:
        """The first item of a ``.json`` that is a list; None of anything else."""
        if self.suffix != ".json":
            return None
        try:
            return next(json_items(self.path), None)
        except UserError:  # no list, or damaged: whoever reads it says so
            return None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names in a folder, sorted, not of its subfolders; of a ``.tar``, those of its first members."""
        if self.path.is_dir():
            return tuple(sorted(os.listdir(self.path)))
        if self.suffix != ".tar":
            return ()
        names = []
        with suppress(*TAR_ERRORS, OSError), tarfile.open(self.path, "r:") as tar:
            for member in islice(tar, 20):
                if member.isfile():
                    names.append(member.name)
        return tuple(names)

    def tree(self) -> Iterator[str]:
        """Yield the names of all files of a folder and its subfolders, in no particular order."""
        for _, _, files in os.walk(self.path):
            yield from files


def json_items(path: Path) -> Iterator[Any]:
    """Yield the items of a JSON file that is one list, holding one of them and a megabyte of text at a time.

    Raises:
        UserError: it is no list, or does not parse; names the item.
    """
    decoder = json.JSONDecoder()
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as handle:
            text = handle.read(_CHUNK).lstrip(_SPACE)
            if not text.startswith("["):
                raise UserError(f"{path}: found a JSON value that is no list, expected a list")
            text, at = text[1:], 0
            first = True
            while True:
                text, at = _skip_space(handle, text, at)
                if text[at : at + 1] == "]":
                    text, at = _skip_space(handle, text, at + 1)
                    if at < len(text):
                        raise UserError(f"{path}: found more behind the end of the list")
                    return
                if not first:
                    if text[at : at + 1] != ",":
                        raise UserError(f"{path}: item {number} is not followed by ',' or ']': incomplete copy?")
                    text, at = _skip_space(handle, text, at + 1)
                while True:
                    try:
                        item, end = decoder.raw_decode(text, at)
                        # A number or a literal at the end of what was read may go on behind it.
                        if end < len(text):
                            break
                        reason = "it ends inside the item"
                    except (ValueError, RecursionError) as error:
                        reason = str(error)
                    # Each time twice as much: an item of any length costs linear time.
                    more = handle.read(max(_CHUNK, len(text) - at))
                    if not more:
                        raise UserError(f"{path}: item {number} does not parse as JSON: {reason}")
                    text, at = text[at:] + more, 0
                yield item
                at, first, number = end, False, number + 1
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None


def _skip_space(handle: Any, text: str, at: int) -> tuple[str, int]:
    """Move to the next character that is no white space, reading on as needed; at the end, ``at == len(text)``."""
    while True:
        while at < len(text) and text[at] in _SPACE:
            at += 1
        if at < len(text):
            return text, at
        text, at = handle.read(_CHUNK), 0
        if not text:
            return text, 0
