"""What decides the outputs of a frozen teacher on the training samples, as values that a later run can compare.

What a sample looks like in an epoch is a function of (data.image, seed, epoch, sample id), so a frozen teacher gives
the same for it in every run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmd2v.config.schema import DataConfig, ImageTransformConfig
from mmd2v.data.damage import Damage
from mmd2v.data.shards import ShardSet
from mmd2v.data.tokenizers import Tokenizer

_HASHED_AT_ONCE = 1 << 24  # bytes
_READ_AT_ONCE = 256  # samples
_SHOWN = 3  # differences


def is_fixed(image: ImageTransformConfig) -> bool:
    """Whether an image looks the same in every epoch of training."""
    return image.crop_scale == (1.0, 1.0) and image.flip in (0.0, 1.0)


def image_settings(data: DataConfig, seed: int) -> dict[str, Any]:
    """Config key → value, of all that decides how training shows an image to a teacher."""
    image = data.image
    return {
        "data.decode": data.decode,
        "data.image.size": image.size,
        "data.image.interpolation": image.interpolation,
        "data.image.crop_scale": list(image.crop_scale),
        "data.image.crop_ratio": None if image.crop_scale == (1.0, 1.0) else list(image.crop_ratio),
        "data.image.flip": image.flip,
        "seed": None if is_fixed(image) else seed,
    }


def text_settings(data: DataConfig, tokenizer: Tokenizer, seed: int) -> dict[str, Any]:
    """Config key → value, of all that decides which captions training shows to a teacher, and as which tokens."""
    return {
        "data.captions_per_image": data.captions_per_image,
        "data.tokenizer.max_length": tokenizer.max_length,
        "data.tokenizer.append_end": tokenizer.append_end,
        "data.tokenizer (sha256 of its files)": tokenizer.fingerprint,
        "seed": seed,
    }


def digest(files: Iterable[str | Path]) -> str:
    """SHA-256 of some files' contents one after another, in hexadecimal: their names and folders do not matter."""
    whole = hashlib.sha256()
    for file in files:
        own = hashlib.sha256()
        with open(file, "rb") as handle:
            while part := handle.read(_HASHED_AT_ONCE):
                own.update(part)
        whole.update(own.digest())
    return whole.hexdigest()


def differences(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """``KEY differs: stored X, now Y`` for every setting that is not the same."""
    keys = [*present, *(key for key in stored if key not in present)]
    return [
        f"{key} differs: stored {_shown(stored.get(key))}, now {_shown(present.get(key))}"
        for key in keys
        if stored.get(key) != present.get(key)
    ]


def listed(found: Sequence[str]) -> str:
    """Join differences to a part of a sentence, the first few of many."""
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def _shown(value: Any) -> str:
    is_digest = isinstance(value, str) and len(value) == hashlib.sha256().digest_size * 2
    return f"{value[:12]}…" if is_digest else json.dumps(value, ensure_ascii=False)


def captions_fixed(shards: ShardSet, shard: int, count: int) -> bool:
    """Whether every epoch takes the same ``count`` captions of each sample of a shard: all, or all several times.

    Stops to read at the first sample of which it does not.
    """
    rows = range(int(shards.counts[shard]))
    for start in range(0, len(rows), _READ_AT_ONCE):
        places = [(shard, row) for row in rows[start : start + _READ_AT_ONCE]]
        for sample in shards.read_many(places, images=False):
            # A damaged sample is left out in every epoch.
            if not isinstance(sample, Damage) and count % len(sample.captions):
                return False
    return True
