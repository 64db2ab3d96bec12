"""``open_clip:MODEL[/PRETRAINED]``: any model of open_clip, where that is installed, with its transform and tokenizer.

Shapes: B images, N texts, L tokens of its context, E width of an embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmd2v.errors import UserError, unknown_name
from mmd2v.evaluation.models.measured import MeasuredModel
from mmd2v.inference import Precision

_SEED = 0  # of weights that are drawn


class OpenClipModel(MeasuredModel):
    """A model of the library."""

    def __init__(
        self, name: str, model: Any, transform: Any, tokenizer: Any, device: torch.device, precision: Precision
    ) -> None:
        self.model = model.eval().requires_grad_(False).to(device)
        self.transform = transform
        self.tokenizer = tokenizer
        with torch.no_grad():
            trial = self.prepare_image(torch.zeros(3, 8, 8, dtype=torch.uint8))[None].to(device)
            width = self.model.encode_image(trial).shape[-1]
        super().__init__(f"open_clip:{name}", width, device, precision)

    def prepare_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return fp32 [3, S, S] as the library's transform makes it of a Pillow image."""
        return self.transform(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))

    def embed_images(self, prepared: torch.Tensor) -> torch.Tensor:
        """Return [B, E]."""
        return self.model.encode_image(prepared)

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """Return ids [N, L]."""
        return self.tokenizer(texts)

    def embed_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [N, E]."""
        return self.model.encode_text(tokens.to(self.device))

    def image_preprocessing(self) -> str:
        """Say what the library's transform consists of."""
        steps = [step for step in getattr(self.transform, "transforms", [self.transform]) if not _is_function(step)]
        return ", ".join(" ".join(str(step).split()) for step in steps)

    def text_preprocessing(self) -> str:
        """Say what the library's tokenizer is."""
        return f"{type(self.tokenizer).__name__}, {self.tokenizer.context_length} tokens"


def _is_function(step: Any) -> bool:
    """Tell whether a step is a plain function (conversion to RGB), whose text is an address."""
    return hasattr(step, "__name__")


def open_open_clip(rest: str, device: torch.device, precision: Precision) -> OpenClipModel:
    """Open ``MODEL`` (weights drawn at random), ``MODEL/PRETRAINED`` or ``MODEL/FILE.safetensors``.

    Raises UserError when the library is not installed, or knows no such model or weights.
    """
    try:
        import open_clip
    except ImportError as error:
        raise UserError(
            f"model 'open_clip:{rest}' needs the library open_clip ({error}): pip install ftfy, then "
            "pip install --no-deps open_clip_torch (its other dependencies would include an older webdataset)"
        ) from error

    where = f"model 'open_clip:{rest}'"
    model_name, _, weights = rest.partition("/")
    if model_name not in open_clip.list_models():
        raise unknown_name(f"{where}, MODEL", model_name, open_clip.list_models())
    _check_weights(where, weights, open_clip.list_pretrained_tags_by_model(model_name))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model, _, transform = open_clip.create_model_and_transforms(
                model_name, weights or None, precision="fp32", device="cpu", weights_only=True
            )
        tokenizer = open_clip.get_tokenizer(model_name)
    except Exception as error:  # a hub that cannot be asked, weights of another model: the library raises all kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{where}: open_clip cannot open it: {reason}") from error
    return OpenClipModel(rest, model, transform, tokenizer, device, precision)


def _check_weights(where: str, weights: str, tags: list[str]) -> None:
    """Raise UserError unless ``weights`` are none, a tag or a file of safetensors: the library unpickles others."""
    if not weights or weights in tags:
        return
    path = Path(weights)
    if path.suffix != ".safetensors":
        if path.exists():
            raise UserError(f"{where}: found the file {path}, expected safetensors: a pickle could run code")
        if tags:
            raise unknown_name(f"{where}, PRETRAINED", weights, tags)
        raise UserError(
            f"{where}: found PRETRAINED '{weights}', but open_clip publishes no weights of it; expected none or a "
            "file of safetensors"
        )
    if not path.is_file():
        raise UserError(f"{where}: no file {path}")
