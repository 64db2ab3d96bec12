"""Embeddings of earlier evaluations, by the content of what they were computed from.

A file's name is a hash of the model's files, its preprocessing, the ids, the captions and the bytes of all images:
where any of them has changed, the file is another one, and nothing old is ever taken for it. A model that is no file
here (of a hub, say) counts by its name.

Shapes: M images, N captions, E width of an embedding.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import mmd2v
from mmd2v.data.annotation_settings import digest
from mmd2v.distributed.collectives import gather_objects
from mmd2v.distributed.coordination import from_main_rank
from mmd2v.errors import UserError
from mmd2v.evaluation.models import RetrievalModel
from mmd2v.evaluation.set_encoding import Described, EncodedCaptions
from mmd2v.files import atomic_path, check_output

logger = logging.getLogger(__name__)

_FORMAT = 1


def check_cache(folder: Path) -> None:
    """Raise UserError when no file can be written into the folder of a cache."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--cache: {folder} is a file, expected a folder")
    check_output("--cache", folder / "embeddings.safetensors")


def model_content(spec: str | Path) -> str:
    """SHA-256 of all files that a model's name names, and of the name without their folders. Reads them whole."""
    text, found = str(spec), []
    for part in [text, *_parts(text)]:
        if Path(part).exists():
            found.append(Path(part))
            text = text.replace(part, "*")
    files = [file for place in found for file in _files(place)]
    return hashlib.sha256(json.dumps([text, digest(files)]).encode()).hexdigest()


def cached_or(
    folder: Path,
    spec: str | Path,
    model: RetrievalModel,
    described: Described,
    encode: Callable[[], EncodedCaptions],
) -> EncodedCaptions:
    """Return the embeddings of a set, computed by ``encode`` unless the folder has them; every rank must call it.

    Raises UserError as ``encode`` does. A file that cannot be read counts as absent; one that cannot be written is
    warned of.
    """
    key: str = from_main_rank(lambda: _key(spec, model, described))
    path = folder / f"{key}.safetensors"
    found = _load(path, key, described)
    if all(gather_objects(found is not None)):
        assert found is not None
        image_ME, text_NE = (rows.to(model.device) for rows in found)
        return EncodedCaptions(image_ME, text_NE, described)
    encoded = encode()
    if encoded.described == described:  # no image was replaced meanwhile
        from_main_rank(lambda: _save(path, key, encoded))
    return encoded


def _key(spec: str | Path, model: RetrievalModel, described: Described) -> str:
    content = {
        "format": _FORMAT,
        "mmd2v": mmd2v.__version__,
        "model": model_content(spec),
        "name": model.name,
        "device": model.device.type,
        "preprocessing": model.preprocessing(),
        "ids": described.ids,
        "captions": described.captions,
        "caption_image": described.caption_image,
        "images": hashlib.sha256(b"".join(described.digests)).hexdigest(),
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _load(path: Path, key: str, described: Described) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                raise SafetensorError("it is of something else")
            image, text = file.get_tensor("image"), file.get_tensor("text")
    except (OSError, SafetensorError) as error:
        logger.warning("--cache: %s is not used: %s", path, error)
        return None
    expected = len(described.ids), len(described.captions)
    return (image, text) if (len(image), len(text)) == expected else None


def _save(path: Path, key: str, encoded: EncodedCaptions) -> None:
    tensors = {"image": encoded.image_ME.cpu().contiguous(), "text": encoded.text_NE.cpu().contiguous()}
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"key": key})
    except (OSError, SafetensorError) as error:
        logger.warning("--cache: %s cannot be written: %s", path, error)


def _parts(spec: str) -> list[str]:
    """What may be a path in ``KIND:PATH@PATH``, longest first."""
    parts = {*re.split(r"[:@,]", spec), spec.partition(":")[2]} - {""}
    return sorted(parts, key=len, reverse=True)


def _files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
        return
    for folder, folders, names in os.walk(place):
        folders.sort()
        yield from (Path(folder) / name for name in sorted(names))
