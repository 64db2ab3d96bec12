"""Which implementation of an operator runs, and why.

``reference`` is plain torch, one line a formula. ``segmented`` is torch's own matrix products on contiguous slices with
as few passes and saved tensors as can be. ``triton`` are the kernels of this package. All give the same result up to
rounding. What runs is chosen by device, dtype and shape from the measurements in `measured`; where none exists, the
fastest path that needs none. The environment variable ``MMD2V_KERNELS`` overrides the choice: ``auto``, one path for
all operators, or a list such as ``expert_mlp=segmented,distill_target=triton``. The matrix products of an operator
have entries of their own (`PARTS`).
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch

from mmd2v_kernels.measured import fastest

__all__ = [
    "ENVIRONMENT",
    "OFFERS",
    "PARTS",
    "PATHS",
    "Choice",
    "choose",
    "choose_part",
    "describe",
    "forced_path",
    "triton_version",
]

logger = logging.getLogger(__name__)

ENVIRONMENT = "MMD2V_KERNELS"
PATHS = ("triton", "segmented", "reference")
OFFERS = {
    "expert_mlp": ("triton", "segmented", "reference"),
    "distill_target": ("triton", "reference"),
    "add_layer_norm": ("triton", "reference"),
    "rank_count": ("triton", "segmented", "reference"),
    "cosine_topk": ("triton", "segmented", "reference"),
    "contrastive": ("triton", "reference"),
    "siglip": ("triton", "reference"),
}
"""Operator → its paths, the fastest first."""
ALWAYS_FP32 = ("contrastive", "siglip")
"""Operators that compute in fp32 whatever the precision of a run is."""
PARTS = {"expert_mlp": ("fc1", "fc2", "dgrad2", "wgrad", "dgrad1")}
"""Operator → the matrix products of its path ``triton``: each by our kernel, or ``segmented`` by the library's."""


class Choice(NamedTuple):
    """A path and the reason for it, for people to read."""

    path: str
    reason: str


def choose(
    operator: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rows: int | None = None,
    obstacles: Mapping[str, str] | None = None,
) -> Choice:
    """Return the path that a call of ``operator`` takes, and log it at its first use.

    ``dtype`` is that of the products, ``rows`` the number of rows where it is known. ``obstacles`` gives for the paths
    that cannot do this call the reason. Raises ValueError for a value of ``MMD2V_KERNELS`` that names no path or no
    operator, RuntimeError where it forces Triton and that cannot run.
    """
    choice = _choose(operator, device, dtype, rows, obstacles or {})
    _log_once(operator, choice, str(dtype).removeprefix("torch."), device.type)
    return choice


def choose_part(operator: str, part: str, device: torch.device, dtype: torch.dtype, *, rows: int) -> str:
    """Return ``triton`` or ``segmented`` for a matrix product of an operator that runs by Triton.

    Triton unless the library's product is measured to be faster, or asked for, such as by
    ``MMD2V_KERNELS=expert_mlp/wgrad=segmented``. In fp32 on a GPU it is always the library's: ours has no tensor cores
    then, and sums a long row in one go.
    """
    name = f"{operator}/{part}"
    if dtype == torch.float32 and device.type == "cuda":
        return "segmented"
    forced = forced_path(name)
    if forced is not None or device.type != "cuda":
        return forced or "triton"
    return fastest(name, torch.cuda.get_device_name(device), dtype, rows) or "triton"


def describe(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """Return one line that says what each operator will run on ``device`` in ``dtype`` and why.

    For the first lines of a log. Raises as `choose` does.
    """
    device = torch.device(device)
    dtypes = {operator: torch.float32 if operator in ALWAYS_FP32 else dtype for operator in OFFERS}
    choices = {operator: _choose(operator, device, dtypes[operator], None, {}) for operator in OFFERS}
    parts = [f"{operator} {choice.path} ({choice.reason})" for operator, choice in choices.items()]
    version = triton_version()
    triton = "Triton is not installed" if version is None else f"Triton {version} is installed"
    return f"kernels on {device.type} in {str(dtype).removeprefix('torch.')}: {', '.join(parts)}; {triton}"


def _choose(
    operator: str, device: torch.device, dtype: torch.dtype, rows: int | None, obstacles: Mapping[str, str]
) -> Choice:
    forced, offers = forced_path(operator), OFFERS[operator]
    no_triton = obstacles.get("triton") or _no_triton(device, dtype)
    if forced == "triton" and forced in offers and no_triton is not None:
        raise RuntimeError(f"{ENVIRONMENT}: asks for {operator} by triton, but {no_triton}")
    if forced in offers and forced not in obstacles:
        return Choice(forced, f"{ENVIRONMENT} asks for it")
    if forced is not None:
        reason = obstacles.get(forced) or f"it has no path '{forced}', which {ENVIRONMENT} asks for"
        return Choice("reference", reason)
    if device.type != "cuda":
        reason = f"on {device.type}"
    elif "triton" not in offers or no_triton is not None:
        reason = no_triton if "triton" in offers else "no kernel is written"
    else:
        name = torch.cuda.get_device_name(device)
        if fastest(operator, name, dtype, rows) == "triton":
            return Choice("triton", f"measured to be the fastest on {name}")
        reason = f"nothing faster is measured on {name}"
    if "segmented" not in offers or "segmented" in obstacles:
        return Choice("reference", obstacles.get("segmented") or reason)
    return Choice("segmented", reason)


def forced_path(operator: str) -> str | None:
    """Return the path that ``MMD2V_KERNELS`` asks for, or None. Raises ValueError for names it does not know."""
    return _parse(os.environ.get(ENVIRONMENT, "")).get(operator)


_PART_NAMES = tuple(f"{operator}/{part}" for operator, parts in PARTS.items() for part in parts)


@cache
def _parse(value: str) -> Mapping[str, str]:
    """Return operator → path; ``auto`` and nothing force none."""
    if value.strip() in ("", "auto"):
        return {}
    if "=" not in value:
        path = _known(value.strip(), (*PATHS, "auto"), "path")
        return dict.fromkeys(OFFERS, path)
    forced = {}
    for entry in value.split(","):
        operator, _, path = (part.strip() for part in entry.partition("="))
        operator = _known(operator, (*OFFERS, *_PART_NAMES), "operator")
        path = _known(path, (*(PATHS[:2] if operator in _PART_NAMES else PATHS), "auto"), "path")
        if path != "auto":
            forced[operator] = path
    return forced


def _known(name: str, names: tuple[str, ...], kind: str) -> str:
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise ValueError(f"{ENVIRONMENT}: found {kind} '{name}', expected one of {', '.join(names)}{hint}")


@cache
def triton_version() -> str | None:
    """Return the version of Triton that can be imported, None without any."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why Triton kernels cannot run there; None: they can."""
    if triton_version() is None:
        return "Triton is not installed"
    if dtype == torch.float64:
        return "the kernels have no float64"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "the interpreter has no bfloat16" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels are for NVIDIA devices of compute capability 8.0 and later"
    return None


@cache
def _log_once(operator: str, choice: Choice, dtype: str, device: str) -> None:
    logger.info("%s on %s in %s: %s (%s)", operator, device, dtype, choice.path, choice.reason)
