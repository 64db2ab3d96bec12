"""From YAML files, command-line overrides and environment variables to one checked `Config`, and back to YAML."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmd2v.config.key_paths import KeyPath, origin_of, render, set_origin
from mmd2v.config.overrides import assign, pairs_of
from mmd2v.config.problems import kind_of, report
from mmd2v.config.scales import SCALES_KEY, check_length, scale_settings
from mmd2v.config.schema import Config
from mmd2v.config.secrets import without_secrets
from mmd2v.config.variables import expand_variables, map_strings
from mmd2v.config.yaml_dialect import dump_yaml, parse_yaml
from mmd2v.errors import UserError, nearest

__all__ = ["dump_config", "load_config", "read_yaml_file"]

BASE_KEY = "base"


# ------------------------------------------------------------------------------------------------ files


def read_yaml_file(path: Path, named_by: str) -> dict[str, Any]:
    """Return the mapping a YAML file holds; ``named_by`` says in errors who named it. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"{named_by}: config file '{path}' does not exist.{nearest(path.name, siblings)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{named_by}: cannot read config file '{path}': {error.strerror}") from None
    value = parse_yaml(text, str(path))
    if value is None:
        raise UserError(f"{path}: the file is empty; expected a mapping of config keys")
    if not isinstance(value, dict):
        raise UserError(f"{path}: found a {kind_of(value)} at the top; expected a mapping of config keys")
    return value


def _read_chain(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read ``path`` and the files its ``base`` keys name; root of the chain first."""
    chain: list[tuple[str, dict[str, Any]]] = []
    visited: list[Path] = []
    named_by = "command line"
    while True:
        resolved = path.resolve()
        if resolved in visited:
            names = " → ".join(str(p) for p in [*visited[visited.index(resolved) :], resolved])
            raise UserError(f"{named_by}: `base` goes in a circle: {names}")
        visited.append(resolved)
        value = read_yaml_file(path, named_by)
        base = value.pop(BASE_KEY, None)
        chain.append((str(path), value))
        if base is None:
            return chain[::-1]
        if not isinstance(base, str):
            raise UserError(f"{path}: base: found a {kind_of(base)}; expected one path, relative to this file")
        named_by = f"{path}: base"
        path = path.parent / expand_variables(base, named_by)


def _merge(into: dict[str, Any], new: Mapping[str, Any], source: str, origin: dict[KeyPath, str], at: KeyPath) -> None:
    """Merge ``new`` deeply into ``into``: dictionaries merge, everything else replaces.

    A dictionary whose ``kind`` differs replaces as well: the keys of another kind would not be valid in it. null in a
    dictionary's place takes it away.
    """
    for key, value in new.items():
        here = (*at, key)
        old = into.get(key)
        if isinstance(old, dict) and value is None:
            del into[key]
            continue
        if isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            _merge(old, value, source, origin, here)
            continue
        into[key] = copy.deepcopy(value)
        set_origin(origin, here, source)


# ------------------------------------------------------------------------------------------- public API


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    scale: str | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    variables: Mapping[str, str] | None = None,
    scale_key: str = "--scale",
    settings_key: str = "settings",
) -> Config:
    """Read a run's description.

    ``path`` is a YAML file; its one ``base:`` key may name another file (relative to it) that is read first.
    Dictionaries merge deeply, lists replace. ``overrides`` are ``--a.b value`` or ``--a.b=value``, values in YAML.
    ``${VAR}`` and ``${VAR:-default}`` in strings come from ``variables`` or the environment. ``scale`` names one of the
    config's `scales`; it comes after the files, then ``settings`` (dotted key → value), then the overrides.
    ``scale_key`` and ``settings_key`` say in errors who gave these two.

    Raises UserError with one line a problem: file or flag, key path, what was found, what was expected.
    """
    chain = _read_chain(Path(path))
    data: dict[str, Any] = {}
    origin: dict[KeyPath, str] = {}
    for source, values in chain:
        _merge(data, values, source, origin, ())
    _apply_scale(data, origin, scale, str(path), scale_key)
    check_length(settings or {}, settings_key)
    for key, value in (settings or {}).items():
        _set_value(data, key, value, origin, settings_key)
    raw_values: dict[KeyPath, str] = {}
    for flag, raw in pairs_of(overrides):
        raw_values[assign(data, flag, parse_yaml(raw, flag), origin, flag)] = raw
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if (given,) in raw_values and (other,) not in raw_values:
            data.pop(other, None)  # the command line says how long the run is, whichever way the file does

    default = str(path)

    def expand(text: str, at: KeyPath) -> str:
        return expand_variables(text, f"{origin_of(origin, at, default)}: {render(at)}", variables)

    data = map_strings(data, expand)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        # `--name 2024` reads as a number in YAML, and the field wants text: take what was typed.
        texts = {e["loc"] for e in error.errors() if e["type"] == "string_type"} & set(raw_values)
        if not texts:
            raise report(error, data, origin, default) from None
    for at in texts:
        container: Any = data
        for key in at[:-1]:
            container = container[key]
        container[at[-1]] = expand(raw_values[at], at)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise report(error, data, origin, default) from None


def _apply_scale(data: dict[str, Any], origin: dict[KeyPath, str], scale: str | None, path: str, asked_by: str) -> None:
    """Take the section `scales` out of ``data``, and apply the one that was asked for."""
    scales = data.pop(SCALES_KEY, None)
    if scale is None:
        return
    if not scales:
        raise UserError(f"{asked_by}: found '{scale}', but {path} has no `{SCALES_KEY}`; it is of one size")

    def named_in(key: str) -> str:
        first, _, rest = key.partition(".")
        where: KeyPath = (SCALES_KEY, first, *rest.split(".", 1))
        return origin_of(origin, where, path)

    for key, value, source in scale_settings(scales, scale, read_yaml_file, named_in, asked_by):
        _set_value(data, key, value, origin, source)


def _set_value(data: dict[str, Any], key: str, value: Any, origin: dict[KeyPath, str], source: str) -> None:
    """Set a dotted key; the length of a run that is given one way replaces the other way."""
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if key == given and value is not None:
            data.pop(other, None)
    assign(data, key, value, origin, source)


def dump_config(config: Config) -> str:
    """Return ``config`` as YAML with every field, such that `load_config` of it gives an equal config.

    But for its secrets, which stand there as placeholders: see `mmd2v.config.secrets`.
    """
    plain = map_strings(without_secrets(config.model_dump()), lambda text, _: text.replace("${", "$${"))
    return dump_yaml(plain)
