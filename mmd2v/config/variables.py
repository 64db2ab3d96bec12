"""``${VAR}`` in the strings of a config, from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from mmd2v.config.key_paths import KeyPath
from mmd2v.errors import UserError, nearest

__all__ = ["expand_variables", "map_strings"]

_VARIABLE = re.compile(r"\$(?P<escaped>\$\{)|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")


def expand_variables(text: str, where: str, variables: Mapping[str, str] | None = None) -> str:
    """Replace ``${VAR}`` and ``${VAR:-default}`` from ``variables`` or the environment; ``$${`` is a literal ``${``.

    Raises UserError, beginning with ``where``, for a variable that is neither.
    """

    def replacement(match: re.Match[str]) -> str:
        if match["escaped"]:
            return "${"
        value = (variables or {}).get(match["name"], os.environ.get(match["name"]))
        if value is None:
            value = match["default"]
        if value is None:
            hint = nearest(match["name"], os.environ)
            raise UserError(
                f"{where}: environment variable '{match['name']}' is not set; "
                f"export it or write ${{{match['name']}:-default}}.{hint}"
            )
        return value

    return _VARIABLE.sub(replacement, text)


def map_strings(value: Any, function: Any, path: KeyPath = ()) -> Any:
    """Return ``value`` with each of its strings replaced by ``function(string, path of its key)``."""
    if isinstance(value, str):
        return function(value, path)
    if isinstance(value, dict):
        return {key: map_strings(item, function, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, function, (*path, i)) for i, item in enumerate(value)]
    return value
