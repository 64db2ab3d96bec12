"""A folder of images in embedding space, remembered between searches.

The memory is one file a model and folder: embeddings by the SHA-256 of each image's bytes, so renamed images are found
again, changed ones are encoded anew and deleted ones forgotten.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmd2v.data.transforms import decode_image
from mmd2v.errors import UserError, nearest
from mmd2v.files import atomic_path
from mmd2v.inference import Encoder
from mmd2v.models.exported import CONFIG_FILE, WEIGHTS_FILE
from mmd2v.progress import Progress

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_BATCH = 64


@dataclass(frozen=True)
class Gallery:
    """The readable images of a folder."""

    paths: list[Path]
    embeddings_ME: torch.Tensor
    """fp32 [M, E] on the CPU."""
    unreadable: list[str]
    """One message an image that could not be read, naming it."""


def list_images(folder: str | Path) -> list[Path]:
    """Return the images below ``folder``, sorted by path. Raises UserError when there is no folder or no image."""
    folder = Path(folder)
    if not folder.is_dir():
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"--images: {folder} is no folder.{nearest(folder.name, siblings)}")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"--images: no image in {folder} or below; looked for {', '.join(IMAGE_SUFFIXES)}")
    return found


def open_gallery(encoder: Encoder, model: str | Path, folder: str | Path, cache: str | Path | None = None) -> Gallery:
    """Embed the images below ``folder``, taking from the cache what it has.

    ``model`` is the folder ``encoder`` was loaded from. ``cache`` defaults to ``$XDG_CACHE_HOME/mmd2v`` or
    ``~/.cache/mmd2v``; a cache that cannot be read or written is said so and done without. Unreadable images are
    left out and listed.
    """
    paths = list_images(folder)
    file = _cache_file(encoder, Path(model), Path(folder), Path(cache) if cache is not None else default_cache())
    known = _read_cache(file, encoder.width)
    used: dict[bytes, torch.Tensor] = {}
    readable: list[tuple[Path, bytes]] = []
    unreadable: list[str] = []
    with ThreadPoolExecutor() as threads, Progress("reading images", len(paths), unit="images") as progress:
        for chunk in _chunks(paths, _BATCH):
            new: dict[bytes, torch.Tensor] = {}
            for path, read in zip(chunk, threads.map(lambda p: _read(encoder, p, known), chunk), strict=True):
                if isinstance(read, str):
                    unreadable.append(read)
                    continue
                content, pixels = read
                readable.append((path, content))
                if pixels is None:
                    used[content] = known[content]
                elif content not in used:
                    new[content] = pixels
            if new:
                rows = encoder.encode_image(list(new.values())).cpu()
                used.update(zip(new, rows, strict=True))
            progress.advance(len(chunk))
    if used.keys() != known.keys():
        _write_cache(file, used)
    embeddings = [used[content] for _, content in readable]
    stacked = torch.stack(embeddings) if embeddings else torch.zeros(0, encoder.width)
    return Gallery([path for path, _ in readable], stacked, unreadable)


def default_cache() -> Path:
    """Return the folder for embeddings when none is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmd2v"


def model_hash(folder: Path) -> str:
    """Return the SHA-256 of an export's weights and config."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with open(folder / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _cache_file(encoder: Encoder, model: Path, folder: Path, cache: Path) -> Path:
    where = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    return cache / f"{model_hash(model)[:20]}-{encoder.precision}-{where[:20]}.safetensors"


def _read(encoder: Encoder, path: Path, known: dict[bytes, torch.Tensor]) -> tuple[bytes, torch.Tensor | None] | str:
    """Return (hash of the bytes, pixels unless the embedding is known), or a message when the image is unreadable."""
    try:
        data = path.read_bytes()
        content = hashlib.sha256(data).digest()
        return content, None if content in known else encoder.preprocess(decode_image(data, str(path)))
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    except UserError as error:
        return str(error)


def _read_cache(file: Path, width: int) -> dict[bytes, torch.Tensor]:
    if not file.is_file():
        return {}
    try:
        tensors = load_file(file)
        content, embeddings = tensors["content"], tensors["embeddings"]
        if content.shape != (len(embeddings), hashlib.sha256().digest_size) or embeddings.shape[1:] != (width,):
            raise ValueError("unexpected shapes")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        logger.warning("%s: not usable as a cache (%s), encoding anew", file, error)
        return {}
    return {row.numpy().tobytes(): embedding for row, embedding in zip(content, embeddings, strict=True)}


def _write_cache(file: Path, embeddings: dict[bytes, torch.Tensor]) -> None:
    if not embeddings:
        return
    content = torch.frombuffer(bytearray(b"".join(embeddings)), dtype=torch.uint8).view(len(embeddings), -1)
    try:
        with atomic_path(file) as temporary:
            save_file({"content": content, "embeddings": torch.stack(list(embeddings.values()))}, temporary)
    except (OSError, SafetensorError) as error:
        logger.warning("%s: the embeddings cannot be kept for the next search: %s", file, error)


def _chunks(items: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
