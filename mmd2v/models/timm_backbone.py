"""Building a timm image model from a name, keyword arguments and local or published weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from mmd2v.errors import UserError, unknown_name
from mmd2v.models.folding import fold_batch_norms

EXPORTED_PREFIX = "encoders.image.backbone."
"""Where an export of ours holds the backbone of its image encoder."""


def create_backbone(
    name: str, *, weights: str | None, kwargs: dict[str, Any], published: bool, frozen: bool, where: str
) -> nn.Module:
    """Build ``name`` and load its weights: from a file or export, else (``published``) timm's own download.

    The classifier is removed after loading; the batch norms of a ``frozen`` model are folded. Raises UserError that
    begins with ``where`` for an unknown name, a missing file or weights of another architecture.
    """
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
        _load(model, Path(weights), where)
    model.reset_classifier(0)
    return fold_batch_norms(model) if frozen else model


def _load(model: nn.Module, path: Path, where: str) -> None:
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{where}: no weights at {path}; expected a .safetensors file or an export folder")
    state = load_file(path)
    exported = {k.removeprefix(EXPORTED_PREFIX): v for k, v in state.items() if k.startswith(EXPORTED_PREFIX)}
    if exported:
        # An export holds no classifier: its backbone was reduced before training.
        model.reset_classifier(0)
        state = exported
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = [k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape]
    if missing or unexpected or wrong:
        raise UserError(
            f"{where}: {path} is of another architecture: {len(missing)} parameters missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}"
        )
    model.load_state_dict({k: v.to(expected[k].dtype) for k, v in state.items()})


def published_normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the channel means and deviations timm publishes for the model."""
    config = timm.data.resolve_model_data_config(model)
    return tuple(config["mean"]), tuple(config["std"])


def pooled_width(model: nn.Module) -> int:
    """Return the width of what timm would classify."""
    return getattr(model, "head_hidden_size", model.num_features)


@torch.no_grad()
def output_grid(model: nn.Module, size: int, feature: int) -> tuple[int, tuple[int, int]]:
    """Return width and grid of :func:`feature_map` for square images of ``size`` pixels, found by one forward pass."""
    training = model.training
    model.eval()
    map_BCHW = feature_map(model, torch.zeros(1, 3, size, size), feature)
    model.train(training)
    return map_BCHW.shape[1], (map_BCHW.shape[2], map_BCHW.shape[3])


def feature_map(model: nn.Module, images: torch.Tensor, feature: int) -> torch.Tensor:
    """Return [B, C, h, w]: the last feature map (-1), or an earlier stage's by timm's index."""
    if feature != -1:
        return model.forward_intermediates(images, indices=[feature], stop_early=True, intermediates_only=True)[0]
    features = model.forward_features(images)
    if features.ndim == 4:
        return features
    # A ViT: [B, prefix + h·w, C] without the prefix tokens.
    tokens = features[:, getattr(model, "num_prefix_tokens", 0) :]
    side = int(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, -1))
