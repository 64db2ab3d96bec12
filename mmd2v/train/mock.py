"""Batches that have the form of real ones and need no data set."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmd2v.config.schema import Config
from mmd2v.data.batch import Batch
from mmd2v.data.stored_outputs import StoredOutputs
from mmd2v.data.tokenizers import Tokenizer


def mock_batch(
    config: Config, tokenizer: Tokenizer | None, images: int, seed: int = 0, *, outputs: Sequence[StoredOutputs] = ()
) -> Batch:
    """Return ``images`` samples, on the CPU: random images (unless the run uses none), arrays, and captions of
    greatest length.

    The greatest length, because the batch is to show how much memory a step can need. Stored
    ``outputs`` of teachers are zeros.
    """
    random = torch.Generator().manual_seed(seed)
    size, each = config.data.image.size if config.uses_images else 0, config.data.captions_per_image
    captions = images * each if tokenizer else 0
    length = tokenizer.max_length if tokenizer else 0
    ids = torch.zeros(0, dtype=torch.int32)
    if tokenizer:
        ids_NL = torch.randint(0, tokenizer.vocab_size, (captions, length), dtype=torch.int32, generator=random)
        ids_NL[:, 0] = tokenizer.cls_id
        ids = ids_NL.flatten()
    classes = config.label_classes
    return Batch(
        images=torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=random),
        text_ids=ids,
        text_lengths=torch.full((captions,), length, dtype=torch.int32),
        caption_image=torch.arange(captions) // each,
        sample_ids=tuple(f"mock-{i}" for i in range(images)),
        labels=None if classes is None else torch.randint(0, 2, (images, classes), generator=random).float(),
        arrays={name: torch.randn(images, *one.shape, generator=random) for name, one in config.array_inputs.items()},
        teacher_outputs={key: value for stored in outputs for key, value in stored.zeros(images).items()},
    )
