"""Random numbers that belong to a sample, whichever rank and place in a batch it has.

A hash of 32 bits on the device in place of a generator: what is drawn is a function of a key and a counter alone.

Shapes: S sequences.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

from mmd2v.data.batch import Batch

_BITS = 0xFFFFFFFF
RANGE = _BITS + 1
"""Hashes are in [0, RANGE)."""
_GOLDEN = 0x9E3779B9


def mixed(x: torch.Tensor) -> torch.Tensor:
    """Return a hash in [0, 2³²) of each int64 in [0, 2³²) (Wellons' two-round multiply-xorshift)."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _BITS
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _BITS
    return x ^ (x >> 15)


def draw(keys: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Return a hash in [0, 2³²) of each key and counter (int64, broadcast against each other).

    Counters are taken modulo 2³²: what draws from one key for two purposes keeps their counters apart within that.
    """
    return mixed((mixed(keys) + mixed((counters * _GOLDEN) & _BITS)) & _BITS)


def sequence_keys(batch: Batch, kind: str) -> torch.Tensor:
    """Return int64 [S]: a key for every sequence of the batch that a modality of ``kind`` sees.

    Under `Batch.draw_seed` it is of that seed, the sample's id and, of a text, its place among the sample's texts.
    Without one (or ids) it is drawn from torch's generator.
    """
    device = batch.images.device
    sequences = len(batch.text_lengths) if kind == "text" else len(batch)
    if batch.draw_seed is None or len(batch.sample_ids) != len(batch):
        return torch.randint(0, RANGE, (sequences,), device=device)
    seed = (batch.draw_seed ^ (batch.draw_seed >> 32)) & _BITS
    ids = np.fromiter((zlib.crc32(name.encode()) for name in batch.sample_ids), np.int64, len(batch))
    on_host = torch.from_numpy(ids)
    on_device = on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host
    keys_B = draw(on_device, on_device.new_full((1,), 0) + seed)
    if kind != "text":
        return keys_B
    of_N = batch.caption_image
    # The captions of an image lie together: its first one is where its row number first stands.
    place_N = torch.arange(sequences, device=device) - torch.searchsorted(of_N, of_N)
    return draw(keys_B[of_N], place_N)
