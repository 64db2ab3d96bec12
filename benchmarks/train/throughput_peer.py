"""open_clip's own training, in its own environment (see benchmarks/data/peer_environment.sh); started by throughput.py.

    PEER_PYTHON benchmarks/train/throughput_peer.py SETTINGS.json THREADS

The model is of `open_clip.create_model`, the loader `get_wds_dataset`, the optimiser and schedule are those that
`open_clip_train.main` makes, and every step is one of `open_clip_train.train.train_one_epoch`, which is called itself:
an epoch is a window of steps.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import open_clip.tokenizer
import torch
import webdataset
from open_clip.transform import AugmentationCfg, image_transform
from open_clip_train.data import get_wds_dataset
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from PIL import Image
from throughput_child import Channel, Window, counted_flops, product_rate

PRECISIONS = {"fp32": "fp32", "bf16_autocast": "amp_bf16"}
DTYPES = {"fp32": torch.float32, "bf16_autocast": torch.bfloat16}
MODEL = "throughput_peer"


class Peer:
    """The model, its optimiser and its loader."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.device = torch.device(settings["device"])
        self.window = Window(self.device)
        name = settings["model"]
        if not isinstance(name, str):
            folder = Path(settings["folder"])
            (folder / f"{MODEL}.json").write_text(json.dumps(name), encoding="utf-8")
            open_clip.add_model_config(folder / f"{MODEL}.json")
            name = MODEL
        torch.manual_seed(0)
        precision = PRECISIONS[settings["precision"]]
        self.model = open_clip.create_model(name, precision=precision, device=self.device, output_dict=True)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.loss = open_clip.ClipLoss()
        self.optimizer = self._optimizer()
        self.rate = cosine_lr(self.optimizer, settings["lr"], settings["warmup_steps"], settings["steps"])
        self.done = 0
        side, patch = self.model.visual.image_size[0], self.model.visual.patch_size[0]
        self.image_tokens = (side // patch) ** 2 + 1
        self.statistics = {"mean": tuple(settings["mean"]), "std": tuple(settings["std"])}
        self.size = side
        self.batches: Iterator[Any] | None = None

    def _optimizer(self) -> torch.optim.Optimizer:
        """As `open_clip_train.main` makes it."""
        plain, rest = [], []
        for name, p in self.model.named_parameters():
            without_decay = p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
            (plain if without_decay else rest).append(p)
        groups = [
            {"params": plain, "weight_decay": 0.0},
            {"params": rest, "weight_decay": self.settings["weight_decay"]},
        ]
        return torch.optim.AdamW(
            groups, lr=self.settings["lr"], betas=tuple(self.settings["betas"]), eps=self.settings["eps"]
        )

    def loader(self) -> Iterator[Any]:
        """Batches without end."""
        augmentation = AugmentationCfg(scale=tuple(self.settings["crop_scale"]))
        transform = image_transform(self.size, is_train=True, aug_cfg=augmentation, **self.statistics)
        arguments = Namespace(
            train_data=self.settings["shards"],
            train_num_samples=10**9,
            train_data_upsampling_factors=None,
            dataset_resampled=False,
            seed=0,
            batch_size=self.settings["batch_size"],
            workers=self.settings["workers"],
            world_size=1,
        )
        loader = get_wds_dataset(arguments, transform, is_train=True, tokenizer=self.tokenizer).dataloader
        return self.window.batches(iter(loader), self._size)

    def _size(self, batch: Any) -> tuple[int, int]:
        """Samples; and tokens without padding: the end has the highest id of all."""
        images, texts = batch
        return len(images), len(images) * self.image_tokens + int((texts.argmax(-1) + 1).sum())

    def train(self, steps: int, uncounted: int) -> None:
        """Run steps, all but the first few of which are measured."""
        if self.batches is None:
            self.batches = self.loader()
        epoch = Epoch(self, steps, uncounted)
        arguments = Namespace(
            device=str(self.device),
            precision=PRECISIONS[self.settings["precision"]],
            distill=False,
            accum_freq=1,
            skip_scheduler=False,
            horovod=False,
            grad_clip_norm=self.settings["clip_norm"],
            rank=0,
            log_every_n_steps=10**9,
            batch_size=self.settings["batch_size"],
            world_size=1,
            wandb=False,
        )
        data = {"train": epoch}
        train_one_epoch(self.model, data, self.loss, 0, self.optimizer, None, self._schedule, None, arguments)

    def _schedule(self, _: int) -> None:
        self.rate(self.done)
        self.done += 1

    def measure(self, steps: int, uncounted: int) -> dict[str, float]:
        """Return what a window of steps took."""
        self.train(steps, uncounted)
        return self.window.end(steps - uncounted)

    def count(self) -> dict[str, int]:
        """Operations of one step."""
        self.window.reset()
        with counted_flops() as counter:
            self.train(1, 1)
        return {"flops": counter.get_total_flops(), "teacher_flops": 0, "samples": self.window.samples}

    def describe(self) -> dict[str, Any]:
        """What a reader should know of how it trains, and its vocabulary."""
        modules = {"torch": torch, "open_clip": open_clip, "webdataset": webdataset}
        return {
            "optimizer": "torch AdamW",
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "teacher_parameters": 0,
            "versions": {name: str(module.__version__) for name, module in modules.items()},
        }

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts without padding."""
        rows = self.tokenizer(texts)
        return [row[: end + 1].tolist() for row, end in zip(rows, rows.argmax(-1).tolist(), strict=True)]

    def finish(self, images: list[str], texts: list[str], out: str) -> bool:
        """Run the last step and write the embeddings of image files and texts to ``out``, a .npz."""
        self.train(1, 1)
        self.model.eval()
        self._embed(images, texts, out)
        return True

    @torch.no_grad()
    def _embed(self, images: list[str], texts: list[str], out: str) -> None:
        transform = image_transform(self.size, is_train=False, **self.statistics)
        size = 100

        def image_batch(files: list[str]) -> torch.Tensor:
            pixels = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
            return self.model.encode_image(pixels.to(self.device), normalize=True)

        def text_batch(some: list[str]) -> torch.Tensor:
            return self.model.encode_text(self.tokenizer(some).to(self.device), normalize=True)

        found = {
            "images": [image_batch(images[i : i + size]) for i in range(0, len(images), size)],
            "texts": [text_batch(texts[i : i + size]) for i in range(0, len(texts), size)],
        }
        np.savez(out, **{name: torch.cat(rows).float().cpu().numpy() for name, rows in found.items()})


class Epoch:
    """What `train_one_epoch` asks of its data, for a window of steps."""

    def __init__(self, peer: Peer, steps: int, uncounted: int) -> None:
        self.peer, self.num_batches, self.uncounted = peer, steps, uncounted
        self.num_samples = steps * peer.settings["batch_size"]
        self.dataloader = self

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the loader goes on."""

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.num_batches):
            # Everything of the step before is done when the next batch is asked for.
            if step == self.uncounted:
                self.peer.window.begin()
            yield next(self.peer.batches)


def main(path: str, threads: int) -> None:
    """Answer requests."""
    channel = Channel()
    torch.set_num_threads(threads)
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    peer = Peer(settings)
    operations = {
        "describe": peer.describe,
        "tokens": peer.tokens,
        "count": peer.count,
        "window": peer.measure,
        "finish": peer.finish,
        "product": lambda: product_rate(peer.device, DTYPES[settings["precision"]]),
    }
    channel.answer("ready")
    while True:
        request = channel.read()
        channel.answer(operations[request.pop("operation")](**request))


if __name__ == "__main__":
    if sys.argv[1] == "merges":  # where its byte pairs are
        print(open_clip.tokenizer.default_bpe())
    else:
        main(sys.argv[1], int(sys.argv[2]))
