"""timm image models: building one from a name, keyword arguments and weights, and reading its features.

timm is imported where a model is asked for: it is slow to import, and many runs and exports name none of its models.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mmd2v.errors import UserError, unknown_name
from mmd2v.models.folding import fold_batch_norms

_EXPORTED_PREFIX = re.compile(r"^encoders\.[^.]+\.backbone\.")
"""Where an export of ours holds the backbone of an encoder."""


class Features(NamedTuple):
    """What one forward pass of a backbone gives."""

    map_BCHW: torch.Tensor
    pooled_BC: torch.Tensor | None
    """What timm would classify; None for an earlier stage."""


class FeatureShape(NamedTuple):
    """Sizes of :class:`Features` for one image size."""

    width: int
    grid: tuple[int, int]
    pooled_width: int | None


def create_backbone(
    name: str, *, weights: str | None, kwargs: dict[str, Any], published: bool, frozen: bool, where: str
) -> nn.Module:
    """Build ``name`` and load its weights: from a file or export, else (``published``) timm's own download.

    The classifier is removed after loading; the batch norms of a ``frozen`` model are folded. Raises UserError that
    begins with ``where`` for an unknown name, a missing or damaged file or weights of another architecture.
    """
    import timm

    if name not in timm.list_models():
        raise unknown_name(where, name, timm.list_models())
    try:
        model = timm.create_model(name, pretrained=published and weights is None, **kwargs)
    except TypeError as error:
        raise UserError(f"{where}: timm model '{name}' does not take these arguments: {error}") from error
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{where}: the published weights of '{name}' cannot be downloaded ({type(error).__name__}); "
            f"name a local file as timm:{name}@FILE.safetensors"
        ) from error
    if weights is not None:
        model = _load(model, Path(weights), frozen, where)
    model.reset_classifier(0)
    return fold_batch_norms(model) if frozen else model


def _load(model: nn.Module, path: Path, frozen: bool, where: str) -> nn.Module:
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{where}: no weights at {path}; expected a .safetensors file or an export folder")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{where}: {path} is no readable safetensors file: {error}") from error
    exported = {_EXPORTED_PREFIX.sub("", k): v for k, v in state.items() if _EXPORTED_PREFIX.match(k)}
    if exported:
        # An export holds no classifier, and a backbone that was frozen in it was folded.
        state = exported
        model.reset_classifier(0)
        if frozen and state.keys() != model.state_dict().keys():
            model = fold_batch_norms(model)
    load_exactly(model, state, f"{where}: {path} is of another architecture")
    return model


def load_exactly(model: nn.Module, state: dict[str, torch.Tensor], complaint: str) -> None:
    """Load weights of any float type. Raises UserError, ``complaint`` first, unless names and shapes all agree."""
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = sorted(k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape)
    if missing or unexpected or wrong:
        raise UserError(
            f"{complaint}: {len(missing)} parameters missing {missing[:3]}, {len(unexpected)} unexpected "
            f"{unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}"
        )
    model.load_state_dict({k: v.to(expected[k].dtype) for k, v in state.items()})


def published_normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the channel means and deviations timm publishes for the model."""
    import timm

    config = timm.data.resolve_model_data_config(model)
    return tuple(config["mean"]), tuple(config["std"])


def published_size(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """Return the side of the square input, in pixels: ``img_size`` of the arguments, else what timm publishes."""
    import timm

    size = kwargs.get("img_size", timm.data.resolve_model_data_config(model)["input_size"][-1])
    return size if isinstance(size, int) else size[-1]


def backbone_features(model: nn.Module, images: torch.Tensor, feature: int) -> Features:
    """Return the last feature map and the pooled feature (-1), or an earlier stage's map by timm's index."""
    if feature != -1:
        maps = model.forward_intermediates(
            images, indices=[feature], stop_early=True, intermediates_only=True, output_fmt="NCHW"
        )
        return Features(maps[0], None)
    raw = model.forward_features(images)
    return Features(_as_map(model, raw), model.forward_head(raw, pre_logits=True))


def _as_map(model: nn.Module, raw: torch.Tensor) -> torch.Tensor:
    if raw.ndim == 4:
        return raw.permute(0, 3, 1, 2) if _is_channels_last(model, raw) else raw
    # A ViT: [B, prefix + h·w, C] without the prefix tokens.
    tokens = raw[:, getattr(model, "num_prefix_tokens", 0) :]
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, -1))


def _is_channels_last(model: nn.Module, raw: torch.Tensor) -> bool:
    """timm's transformers of images in windows keep [B, H, W, C]; most say so, some only by their width."""
    said = getattr(model, "output_fmt", None)
    if said is not None:
        return str(getattr(said, "value", said)) == "NHWC"
    return raw.shape[1] != model.num_features and raw.shape[-1] == model.num_features


@torch.no_grad()
def feature_shape(model: nn.Module, size: int, feature: int, where: str) -> FeatureShape:
    """Return the sizes of the features of square images of ``size`` pixels, found by one forward pass.

    Raises UserError, beginning with ``where``, when the model does not take that size or has no such feature map.
    """
    training = model.training
    model.eval()
    try:
        found = backbone_features(model, torch.zeros(1, 3, size, size), feature)
    except (AssertionError, RuntimeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{where}: the backbone gives no feature map {feature} for images of {size} pixels: {error}"
        ) from error
    finally:
        model.train(training)
    map_BCHW, pooled_BC = found
    pooled_width = None if pooled_BC is None or pooled_BC.ndim != 2 else pooled_BC.shape[1]
    return FeatureShape(map_BCHW.shape[1], (map_BCHW.shape[2], map_BCHW.shape[3]), pooled_width)
