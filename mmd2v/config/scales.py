"""One config at several sizes: what `--scale NAME` changes.

A config (or one of its bases) may say

    scales:
      mini: {file: ../scales/mini.yaml, set: {model.layers.0.count: 2}}

``file`` is relative to the file that names it and holds a mapping of dotted keys; ``set`` is such a mapping, applied
after it. Each value replaces what the config says at its key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmd2v.errors import UserError, unknown_name

SCALES_KEY = "scales"
_PARTS = ("file", "set")
_LENGTHS = ("steps", "epochs")


def scale_settings(
    scales: Any,
    name: str,
    read_file: Callable[[Path, str], dict[str, Any]],
    named_in: Callable[[str], str],
    asked_by: str,
) -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, value, where it is said) of scale ``name``, in the order they are to be applied.

    ``scales`` is the config's section, ``read_file(path, named by)`` reads a YAML file, ``named_in(key)`` gives the
    file that says ``scales.KEY``, and ``asked_by`` says in errors who asks. Raises UserError for a scale that is not
    there, is no such mapping, or says the length of a run in two ways.
    """
    if not isinstance(scales, Mapping):
        raise UserError(f"{named_in(name)}: {SCALES_KEY}: found {scales!r}; expected a mapping of names to scales")
    if name not in scales:
        raise unknown_name(asked_by, name, map(str, scales))
    scale = scales[name]
    where = f"{named_in(name)}: {SCALES_KEY}.{name}"
    if not isinstance(scale, Mapping):
        raise UserError(f"{where}: found {scale!r}; expected a mapping of {' and '.join(_PARTS)}")
    for key in scale:
        if key not in _PARTS:
            raise unknown_name(where, str(key), _PARTS)
    if "file" in scale:
        source = named_in(f"{name}.file")
        path = Path(source).parent / str(scale["file"])
        settings = read_file(path, f"{source}: {SCALES_KEY}.{name}.file")
        check_length(settings, str(path))
        for key, value in settings.items():
            yield str(key), value, str(path)
    own = scale.get("set") or {}
    if not isinstance(own, Mapping):
        raise UserError(f"{where}.set: found {own!r}; expected a mapping of dotted keys to values")
    said_in = dict.fromkeys(named_in(f"{name}.set.{key}") for key in _LENGTHS)  # several files of a chain, perhaps
    check_length(own, f"{' and '.join(said_in)}: {SCALES_KEY}.{name}.set")
    for key, value in own.items():
        yield str(key), value, f"{named_in(f'{name}.set.{key}')}: {SCALES_KEY}.{name}.set"


def check_length(settings: Mapping[str, Any], where: str) -> None:
    """Raise a UserError, beginning with ``where``, if one mapping says the length of a run in two ways."""
    found = [f"{key}: {settings[key]}" for key in _LENGTHS if settings.get(key) is not None]
    if len(found) > 1:
        raise UserError(f"{where}: found {' and '.join(found)}; expected one of the two (null takes the other away)")
