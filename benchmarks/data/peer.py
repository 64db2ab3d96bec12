"""open_clip's own loader, measured in its own environment (see peer_environment.sh); started by run.py.

PEER_PYTHON benchmarks/data/peer.py SHARDS SIZE BATCH
"""

from __future__ import annotations

import io
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
import torchvision
import webdataset
from child import LoaderRate, Measured, repeat, serve
from open_clip.transform import AugmentationCfg, image_transform
from open_clip_train.data import get_wds_dataset
from PIL import Image


class Peer:
    def __init__(self, shards: Path, size: int, batch: int) -> None:
        torch.set_num_threads(1)
        self.shards, self.batch = shards, batch
        self.transform = image_transform(size, is_train=True, aug_cfg=AugmentationCfg(scale=(0.9, 1.0)))
        self.tokenizer = open_clip.get_tokenizer("ViT-B-32")
        self.loader = LoaderRate(self.open_loader, lambda batch: len(batch[0]), queued=2)
        source = webdataset.WebDataset(str(sorted(shards.glob("*.tar"))[0]), shardshuffle=False)
        self.images = [sample["jpg"] for sample, _ in zip(source, range(64), strict=False)]

    def open_loader(self) -> Iterator[Any]:
        paths = sorted(self.shards.glob("*.tar"))
        settings = Namespace(
            train_data=f"{self.shards}/shard-{{000000..{len(paths) - 1:06d}}}.tar",
            train_num_samples=10**9,
            train_data_upsampling_factors=None,
            dataset_resampled=False,
            seed=0,
            batch_size=self.batch,
            workers=1,
            world_size=1,
        )
        return iter(get_wds_dataset(settings, self.transform, is_train=True, tokenizer=self.tokenizer).dataloader)

    def first_batch(self) -> float:
        start = time.perf_counter()
        next(self.open_loader())
        return time.perf_counter() - start

    def pil(self, seconds: float) -> Measured:
        """Decode as the loader does, and its training transform."""
        count = len(self.images)
        return repeat(lambda n: self.transform(Image.open(io.BytesIO(self.images[n % count])).convert("RGB")), seconds)

    def tokens(self, texts: list[str]) -> list[list[int]]:
        return [[token for token in row if token] for row in self.tokenizer(texts).tolist()]

    def versions(self) -> dict[str, str]:
        modules = {"torch": torch, "torchvision": torchvision, "open_clip": open_clip, "webdataset": webdataset}
        return {name: module.__version__ for name, module in modules.items()}


if __name__ == "__main__":
    peer = Peer(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    serve(
        {
            "loader": peer.loader,
            "first_batch": peer.first_batch,
            "pil": peer.pil,
            "tokens": peer.tokens,
            "versions": peer.versions,
        }
    )
