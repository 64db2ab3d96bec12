"""Opening a model to measure by one name: ``open_model(spec)``. One file a kind of model, one line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mmd2v.errors import unknown_name
from mmd2v.evaluation.models.base import RetrievalModel
from mmd2v.inference import Precision, load, resolve_device

Opener = Callable[[str, torch.device, Precision], RetrievalModel]
"""(what follows the colon, device, precision) → model"""

MODELS: dict[str, Opener] = {}
"""Kind of model → how it is opened; ``KIND:PATH`` names one."""


def open_model(spec: str | Path, device: str | torch.device = "cpu", precision: Precision = "fp32") -> RetrievalModel:
    """Open a folder that ``mmd2v export`` wrote, or ``KIND:PATH`` with a kind of `MODELS`.

    Raises UserError for a kind that is not there or a model that cannot be opened.
    """
    kind, colon, rest = str(spec).partition(":")
    if not colon or Path(spec).exists():
        return load(spec, device, precision)
    if kind not in MODELS:
        raise unknown_name("model", kind, MODELS)
    return MODELS[kind](rest, resolve_device(device), precision)


__all__ = ["MODELS", "RetrievalModel", "open_model"]
