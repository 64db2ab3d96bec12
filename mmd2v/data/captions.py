"""Captions as they lie beside an image: checked, and complained about by the name of their sample."""

from __future__ import annotations

import json
from typing import Any

from mmd2v.data.damage import Damage, DamageKind


def parse_meta(data: bytes, where: str) -> dict[str, Any]:
    """Decode a sample's JSON object, or raise a `Damage` that starts with ``where``."""
    try:
        meta = json.loads(data)
    except UnicodeDecodeError as error:
        raise Damage(DamageKind.BAD_ENCODING, f"{where}: its .json is not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise Damage(DamageKind.BAD_META, f"{where}: its .json does not parse: {error}") from None
    if not isinstance(meta, dict):
        raise Damage(DamageKind.BAD_META, f"{where}: its .json holds a {type(meta).__name__}, expected an object")
    return meta


def meta_captions(meta: dict[str, Any], where: str) -> tuple[str, ...]:
    """Take the captions out of a sample's JSON object (``captions``: a list, or ``caption``: a list or one string)."""
    captions = meta.get("captions", meta.get("caption"))
    if captions is None:
        found = f"its .json has neither 'captions' nor 'caption', found {sorted(meta)}"
        raise Damage(DamageKind.NO_CAPTION, f"{where}: {found}")
    return check_captions([captions] if isinstance(captions, str) else captions, where)


def text_captions(data: bytes, where: str) -> tuple[str, ...]:
    """Split a caption file: every line that is not blank is a caption."""
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise Damage(DamageKind.BAD_ENCODING, f"{where}: its captions are not UTF-8: {error}") from None
    return check_captions([line for line in lines if line.strip()], where)


def check_captions(captions: Any, where: str) -> tuple[str, ...]:
    """Return the captions without surrounding white space.

    Raises:
        Damage: not a list, no caption at all, or one that is empty or no string; starts with ``where``.
    """
    if not isinstance(captions, (list, tuple)):
        found = f"found captions of type {type(captions).__name__}"
        raise Damage(DamageKind.BAD_META, f"{where}: {found}, expected a list of strings")
    if not captions:
        raise Damage(DamageKind.NO_CAPTION, f"{where}: no caption, expected at least one")
    for number, caption in enumerate(captions):
        if not isinstance(caption, str):
            found = f"caption {number} is a {type(caption).__name__}"
            raise Damage(DamageKind.BAD_META, f"{where}: {found}, expected a string")
        if not caption.strip():
            raise Damage(DamageKind.NO_CAPTION, f"{where}: caption {number} is empty")
        if not _is_unicode(caption):
            found = f"caption {number} holds half a character (a lone surrogate)"
            raise Damage(DamageKind.BAD_ENCODING, f"{where}: {found}")
    return tuple(caption.strip() for caption in captions)


def _is_unicode(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8: JSON's escapes can name halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
