"""Embeddings of a folder of images or a file of texts: NAME.safetensors, and in NAME.ids.json what each row is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mmd2v.errors import UserError
from mmd2v.files import atomic_path, check_output, write_json
from mmd2v.gallery import list_images
from mmd2v.inference import Encoder
from mmd2v.progress import Progress


def embed_images(encoder: Encoder, folder: str | Path, out: str | Path, batch_size: int = 64) -> tuple[int, int]:
    """Embed every image below ``folder`` in order of path and return the shape [N, E].

    The ids are paths relative to ``folder``. Raises UserError naming an image that does not decode: rows must not
    go missing unseen. An existing output is never replaced.
    """
    paths = list_images(folder)
    ids = [path.relative_to(folder).as_posix() for path in paths]
    return _write(encoder.encode_image, paths, ids, Path(out), batch_size, "images")


def embed_texts(encoder: Encoder, file: str | Path, out: str | Path, batch_size: int = 256) -> tuple[int, int]:
    """Embed every line of ``file`` and return the shape [N, E]. Raises UserError naming a line that is empty."""
    try:
        texts = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--texts: {file} does not read as UTF-8 text: {error}") from error
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise UserError(f"--texts: {file}, line {number} is empty, expected a text a line")
    if not texts:
        raise UserError(f"--texts: {file} is empty, expected a text a line")
    return _write(encoder.encode_text, texts, texts, Path(out), batch_size, "texts")


def _write(
    encode: Callable[..., torch.Tensor], items: Sequence, ids: list[str], out: Path, batch_size: int, unit: str
) -> tuple[int, int]:
    if batch_size < 1:
        raise UserError(f"--batch-size: found {batch_size}, expected at least 1")
    names = out.with_suffix(".ids.json")
    for file in (out, names):
        check_output("--out", file, new=True)
    rows = []
    with Progress("encoding", len(items), unit=unit) as progress:
        for start in range(0, len(items), batch_size):
            chunk = items[start : start + batch_size]
            rows.append(encode(chunk, batch_size).cpu())
            progress.advance(len(chunk))
    embeddings = torch.cat(rows)
    try:
        # The inner one appears first: where the embeddings are, their names are too.
        with atomic_path(out) as rows_file, atomic_path(names) as ids_file:
            save_file({"embeddings": embeddings}, rows_file)
            write_json(ids_file, {"ids": ids})
    except (OSError, SafetensorError) as error:
        names.unlink(missing_ok=True)  # it was not there before
        raise UserError(f"--out: {out} cannot be written: {error}") from error
    return len(embeddings), embeddings.shape[1]
