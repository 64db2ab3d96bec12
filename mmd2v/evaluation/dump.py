"""What a retrieval result was computed from, in files that any other program can read.

::

    DIR/embeddings.safetensors   image [M, E], text [N, E], fp32, L2-normalised
    DIR/ids.json                 M ids, in the order of the rows
    DIR/positives.json           caption_image: N rows of images; captions: N texts
    DIR/result.json              the numbers

Shapes: M images, N captions, E width of an embedding.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mmd2v.errors import UserError
from mmd2v.evaluation.set_encoding import EncodedCaptions
from mmd2v.files import atomic_path, check_output, write_json

EMBEDDINGS = "embeddings.safetensors"
IDS = "ids.json"
POSITIVES = "positives.json"
RESULT = "result.json"


def check_dump(folder: Path) -> None:
    """Raise UserError, before anything is computed, when no dump can be put at ``folder``."""
    if folder.is_dir():
        if os.listdir(folder):
            raise UserError(f"--dump: {folder} is not empty; name a new folder")
    elif folder.exists():
        raise UserError(f"--dump: {folder} is a file, expected the name of a new folder")
    check_output("--dump", folder / EMBEDDINGS)


def write_dump(folder: Path, encoded: EncodedCaptions, result: dict[str, Any]) -> None:
    """Write the folder, whole or not at all."""
    described = encoded.described
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        tensors = {"image": encoded.image_ME.cpu().contiguous(), "text": encoded.text_NE.cpu().contiguous()}
        save_file(tensors, temporary / EMBEDDINGS)
        positives = {"caption_image": list(described.caption_image), "captions": list(described.captions)}
        for name, value in ((IDS, list(described.ids)), (POSITIVES, positives)):
            (temporary / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
        write_json(temporary / RESULT, result)
