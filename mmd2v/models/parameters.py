"""What the names of parameters say: which part they belong to, which of them are not decayed, which are frozen."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from mmd2v.errors import UserError, nearest

_NOT_DECAYED = {
    *("cls_token", "reg_token", "dist_token", "mask_token", "positions", "pos_embed"),
    "relative_position_bias_table",
}


def no_decay(name: str, parameter: torch.Tensor) -> bool:
    """Tell whether weight decay leaves the parameter alone: 1-D, CLS, position and token embeddings.

    ``parameter`` may be a ZeRO-3 stub; its full shape is then under ``ds_shape``.
    """
    shape = getattr(parameter, "ds_shape", parameter.shape)
    parts = name.split(".")
    is_table = len(shape) == 2 and len(parts) > 1 and parts[-2].endswith(("embedding", "embeddings"))
    return len(shape) <= 1 or is_table or not _NOT_DECAYED.isdisjoint(parts)


def part(name: str) -> str:
    """Return the part of the student a parameter counts for, such as ``encoders.image`` or ``layers``."""
    name = name.removeprefix("student.")
    words = name.split(".")
    return ".".join(words[:2]) if words[0] in ("encoders", "objectives") else words[0]


def freeze(module: nn.Module, patterns: Iterable[str], where: str) -> None:
    """Fix every parameter whose name matches a wildcard. Raises UserError for a wildcard that matches none."""
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        matched = [parameter for name, parameter in module.named_parameters() if fnmatchcase(name, pattern)]
        if not matched:
            raise no_match(where, pattern, names)
        for parameter in matched:
            parameter.requires_grad_(False)


def no_match(where: str, pattern: str, names: Iterable[str]) -> UserError:
    """Build the error for a wildcard that matches no parameter name."""
    names = list(names)
    # The nearest name is looked for without the wildcard, which resembles nothing.
    hint = nearest(re.sub(r"[*?]", "", pattern), names)
    return UserError(f"{where}: '{pattern}' matches no parameter.{hint} First names: {', '.join(names[:4])}, …")
