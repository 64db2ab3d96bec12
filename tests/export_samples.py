"""Small exports, images and shards for the tests of everything that uses an encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from small import small_config

from mmd2v.config.schema import Config
from mmd2v.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from mmd2v.export import write_export
from mmd2v.models.student import Student, build_student

CAPTIONS = ["a red circle on a green background", "two blue squares", "a small yellow star above a large cross"]


def tokenizer_file(folder: Path) -> Path:
    path = folder / "words.json"
    train_tokenizer(CAPTIONS, "wordlevel", 60).save(str(path))
    return path


def build(folder: Path, **changes) -> tuple[Config, Tokenizer, Student]:
    """A student with weights drawn at random, in eval mode."""
    tokenizer = {"path": str(tokenizer_file(folder)), "max_length": 16}
    config = small_config(data__tokenizer=tokenizer, data__workers=0, **changes)
    loaded = load_tokenizer(config.data.tokenizer)
    student = build_student(config, loaded)
    # Initial projections are small; spread the embeddings so that nothing ties.
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return config, loaded, student.eval()


def small_export(folder: Path, **changes) -> Path:
    config, tokenizer, student = build(folder, **changes)
    write_export(folder / "export", student, config, tokenizer)
    return folder / "export"


def photo(seed: int, size: tuple[int, int] = (60, 44)) -> Image.Image:
    """A smooth picture, which JPEG keeps well."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def photo_folder(folder: Path, count: int = 6) -> Path:
    """Images of three formats, one of them in a subfolder, and a file that is none."""
    (folder / "below").mkdir(parents=True)
    for i in range(count):
        place = folder / "below" if i == 0 else folder
        photo(i).save(place / f"photo{i}.{('jpg', 'png', 'webp')[i % 3]}")
    (folder / "notes.txt").write_text("no image")
    return folder
