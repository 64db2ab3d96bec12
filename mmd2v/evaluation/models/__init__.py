"""Opening a model to measure by one name: ``open_model(spec)``. One file a kind of model, one line here."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import get_args

import torch

from mmd2v.errors import UserError, nearest, unknown_name
from mmd2v.evaluation.models.base import RetrievalModel
from mmd2v.inference import Precision, load, resolve_device

Opener = Callable[[str, torch.device, Precision], RetrievalModel]
"""(what follows the colon, device, precision) → model"""


def _from(module: str, name: str) -> Opener:
    """Return the opener ``name`` of a module here, which is imported once it is called: libraries are slow to load."""

    def opener(rest: str, device: torch.device, precision: Precision) -> RetrievalModel:
        return getattr(import_module(f"{__name__}.{module}"), name)(rest, device, precision)

    return opener


MODELS: dict[str, Opener] = {
    "hf-clip": _from("hf", "open_clip"),
    "hf-siglip": _from("hf", "open_siglip"),
    "hf-flava": _from("hf", "open_flava"),
    "open_clip": _from("open_clip", "open_open_clip"),
    "beit3": _from("beit3", "open_beit3"),
    "vlmo": _from("vlmo", "open_vlmo"),
    "data2vec2": _from("data2vec2", "open_data2vec2"),
    "random": _from("random", "open_random"),
}
"""Kind of model → how it is opened; ``KIND:PATH`` names one."""

_WITHOUT_REST = ("random",)
TEXT_ALONE = "hf-text"
"""Kind of models that have no images, which `mmd2v eval pairs` opens by itself."""


def open_model(spec: str | Path, device: str | torch.device = "cpu", precision: Precision = "fp32") -> RetrievalModel:
    """Open a folder that ``mmd2v export`` wrote, or ``KIND:PATH`` with a kind of `MODELS`.

    Raises UserError for a kind that is not there or a model that cannot be opened.
    """
    if precision not in get_args(Precision):
        raise UserError(f"precision: found '{precision}', expected {' or '.join(get_args(Precision))}")
    kind, colon, rest = str(spec).partition(":")
    if Path(spec).exists():
        return load(spec, device, precision)
    if not colon and kind not in MODELS:
        close = nearest(Path(spec).name, [path.name for path in Path(spec).absolute().parent.glob("*")]) or nearest(
            kind, MODELS
        )
        raise UserError(
            f"model: no folder '{spec}', expected one that `mmd2v export` wrote, or KIND:PATH with one of the kinds "
            f"{', '.join(MODELS)}.{close}"
        )
    if kind == TEXT_ALONE:
        raise UserError(
            f"model: '{spec}' encodes texts alone; expected a model of images and texts: {', '.join(MODELS)}"
        )
    if kind not in MODELS:
        raise unknown_name("model", kind, MODELS)
    if not rest and kind not in _WITHOUT_REST:
        raise UserError(f"model: found '{spec}', expected {kind}:PATH")
    return MODELS[kind](rest, resolve_device(device), precision)


__all__ = ["MODELS", "RetrievalModel", "open_model"]
