"""What a config may hold that belongs in no file: values of storage options, signatures of addresses.

A run's ``config.yaml`` is read again (by export, by a resumed run, by people), so a secret is written as a placeholder
that says whether it has changed. Reading one is no error; using one is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from mmd2v.data.addresses import display
from mmd2v.errors import UserError

_PLACEHOLDER = re.compile(r"<hidden, sha256 [0-9a-f]{8}…>")
_SIGNATURE = "?…"  # what `display` writes for a signed link's query


def without_secrets(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config, as plain values, with placeholders for its secrets; those that are there already stay.

    Values of unexpected types are kept: a config of another version may be given.
    """
    data = dict(config["data"]) if isinstance(config.get("data"), dict) else {}
    source = data.get("source")
    if isinstance(source, dict) and "storage_options" in source:
        data["source"] = {**source, "storage_options": _hidden(source["storage_options"])}
    train = data.get("train")
    if isinstance(train, dict):
        data["train"] = _shown(train)
        if isinstance(train.get("sets"), dict):
            data["train"]["sets"] = {name: _shown(one) for name, one in train["sets"].items()}
    data["eval"] = _shown(data.get("eval"))
    return {**config, "data": {**config["data"], **data}} if data and isinstance(config.get("data"), dict) else config


def check_options(options: Mapping[str, Any], key: str) -> None:
    """Raise a UserError where a storage option is a placeholder; ``key`` is the config's key of the options."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            check_options(value, f"{key}.{name}")
        elif isinstance(value, str) and _PLACEHOLDER.fullmatch(value):
            raise UserError(
                f"{key}.{name}: found {value}, which stands for a value that is kept out of a run's config.yaml; "
                f"give it again, for example --{key}.{name} '${{VARIABLE}}'"
            )


def check_address(address: str) -> None:
    """Raise a UserError where an address has lost its signature."""
    if address.endswith(_SIGNATURE):
        raise UserError(
            f"shards: found {address}, a signed link whose signature is kept out of a run's config.yaml; "
            "give the whole link again"
        )


def _hidden(value: Any) -> Any:
    """Placeholders for all that may be a secret: a switch is none."""
    if isinstance(value, dict):
        return {key: _hidden(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(item) for item in value]
    if value is None or isinstance(value, bool) or (isinstance(value, str) and _PLACEHOLDER.fullmatch(value)):
        return value
    # Eight digits tell a change, and leave a weak password more than one candidate.
    digest = hashlib.sha256(json.dumps(value, default=str).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"<hidden, sha256 {digest}…>"


def _shown(one: Any) -> Any:
    """A data set's keys, with its addresses as they may be shown."""
    if not isinstance(one, dict):
        return one
    shards = one.get("shards")
    if isinstance(shards, str):
        return {**one, "shards": _address(shards)}
    if isinstance(shards, list | tuple):
        return {**one, "shards": [_address(item) if isinstance(item, str) else item for item in shards]}
    return dict(one)


def _address(address: str) -> str:
    return address if address.endswith(_SIGNATURE) else display(address)
