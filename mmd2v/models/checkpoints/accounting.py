"""Strict accounting of a checkpoint's keys: each is taken, or left out on purpose, or an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmd2v.errors import UserError, nearest
from mmd2v.models.checkpoints.inert import shown

_MOST_NAMED = 3  # keys in one message
_DIGITS = r"([0-9]{1,4})\."


class Wanted(NamedTuple):
    """A tensor of ours."""

    name: str
    shape: tuple[int, ...]


def payload_of(content: Any, path: Path) -> dict[str, Any]:
    """Return the state dict under ``model``. Raises UserError when there is none."""
    payload = content.get("model") if isinstance(content, dict) else None
    if not isinstance(payload, dict) or not all(isinstance(key, str) for key in payload):
        found = sorted(shown(key) for key in content)[:10] if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: found {found}, expected a dict whose key 'model' holds the weights by name")
    return payload


def take(
    payload: Mapping[str, Any], wanted: Mapping[str, Wanted], ignored: Sequence[str], path: Path
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Return the wanted tensors by our names, fp32, and how many keys each pattern of ``ignored`` left out.

    Raises UserError naming the keys when one is missing or unexpected, has another shape, or holds no finite numbers.
    """
    left_out = dict.fromkeys(ignored, 0)
    unexpected = []
    for key in payload.keys() - wanted.keys():
        pattern = next((pattern for pattern in ignored if fnmatchcase(key, pattern)), None)
        if pattern is None:
            unexpected.append(key)
        else:
            left_out[pattern] += 1
    missing = sorted(wanted.keys() - payload.keys())
    complaints = [_complaint("missing", missing, unexpected), _complaint("unexpected", sorted(unexpected), wanted)]
    if missing or unexpected:
        raise UserError(f"{path}: {'; '.join(filter(None, complaints))}")
    state = {ours.name: _values(payload[key], key, ours.shape, path) for key, ours in wanted.items()}
    return state, {pattern: count for pattern, count in left_out.items() if count}


def shape_of(payload: Mapping[str, Any], key: str, dimensions: int, path: Path) -> tuple[int, ...]:
    """Return the shape under ``key``. Raises UserError when there is no tensor of so many dimensions."""
    if key not in payload:
        raise UserError(f"{path}: {_complaint('missing', [key], payload)}")
    value = payload[key]
    if not isinstance(value, torch.Tensor) or value.ndim != dimensions or not value.numel():
        raise UserError(f"{path}: '{key}' is {_kind(value)}, expected a tensor of {dimensions} dimensions")
    return tuple(value.shape)


def count_blocks(payload: Iterable[str], prefix: str, path: Path) -> int:
    """Return how many blocks ``PREFIX0.``, ``PREFIX1.`` … there are. Raises UserError when one of them is missing."""
    pattern = re.compile(re.escape(prefix) + _DIGITS)
    found = {int(match[1]) for match in map(pattern.match, payload) if match}
    for index in range(len(found)):
        if index not in found:
            raise UserError(f"{path}: no key begins with '{prefix}{index}.', but one with '{prefix}{max(found)}.' does")
    return len(found)


def _complaint(what: str, keys: Sequence[str], others: Iterable[str]) -> str:
    if not keys:
        return ""
    named = ", ".join(f"'{shown(key)}'" for key in keys[:_MOST_NAMED])
    more = f" and {len(keys) - _MOST_NAMED} more" if len(keys) > _MOST_NAMED else ""
    return f"{len(keys)} {'key' if len(keys) == 1 else 'keys'} {what}: {named}{more}.{shown(nearest(keys[0], others))}"


def _values(value: Any, key: str, shape: tuple[int, ...], path: Path) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or tuple(value.shape) != shape:
        raise UserError(f"{path}: '{key}' is {_kind(value)}, expected floating-point numbers of shape {shape}")
    value = value.float().contiguous().clone()  # tensors may share one storage, which safetensors refuses
    if not value.isfinite().all():
        raise UserError(f"{path}: '{key}' holds a number that is not finite")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
