"""What is wrong with a config, one line a problem: source, key path, what was found, what was expected."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from mmd2v.config.key_paths import KeyPath, origin_of, render
from mmd2v.config.schema import Config
from mmd2v.errors import UserError, nearest

__all__ = ["kind_of", "report", "shown"]


def kind_of(value: Any) -> str:
    """Return what people call the type of a value: mapping, list, text …"""
    names: dict[type, str] = {dict: "mapping", list: "list", str: "text", bool: "true/false value", int: "whole number"}
    return names.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """Return the value as an error shows it, short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def report(error: ValidationError, data: dict[str, Any], origin: Mapping[KeyPath, str], default: str) -> UserError:
    """Return the error that tells people what pydantic found."""
    lines = []
    errors = error.errors()
    for e in errors:
        # "text or list of texts" fails twice on a bad list: only the complaint about its items helps.
        deeper = any(other["loc"][: len(e["loc"]) - 1] == e["loc"][:-1] and other is not e for other in errors)
        if not (e["type"] == "string_type" and isinstance(e["input"], list) and deeper):
            lines.append(_problem(e, data, origin, default))
    if len(lines) == 1:
        return UserError(lines[0])
    return UserError(f"{len(lines)} problems in the config:\n" + "\n".join(f"  {line}" for line in lines))


def _problem(error: Any, data: dict[str, Any], origin: Mapping[KeyPath, str], default: str) -> str:
    """One line for one of pydantic's errors: source, key path, what was found, what was expected."""
    kind, context = error["type"], error.get("ctx", {})
    path = _key_path(error["loc"], data, names_key=kind in ("missing", "extra_forbidden"))
    prefix = f"{origin_of(origin, path, default)}: {render(path)}: "
    if kind == "extra_forbidden":
        valid = sorted({name for model in _models_at(Config, path[:-1], data) for name in model.model_fields})
        hint = nearest(str(path[-1]), valid) or _elsewhere(str(path[-1]))
        return f"{prefix}unknown key.{hint} Valid here: {', '.join(valid)}"
    if kind == "missing":
        models = _models_at(Config, path[:-1], data)
        texts = [m.model_fields[str(path[-1])].description for m in models if str(path[-1]) in m.model_fields]
        meaning = next((f" ({text})" for text in texts if text), "")
        return f"{prefix}missing; a value is required{meaning}"
    if kind == "union_tag_invalid":
        names = context["expected_tags"].replace("'", "").split(", ")
        hint = nearest(str(context["tag"]), names)
        return f"{prefix}kind: found {shown(context['tag'])}; expected one of {', '.join(names)}.{hint}"
    if kind == "union_tag_not_found":
        return f"{prefix}kind: missing; it says which of the kinds of this section is meant"
    if kind == "value_error":
        return prefix + str(context["error"])
    expected = error["msg"].replace("Input should be ", "expected ", 1)
    expected = re.sub(r"a valid dictionary or instance of \w+", "a mapping", expected)
    hint = (
        nearest(str(error["input"]), re.findall(r"'([^']+)'", context["expected"])) if kind == "literal_error" else ""
    )
    return f"{prefix}found {shown(error['input'])}; {expected}{'.' + hint if hint else ''}"


def _key_path(location: tuple[str | int, ...], data: Any, names_key: bool) -> KeyPath:
    """Turn pydantic's error location into a path of keys of ``data``: the tags of its unions are dropped.

    With ``names_key`` the last part of the location is a key even if ``data`` does not have it (missing keys).
    """
    path: KeyPath = ()
    inner: Any = data
    for i, part in enumerate(location):
        is_key = (isinstance(inner, dict) and part in inner) or (isinstance(inner, list) and isinstance(part, int))
        if is_key:
            inner = inner[part]
        elif not (names_key and i == len(location) - 1):
            continue  # the tag of a union
        path = (*path, part)
    return path


def _models_at(annotation: Any, path: KeyPath, data: Any) -> list[type[BaseModel]]:
    """Return the pydantic models that may stand at ``path`` (several in a union), narrowed by ``kind`` in ``data``."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        return _models_at(arguments[0], path, data)
    if origin in (typing.Union, types.UnionType):
        return [model for argument in arguments for model in _models_at(argument, path, data)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kind = annotation.model_fields.get("kind")
        tags = typing.get_args(kind.annotation) if kind and typing.get_origin(kind.annotation) is typing.Literal else ()
        if tags and isinstance(data, dict) and data.get("kind", tags[0]) not in tags:
            return []
        if not path:
            return [annotation]
        field = annotation.model_fields.get(str(path[0]))
        inner = data.get(path[0]) if isinstance(data, dict) else None
        return _models_at(field.annotation, path[1:], inner) if field else []
    if path and origin in (dict, list):
        try:
            inner = data[path[0]]
        except (KeyError, IndexError, TypeError):
            inner = None
        return _models_at(arguments[-1], path[1:], inner)
    return []


def _elsewhere(name: str) -> str:
    """Return ``" Did you mean 'optimizer.lr'?"`` for a key that a section of the top level has, or nothing."""
    for section in Config.model_fields:
        for model in _models_at(Config, (section,), {}):
            if name in model.model_fields:
                return f" Did you mean '{section}.{name}'?"
    return ""
