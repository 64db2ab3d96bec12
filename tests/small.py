"""A small model and batch of generated data that many tests build on."""

import numpy as np
import torch

from mmd2v.config.schema import Config
from mmd2v.data.batch import Batch


class StubTokenizer:
    """What a model asks of a tokenizer."""

    vocab_size, max_length, cls_id, pad_id = 50, 16, 1, 0


def small_config(**changes) -> Config:
    data = {
        "name": "small",
        "run_dir": "unused",
        "steps": 2,
        "data": {
            "train": {"shards": "unused"},
            "image": {"size": 32},
            "tokenizer": {"path": "unused", "max_length": 16},
        },
        "model": {
            "width": 16,
            "heads": 2,
            "encoders": {
                "image": {"kind": "patch", "patch_size": 8},
                "text": {"kind": "tokens"},
            },
            "layers": [{"kind": "separate"}, {"kind": "mome"}, {"kind": "shared"}],
        },
        "objectives": [{"kind": "contrastive"}],
        "engine": {"batch_size": 4, "precision": "bf16_autocast"},
    }
    for path, value in changes.items():
        node = data
        *parents, last = path.split("__")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return Config.model_validate(data)


def random_batch(images: int = 4, captions: int = 1, size: int = 32, seed: int = 0) -> Batch:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 9, images * captions)
    return Batch(
        images=torch.from_numpy(generator.integers(0, 256, (images, 3, size, size), dtype=np.uint8)),
        text_ids=torch.from_numpy(generator.integers(2, 50, lengths.sum()).astype(np.int32)),
        text_lengths=torch.from_numpy(lengths.astype(np.int32)),
        caption_image=torch.arange(images).repeat_interleave(captions),
        sample_ids=tuple(f"s{i}" for i in range(images)),
    )
