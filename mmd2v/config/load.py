"""From YAML files, command-line overrides and environment variables to one checked `Config`, and back to YAML."""

from __future__ import annotations

import copy
import difflib
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mmd2v.config.scales import SCALES_KEY, check_length, scale_settings
from mmd2v.config.schema import Config
from mmd2v.config.secrets import without_secrets
from mmd2v.errors import UserError, nearest

KeyPath = tuple[str | int, ...]

BASE_KEY = "base"
_VARIABLE = re.compile(r"\$(?P<escaped>\$\{)|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")
_EXPONENT_FLOAT = re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")


# ----------------------------------------------------------------------------------------- YAML dialect


class _Loader(yaml.SafeLoader):
    """YAML with two repairs: ``5e-4`` is a number (YAML 1.1 wants ``5.0e-4``), a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build the dictionary; raise `yaml.constructor.ConstructorError` at a key given twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key '{key.value}' is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: strings that would look like its numbers are quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values out instead of as anchors, which people do not read."""
        return True


for _dialect in (_Loader, _Dumper):
    _dialect.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, source: str) -> Any:
    """Parse ``text``; raise UserError naming ``source``, line and column when it is no YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source}{where}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # control characters; impossible dates
        raise UserError(f"{source}: not valid YAML: {error}") from None


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
        raise UserError(f"{path}: found a {_kind(value)} at the top; expected a mapping of config keys")
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
            raise UserError(f"{path}: base: found a {_kind(base)}; expected one path, relative to this file")
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
        _set_origin(origin, here, source)


def _set_origin(origin: dict[KeyPath, str], at: KeyPath, source: str) -> None:
    for path in [p for p in origin if p[: len(at)] == at]:
        del origin[path]
    origin[at] = source


def _origin_of(origin: Mapping[KeyPath, str], path: KeyPath, default: str) -> str:
    for length in range(len(path), 0, -1):
        if path[:length] in origin:
            return origin[path[:length]]
    return default


# -------------------------------------------------------------------------------------------- overrides


def split_overrides(argv: Sequence[str], own_flags: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """Part a command line into (arguments of the command itself, overrides of config fields).

    ``own_flags`` maps the command's own flags to whether a value follows; any other ``--key`` is an override.
    """
    own: list[str] = []
    overrides: list[str] = []
    i = 0
    while i < len(argv):
        flag, equals, _ = argv[i].partition("=")
        is_own = flag.replace("_", "-") in own_flags
        slip = [] if is_own else difflib.get_close_matches(flag, own_flags, n=1, cutoff=0.8)
        if slip and "." not in flag:  # no field of the config resembles one of these flags
            raise UserError(f"{flag}: no such flag. Did you mean '{slip[0]}'?")
        takes_value = own_flags.get(flag.replace("_", "-"), True) and not equals
        target = own if is_own or not flag.startswith("--") else overrides
        target.append(argv[i])
        if flag.startswith("--") and takes_value and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            i += 1
            target.append(argv[i])
        i += 1
    return own, overrides


def _pairs(overrides: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Yield (``--a.b``, raw value) of ``--a.b value`` and ``--a.b=value``."""
    i = 0
    while i < len(overrides):
        flag, equals, value = overrides[i].partition("=")
        if not flag.startswith("--") or flag == "--":
            raise UserError(f"'{overrides[i]}': expected an override such as --engine.batch_size 64")
        if not equals:
            i += 1
            if i == len(overrides) or overrides[i].startswith("--"):
                raise UserError(f"{flag}: a value is missing; write {flag} VALUE or {flag}=VALUE")
            value = overrides[i]
        yield flag, value
        i += 1


