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


def scale_settings(
    scales: Any, name: str, read_file: Callable[[Path, str], dict[str, Any]], named_in: Callable[[str], str]
) -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, value, where it is said) of scale ``name``, in the order they are to be applied.

    ``scales`` is the config's section, ``read_file(path, named by)`` reads a YAML file, and ``named_in(key)`` gives the
    file that says ``scales.KEY``. Raises UserError for a scale that is not there or is no such mapping.
    """
    if not isinstance(scales, Mapping) or name not in scales:
        raise unknown_name("--scale", name, scales if isinstance(scales, Mapping) else [])
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
        for key, value in read_file(path, f"{source}: {SCALES_KEY}.{name}.file").items():
            yield str(key), value, str(path)
    own = scale.get("set") or {}
    if not isinstance(own, Mapping):
        raise UserError(f"{where}.set: found {own!r}; expected a mapping of dotted keys to values")
    for key, value in own.items():
        yield str(key), value, named_in(f"{name}.set.{key}")
