"""Using an exported encoder: ``mmd2v.load(folder)``, then ``encode_image`` and ``encode_text``.

Shapes: B images, N texts, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from mmd2v.config.schema import Config
from mmd2v.data.pillow import upright_rgb
from mmd2v.data.tokenizers import Tokenizer, load_tokenizer
from mmd2v.data.transforms import decode_image, eval_transform
from mmd2v.errors import UserError, unknown_name
from mmd2v.models.exported import load_export_config, load_student
from mmd2v.models.student import Student

ImageInput = str | Path | Image.Image | torch.Tensor
Precision = Literal["fp32", "bf16"]


class Encoder:
    """A frozen student with its preprocessing. Embeddings are fp32, L2-normalised and on ``device``."""

    def __init__(
        self,
        student: Student,
        config: Config,
        tokenizer: Tokenizer | None,
        device: torch.device,
        precision: Precision = "fp32",
    ) -> None:
        self.student = student.eval().requires_grad_(False).to(device)
        self.config = config
        self.tokenizer = tokenizer
        self.device = device
        self.precision = precision

    @property
    def name(self) -> str:
        """What tables call it: the name of the run it was exported from."""
        return self.config.name

    @property
    def width(self) -> int:
        """E"""
        return self.student.embedding_width

    def encode_image(self, images: Sequence[ImageInput] | torch.Tensor, batch_size: int = 64) -> torch.Tensor:
        """Return [B, E] of a list of paths, PIL images and uint8 tensors [3, H, W], or of one uint8 [B, 3, H, W].

        Every image is resized and cropped as evaluation does it. Raises UserError naming the image that does not
        decode or is of another type or shape.
        """
        self._require("image")
        check_images(images)
        size = self.config.data.image.size
        parts = [torch.zeros(0, self.width, device=self.device)]
        with ThreadPoolExecutor() as threads:
            for start, chunk in chunks(images, batch_size):
                prepared = list(threads.map(self.preprocess, chunk, range(start, start + len(chunk))))
                pixels = torch.stack(prepared) if prepared else torch.zeros(0, 3, size, size, dtype=torch.uint8)
                parts.append(self._run(self.student.encode_image, pixels.to(self.device)))
        return torch.cat(parts)

    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """Return [N, E] of a list of sentences. Raises UserError for an item that is no text or is empty."""
        self._require("text")
        check_texts(texts)
        assert self.tokenizer is not None
        parts = [torch.zeros(0, self.width, device=self.device)]
        for _, chunk in chunks(texts, batch_size):
            ids_S, lengths_N = self.tokenizer.encode_batch(chunk)
            ids = torch.from_numpy(ids_S).to(self.device)
            parts.append(self._run(self.student.encode_text, ids, torch.from_numpy(lengths_N)))
        return torch.cat(parts)

    def encode_array(self, name: str, values: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """Return [B, E] of float arrays [B, …], samples of ``data.arrays.NAME``.

        Raises UserError for a name that no encoder sees or another shape.
        """
        arrays = self.config.array_inputs
        if name not in arrays:
            raise unknown_name("encode_array", name, arrays) if arrays else UserError("this encoder sees no arrays")
        shape = list(arrays[name].shape)
        if list(values.shape[1:]) != shape:
            expected = ", ".join(map(str, ["B", *shape]))
            raise UserError(f"encode_array: '{name}' has shape {list(values.shape)}, expected [{expected}]")
        parts = [torch.zeros(0, self.width, device=self.device)]
        for _, chunk in chunks(values, batch_size):
            parts.append(self._run(partial(self.student.encode_array, name), chunk.float().to(self.device)))
        return torch.cat(parts)

    def preprocessing(self) -> str:
        """Say in a line what happens to an image and a text before the model."""
        image, tokenizer = self.config.data.image, self.config.data.tokenizer
        shape = (
            f"shortest side to {image.size} px, centre crop"
            if image.eval_resize == "center_crop"
            else f"squashed to {image.size} × {image.size} px"
        )
        parts = [f"images: {shape}, {image.interpolation}, antialiased"]
        if tokenizer is not None:
            parts.append(f"texts: {tokenizer.kind} tokens, at most {tokenizer.max_length}")
        return "; ".join([*parts, f"arithmetic: {self.precision}"])

    def autocast(self) -> torch.autocast:
        """Return the context of the chosen precision."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def preprocess(self, image: ImageInput, number: int = 0) -> torch.Tensor:
        """Return uint8 [3, size, size] of an image; ``number`` names it in the UserError for a wrong type."""
        return eval_transform(image_pixels(image, number), self.config.data.image)

    def _run(self, encode: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), self.autocast():
            return encode(*inputs)

    def _require(self, kind: str) -> None:
        if kind not in self.student.inputs.values():
            raise UserError(f"this encoder has no {kind} modality, only {', '.join(self.student.inputs)}")


def load(folder: str | Path, device: str | torch.device = "cpu", precision: Precision = "fp32") -> Encoder:
    """Open a folder that ``mmd2v export`` wrote; nothing else is needed, and nothing in it is executed.

    ``precision`` "bf16" computes matrix products in bfloat16. Raises UserError for a folder that is no export, files
    that are missing or damaged, weights that do not fit the config, or a device that is not there.
    """
    where = "mmd2v.load"
    if precision not in ("fp32", "bf16"):
        raise UserError(f"{where}: precision is '{precision}', expected fp32 or bf16")
    target = resolve_device(device)
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{where}: {folder} is no folder")
    if (folder / "checkpoints").is_dir():
        raise UserError(f"{where}: {folder} is a run; first `mmd2v export {folder} --out DIR`, then load DIR")
    config = load_export_config(folder, where)
    student = load_student(folder, where)
    tokenizer = None if config.data.tokenizer is None else load_tokenizer(config.data.tokenizer)
    return Encoder(student, config, tokenizer, target, precision)


def check_images(images: Any) -> None:
    """Raise UserError for a single image in place of several."""
    if isinstance(images, (str, Path, Image.Image)) or (isinstance(images, torch.Tensor) and images.ndim == 3):
        raise UserError("encode_image: found a single image, expected a list of images or a tensor [B, 3, H, W]")


def check_texts(texts: Any) -> None:
    """Raise UserError for a single text in place of several, or an item that is no text or is empty."""
    if isinstance(texts, str):
        raise UserError("encode_text: found a single text, expected a list of texts")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"encode_text: item {i} is {text!r}, expected a text that is not empty")


def image_pixels(image: ImageInput, number: int = 0) -> torch.Tensor:
    """Return uint8 [3, H, W] of an image, upright; ``number`` names it in the UserError for a wrong type."""
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(upright_rgb(image))).permute(2, 0, 1)
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3:
        return image.cpu()
    found = f"{image.dtype} {list(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
    raise UserError(
        f"encode_image: image {number} is {found}, expected a path, a PIL image or a uint8 tensor [3, H, W]"
    )


def read_image(path: str | Path) -> torch.Tensor:
    """Return uint8 [3, H, W] of an image file. Raises UserError naming a file that is missing or does not decode."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    return decode_image(data, str(path))


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device of that name; "auto" is CUDA when there is one. Raises UserError when it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device: found '{device}', expected cpu, cuda, cuda:1 or auto") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: '{device}' was asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    return found


def chunks(items: Any, size: int) -> Iterator[tuple[int, Any]]:
    """Yield (index of the first item, ``size`` items) of a sequence or tensor."""
    if size < 1:
        raise UserError(f"batch_size: found {size}, expected at least 1")
    for start in range(0, len(items), size):
        yield start, items[start : start + size]
