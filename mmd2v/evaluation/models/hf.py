"""CLIP, SigLIP and FLAVA of transformers, each with its own image processor and tokenizer.

Shapes: B images, N texts, L tokens of the longest text of a batch, E width of an embedding.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel, FlavaModel, SiglipModel

from mmd2v.data.tokenizers import check_ids
from mmd2v.errors import UserError
from mmd2v.evaluation.models.measured import MeasuredModel
from mmd2v.inference import Precision

_KIND_OF_TYPE = {"clip": "hf-clip", "siglip": "hf-siglip", "flava": "hf-flava"}
_FLAVA_TEXT = 77
"""Tokens of FLAVA's own texts; its position table is longer."""

# What the library raises for files that are missing, damaged, of another kind, or that need a package.
_LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)


class HFModel(MeasuredModel):
    """A dual encoder of transformers. Subclasses say which class it is and where its embeddings are."""

    kind: str
    model_class: Any
    padding: bool | str = True

    def __init__(self, name: str, device: torch.device, precision: Precision) -> None:
        where = f"model '{self.kind}:{name}'"
        transformers.utils.logging.disable_progress_bar()
        config = _loaded(where, name, "configuration", AutoConfig.from_pretrained)
        if config.model_type != self.model_class.config_class.model_type:
            kind = _KIND_OF_TYPE.get(config.model_type)
            hint = f" Did you mean '{kind}:{name}'?" if kind else ""
            raise UserError(
                f"{where}: found a model of type '{config.model_type}', expected "
                f"'{self.model_class.config_class.model_type}'.{hint}"
            )
        self.processor = _loaded(where, name, "image processor", AutoImageProcessor.from_pretrained)
        self.tokenizer = _loaded(where, name, "tokenizer", AutoTokenizer.from_pretrained)
        model, report = _loaded(
            where,
            name,
            "weights",
            self.model_class.from_pretrained,
            dtype=torch.float32,
            use_safetensors=True,  # a pickle could run code
            output_loading_info=True,
        )
        # The library would draw what the file lacks at random, and a number would be printed.
        lacking = sorted(report["missing_keys"]) or sorted(str(entry) for entry in report["mismatched_keys"])
        if lacking:
            raise UserError(
                f"{where}: its weights lack {len(lacking)} of {len(model.state_dict())} tensors "
                f"({', '.join(lacking[:3])} …), or hold them in another shape; expected all of a {config.model_type}"
            )
        self.model = model.eval().requires_grad_(False).to(device)
        self.text_length = self._text_length(config.text_config)
        self.vocab_size = config.text_config.vocab_size
        label = Path(name).absolute().name if Path(name).is_dir() else name
        super().__init__(f"{self.kind}:{label}", self._width(config), device, precision)
        self._check_image_size(config.vision_config if hasattr(config, "vision_config") else config.image_config, where)

    @abstractmethod
    def _width(self, config: Any) -> int:
        """Return E."""

    def _text_length(self, config: Any) -> int:
        """Return the longest text, in tokens, special tokens included."""
        return min(self.tokenizer.model_max_length, config.max_position_embeddings)

    def _check_image_size(self, config: Any, where: str) -> None:
        found = tuple(self.prepare_image(torch.zeros(3, 8, 8, dtype=torch.uint8)).shape[1:])
        side = config.image_size
        expected = (side, side) if isinstance(side, int) else tuple(side)
        if found != expected:
            raise UserError(
                f"{where}: its image processor makes {found[0]} × {found[1]} px, but its model takes "
                f"{expected[0]} × {expected[1]}; the files do not belong together"
            )

    def prepare_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return fp32 [3, S, S] as the model's own processor makes it."""
        # Told, not guessed: an image three pixels high could be read as channels.
        return self.processor(images=pixels, input_data_format="channels_first", return_tensors="pt")["pixel_values"][0]

    def tokenize(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Return ids [N, L] and what else the model's own tokenizer gives, on the device."""
        tokens = self.tokenizer(
            texts, padding=self.padding, truncation=True, max_length=self.text_length, return_tensors="pt"
        )
        check_ids(tokens["input_ids"].numpy(), self.vocab_size, self.name)
        return {name: value.to(self.device) for name, value in tokens.items()}

    def embed_images(self, prepared: torch.Tensor) -> torch.Tensor:
        """Return [B, E]."""
        return _pooled(self.model.get_image_features(pixel_values=prepared))

    def embed_texts(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return [N, E]."""
        return _pooled(self.model.get_text_features(**tokens))

    def image_preprocessing(self) -> str:
        """Say what the image processor is set to."""
        return _described(self.processor)

    def text_preprocessing(self) -> str:
        """Say what the tokenizer is set to."""
        padded = "always" if self.padding == "max_length" else "at most"
        return f"{type(self.tokenizer).__name__}, {padded} {self.text_length} tokens"


class HFClip(HFModel):
    """CLIP (Radford et al. 2021)."""

    kind = "hf-clip"
    model_class = CLIPModel

    def _width(self, config: Any) -> int:
        return config.projection_dim


class HFSiglip(HFModel):
    """SigLIP (Zhai et al. 2023), whose texts are padded to the full length as in its training."""

    kind = "hf-siglip"
    model_class = SiglipModel
    padding = "max_length"

    def _width(self, config: Any) -> int:
        return config.vision_config.hidden_size


class HFFlava(HFModel):
    """FLAVA (Singh et al. 2022): the projected CLS of both unimodal encoders, as its contrastive loss compares them."""

    kind = "hf-flava"
    model_class = FlavaModel

    def _width(self, config: Any) -> int:
        return config.projection_dim

    def _text_length(self, config: Any) -> int:
        return min(super()._text_length(config), _FLAVA_TEXT)

    def embed_images(self, prepared: torch.Tensor) -> torch.Tensor:
        """Return [B, E]."""
        return self.model.image_projection(self.model.image_model(pixel_values=prepared).last_hidden_state[:, 0])

    def embed_texts(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return [N, E]."""
        return self.model.text_projection(self.model.text_model(**tokens).last_hidden_state[:, 0])


def open_clip(rest: str, device: torch.device, precision: Precision) -> HFClip:
    """Open ``hf-clip:FOLDER-or-hub-name``."""
    return HFClip(rest, device, precision)


def open_siglip(rest: str, device: torch.device, precision: Precision) -> HFSiglip:
    """Open ``hf-siglip:FOLDER-or-hub-name``."""
    return HFSiglip(rest, device, precision)


def open_flava(rest: str, device: torch.device, precision: Precision) -> HFFlava:
    """Open ``hf-flava:FOLDER-or-hub-name``."""
    return HFFlava(rest, device, precision)


def _loaded(where: str, name: str, what: str, load: Any, **options: Any) -> Any:
    """Return ``load(name)`` without running code of the model's. Raises UserError for what the library says instead."""
    verbosity = transformers.utils.logging.get_verbosity()
    # Of a FLAVA it would list some hundred tensors of other losses; what is missing is looked at by the caller.
    transformers.utils.logging.set_verbosity_error()
    try:
        return load(name, trust_remote_code=False, **options)
    except _LOADING_ERRORS as error:
        hint = "" if Path(name).is_dir() else "; it is no folder here, and the hub cannot be asked or does not know it"
        form = " as safetensors, which alone is read" if what == "weights" else ""
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{where}: found no {what}, expected {what} of transformers{form}{hint}: {reason}") from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def _pooled(output: Any) -> torch.Tensor:
    """Return the embedding: the features were a tensor before transformers 5, and are within an output since."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _described(processor: Any) -> str:
    settings = processor.to_dict()
    parts = []
    if settings.get("do_resize", True):
        size = settings["size"]
        edge = size.get("shortest_edge")
        shape = f"shortest side to {edge} px" if edge else f"squashed to {size['height']} × {size['width']} px"
        resample = settings.get("resample")
        parts.append(f"{shape}, {_FILTERS.get(resample, f'filter {resample}')}")
    if settings.get("do_center_crop"):
        crop = settings["crop_size"]
        parts.append(f"centre crop {crop['height']} × {crop['width']} px")
    if settings.get("do_normalize", True):
        numbers = (f"{name} {_rounded(settings[f'image_{name}'])}" for name in ("mean", "std"))
        parts.append(", ".join(numbers))
    return f"{type(processor).__name__}: {', '.join(parts)}"


_FILTERS = {0: "nearest", 1: "Lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "Hamming"}


def _rounded(values: Any) -> str:
    return " ".join(f"{value:.4g}" for value in values)
