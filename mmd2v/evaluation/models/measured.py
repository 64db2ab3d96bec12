"""What the models of other libraries share: batches, threads, precision, and the options in their names.

Shapes: B images, N texts, E width of an embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mmd2v.errors import UserError, unknown_name
from mmd2v.inference import ImageInput, Precision, check_images, check_texts, chunks, image_pixels


class MeasuredModel(ABC):
    """A `RetrievalModel`. Subclasses say how an image and texts are prepared on the host and embedded on the device."""

    def __init__(self, name: str, width: int, device: torch.device, precision: Precision) -> None:
        self.name = name
        self.width = width
        self.device = device
        self.precision = precision

    def encode_image(self, images: Sequence[ImageInput] | torch.Tensor, batch_size: int = 64) -> torch.Tensor:
        """Return fp32 [B, E], L2-normalised, of paths, PIL images and uint8 tensors [3, H, W], or of one [B, 3, H, W].

        The next batch is decoded and resized in threads while the model computes. Raises UserError naming the image
        that does not decode or is of another type or shape.
        """
        check_images(images)
        parts = [torch.zeros(0, self.width, device=self.device)]
        with ThreadPoolExecutor() as threads:
            for prepared in self._prepared(threads, images, batch_size):
                parts.append(self._embedded(self.embed_images, prepared.to(self.device, non_blocking=True)))
        return torch.cat(parts)

    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """Return fp32 [N, E], L2-normalised. Raises UserError for an item that is no text or is empty."""
        check_texts(texts)
        parts = [torch.zeros(0, self.width, device=self.device)]
        for _, chunk in chunks(texts, batch_size):
            parts.append(self._embedded(self.embed_texts, self.tokenize(list(chunk))))
        return torch.cat(parts)

    def preprocessing(self) -> str:
        """Say in a line what happens to an image and a text before the model."""
        return f"images: {self.image_preprocessing()}; texts: {self.text_preprocessing()}; arithmetic: {self.precision}"

    @abstractmethod
    def prepare_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what the model takes of one image, uint8 [3, H, W]; called in threads, on the host."""

    @abstractmethod
    def embed_images(self, prepared: torch.Tensor) -> torch.Tensor:
        """Return [B, E] of a batch of prepared images on the device; it is normalised afterwards."""

    @abstractmethod
    def tokenize(self, texts: list[str]) -> Any:
        """Return what `embed_texts` takes of a batch of texts."""

    @abstractmethod
    def embed_texts(self, tokens: Any) -> torch.Tensor:
        """Return [N, E] of a batch of tokenised texts; it is normalised afterwards."""

    @abstractmethod
    def image_preprocessing(self) -> str:
        """Say what happens to an image."""

    @abstractmethod
    def text_preprocessing(self) -> str:
        """Say what happens to a text."""

    def _prepared(
        self, threads: ThreadPoolExecutor, images: Sequence[ImageInput] | torch.Tensor, batch_size: int
    ) -> Iterator[torch.Tensor]:
        """Yield batches of prepared images, of which one is ahead."""
        ahead: deque[Iterator[torch.Tensor]] = deque()
        for start, chunk in chunks(images, batch_size):
            ahead.append(threads.map(self._prepare, chunk, range(start, start + len(chunk))))
            if len(ahead) > 1:
                yield torch.stack(list(ahead.popleft()))
        for last in ahead:
            yield torch.stack(list(last))

    def _prepare(self, image: ImageInput, number: int) -> torch.Tensor:
        return self.prepare_image(image_pixels(image, number))

    @torch.no_grad()
    def _embedded(self, embed: Any, prepared: Any) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            features = embed(prepared)
        return F.normalize(features.float(), dim=-1)


def places_and_options(kind: str, rest: str, known: Mapping[str, str], places: int = 1) -> tuple[list[Path], dict]:
    """Split ``PATH[,PATH…][,NAME=VALUE…]`` that follows ``KIND:`` into so many paths and the options.

    ``known`` maps the name of an option to what it is. Raises UserError for another number of paths or an unknown name.
    """
    parts = [rest] if places == 1 and Path(rest).exists() else rest.split(",")
    paths = [part for part in parts[:places] if part]
    form = f"{kind}:{','.join(['PATH'] * places)}"
    if len(paths) != places:
        raise UserError(f"model: found '{kind}:{rest}', expected {form}")
    options = {}
    for part in parts[places:]:
        name, equals, value = part.partition("=")
        if not equals or not value:
            listing = ", ".join(f"{option}={what}" for option, what in known.items())
            raise UserError(f"model: found '{part}' in '{kind}:{rest}', expected {form} with any of ,{listing}")
        if name not in known:
            raise unknown_name(f"model '{kind}:{rest}', option", name, known)
        options[name] = value
    return [Path(path) for path in paths], options


def whole_number(kind: str, options: Mapping[str, str], name: str) -> int | None:
    """Return the option as a positive number, None where it is absent. Raises UserError for anything else."""
    value = options.get(name)
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise UserError(f"model: found '{name}={value}' of '{kind}:', expected a whole number from 1 on")
    return int(value)