def _assign(data: dict[str, Any], flag: str, value: Any, origin: dict[KeyPath, str], source: str) -> KeyPath:
    """Set the dotted key ``flag`` of ``data``, as ``source`` (a file's key, or the flag itself) says; return its path.

    Raises UserError for a key that leads into a value or past a list.
    """
    where = flag if source == flag else f"{source}: {flag}"
    keys = flag.removeprefix("--").split(".")
    container: Any = data
    path: KeyPath = ()
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        if isinstance(container, list):
            if not key.isdecimal() or int(key) >= len(container):
                have = f"0 to {len(container) - 1}" if container else "none, it is empty"
                raise UserError(f"{where}: '{key}' is no item of the list '{_render(path)}'; it has {have}")
            index: str | int = int(key)
        elif isinstance(container, dict):
            index = key
        else:
            raise UserError(f"{where}: '{_render(path)}' is the value {_shown(container)}, it has no key '{key}'")
        path = (*path, index)
        if last:
            container[index] = value
            _set_origin(origin, path, source)
            return path
        if isinstance(container, dict) and container.get(index) is None:
            container[index] = {}
            _set_origin(origin, path, source)
        container = container[index]
    raise AssertionError("a flag has at least one key")


# ------------------------------------------------------------------------------------------ environment


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


def _map_strings(value: Any, function: Any, path: KeyPath = ()) -> Any:
    if isinstance(value, str):
        return function(value, path)
    if isinstance(value, dict):
        return {key: _map_strings(item, function, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, function, (*path, i)) for i, item in enumerate(value)]
    return value


# ----------------------------------------------------------------------------------------------- errors


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "mapping", list: "list", str: "text", bool: "true/false value", int: "whole number"}
    return names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _render(path: KeyPath) -> str:
    return ".".join(str(p) for p in path) or "the config"


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


def _problem(error: Any, data: dict[str, Any], origin: Mapping[KeyPath, str], default: str) -> str:
    """One line for one of pydantic's errors: source, key path, what was found, what was expected."""
    kind, context = error["type"], error.get("ctx", {})
    path = _key_path(error["loc"], data, names_key=kind in ("missing", "extra_forbidden"))
    prefix = f"{_origin_of(origin, path, default)}: {_render(path)}: "
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
        return f"{prefix}kind: found {_shown(context['tag'])}; expected one of {', '.join(names)}.{hint}"
    if kind == "union_tag_not_found":
        return f"{prefix}kind: missing; it says which of the kinds of this section is meant"
    if kind == "value_error":
        return prefix + str(context["error"])
    expected = error["msg"].replace("Input should be ", "expected ", 1)
    expected = re.sub(r"a valid dictionary or instance of \w+", "a mapping", expected)
    hint = (
        nearest(str(error["input"]), re.findall(r"'([^']+)'", context["expected"])) if kind == "literal_error" else ""
    )
    return f"{prefix}found {_shown(error['input'])}; {expected}{'.' + hint if hint else ''}"


def _report(error: ValidationError, data: dict[str, Any], origin: Mapping[KeyPath, str], default: str) -> UserError:
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
    for flag, raw in _pairs(overrides):
        raw_values[_assign(data, flag, parse_yaml(raw, flag), origin, flag)] = raw
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if (given,) in raw_values and (other,) not in raw_values:
            data.pop(other, None)  # the command line says how long the run is, whichever way the file does

    default = str(path)

    def expand(text: str, at: KeyPath) -> str:
        return expand_variables(text, f"{_origin_of(origin, at, default)}: {_render(at)}", variables)

    data = _map_strings(data, expand)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        # `--name 2024` reads as a number in YAML, and the field wants text: take what was typed.
        texts = {e["loc"] for e in error.errors() if e["type"] == "string_type"} & set(raw_values)
        if not texts:
            raise _report(error, data, origin, default) from None
    for at in texts:
        container: Any = data
        for key in at[:-1]:
            container = container[key]
        container[at[-1]] = expand(raw_values[at], at)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise _report(error, data, origin, default) from None


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
        return _origin_of(origin, where, path)

    for key, value, source in scale_settings(scales, scale, read_yaml_file, named_in, asked_by):
        _set_value(data, key, value, origin, source)


def _set_value(data: dict[str, Any], key: str, value: Any, origin: dict[KeyPath, str], source: str) -> None:
    """Set a dotted key; the length of a run that is given one way replaces the other way."""
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if key == given and value is not None:
            data.pop(other, None)
    _assign(data, key, value, origin, source)


def dump_config(config: Config) -> str:
    """Return ``config`` as YAML with every field, such that `load_config` of it gives an equal config.

    But for its secrets, which stand there as placeholders: see `mmd2v.config.secrets`.
    """
    plain = _map_strings(without_secrets(config.model_dump()), lambda text, _: text.replace("${", "$${"))
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
