"""The YAML of configs: numbers such as 5e-4 are read, a key given twice is an error."""

from __future__ import annotations

import re
from typing import Any

import yaml

from mmd2v.errors import UserError

__all__ = ["dump_yaml", "parse_yaml"]

_EXPONENT_FLOAT = re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")


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


def dump_yaml(value: Any) -> str:
    """Return ``value`` as text that `parse_yaml` reads, in the order of its keys."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
