"""``annotation.json`` of a teacher's stored outputs: the settings behind them, their shapes, sets and shards.

Shapes: D the teacher's width, c captions an image, T tokens of width E, R samples of a shard.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from mmd2v.errors import UserError
from mmd2v.files import write_text

RECORD_NAME = "annotation.json"
StoredDtype = Literal["fp32", "fp16", "bf16"]

_FORMAT = 1


@dataclass(frozen=True)
class Annotation:
    """What ``annotation.json`` of a teacher's folder says."""

    settings: dict[str, Any]
    """Name → value, of all that decides the outputs."""
    width: int
    """D"""
    captions: int | None
    """c of a text teacher; None: of images."""
    tokens: tuple[int, ...] | None
    """(T, E) of a sample's tokens; None: not stored."""
    dtype: StoredDtype
    sets: dict[str, SetRecord] = field(default_factory=dict)
    """Name of a data set (empty: the only one) → what of it is stored."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings and of the form of the outputs, in hexadecimal."""
        form = [self.settings, self.width, self.captions, self.tokens, self.dtype]
        return hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()

    @property
    def form(self) -> dict[str, Any]:
        """Name → value, of what the outputs look like."""
        return {"width": self.width, "tokens": self.tokens, "dtype": self.dtype}

    @property
    def cls_shape(self) -> tuple[int, ...]:
        """Shape of one sample's CLS: (D,) or (c, D)."""
        return (self.width,) if self.captions is None else (self.captions, self.width)


@dataclass(frozen=True)
class SetRecord:
    """What is stored of a data set once the command that writes it has finished; until then, only its files tell."""

    epochs: int
    """Epochs of which something is stored; the last may be stored in part."""
    shards: dict[str, int]
    """Name of a shard's files, without suffix → its samples, R."""


def teacher_folder(folder: str | Path, teacher: str) -> Path:
    """Where the outputs of a teacher lie in the folder of all."""
    return Path(folder) / quote(teacher, safe="")


def read_record(folder: Path) -> Annotation | None:
    """Read a teacher's ``annotation.json``; None when there is none.

    Raises:
        UserError: it is damaged or of another format.
    """
    path = folder / RECORD_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    found = values.get("format") if isinstance(values, dict) else None
    if found != _FORMAT:
        raise UserError(f"{path}: found format {found!r}, this version reads {_FORMAT}; annotate into another folder")
    try:
        return Annotation(
            settings=dict(values["settings"]),
            width=values["width"],
            captions=values["captions"],
            tokens=None if values["tokens"] is None else tuple(values["tokens"]),
            dtype=values["dtype"],
            sets={name: SetRecord(**record) for name, record in values["sets"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a record of stored outputs: {error!r}") from None


def write_record(folder: Path, annotation: Annotation, version: str) -> None:
    """Write a teacher's ``annotation.json``; ``version`` is mmd2v's, for people."""
    values = {
        "format": _FORMAT,
        "mmd2v": version,
        "fingerprint": annotation.fingerprint,
        **asdict(annotation),
    }
    write_text(folder / RECORD_NAME, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
