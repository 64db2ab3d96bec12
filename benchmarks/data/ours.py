"""mmd2v's loader and its stages, measured in a process of their own; started by run.py.

python benchmarks/data/ours.py SHARDS TOKENIZER SIZE BATCH
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import psutil
import torch
from child import LoaderRate, Measured, repeat, serve, settle
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as bare_decode

from mmd2v.config.schema import DataConfig
from mmd2v.data.batch import Batch
from mmd2v.data.bench import Stages
from mmd2v.data.shards import ShardSet
from mmd2v.data.stream import train_loader
from mmd2v.data.tokenizers import load_tokenizer


class Ours:
    def __init__(self, shards: str, tokenizer: str, size: int, batch: int) -> None:
        torch.set_num_threads(1)
        self.batch = batch
        self.config = DataConfig.model_validate(
            {
                "train": {"shards": shards},
                "image": {"size": size, "crop_scale": (0.9, 1.0)},
                "tokenizer": {"path": tokenizer, "max_length": 77},
                "workers": 1,
            }
        )
        self.tokenizer = load_tokenizer(self.config.tokenizer)
        self.loader = LoaderRate(self.open_loader, lambda batch: len(batch.sample_ids), queued=self.config.prefetch)
        self.stages = Stages(shards, self.config.image, self.tokenizer)
        samples = ShardSet(shards).read_many([(0, row) for row in range(64)])
        self.images = [torch.frombuffer(sample.image, dtype=torch.uint8) for sample in samples]

    def open_loader(self, start: int = 0, limit: int | None = None) -> Iterator[Batch]:
        train = self.config.train.model_copy(update={"limit": limit})
        return iter(
            train_loader(
                self.config.model_copy(update={"train": train}),
                seed=0,
                tokenizer=self.tokenizer,
                rank=0,
                world_size=1,
                micro_batch_size=self.batch,
                start_index=start,
            )
        )

    def bare_decode(self, seconds: float) -> Measured:
        """Decode alone, torchvision's own function without mmd2v."""
        return repeat(lambda n: bare_decode(self.images[n % len(self.images)], ImageReadMode.RGB), seconds)

    def stage_times(self, seconds: float) -> dict:
        return asdict(self.stages.run(seconds, self.batch))

    def first_batch(self, epochs: float = 0.0) -> float:
        """Seconds to the first batch of a new loader that resumes after so many epochs."""
        start = int(epochs * len(self.stages.shards)) // self.batch * self.batch
        began = time.perf_counter()
        next(self.open_loader(start))
        return time.perf_counter() - began

    def memory(self, passes: int, samples: int) -> list[float]:
        """MB of this process and its worker after each pass over the first ``samples`` of the set."""
        batches = self.open_loader(limit=samples)
        taken = []
        for _ in range(passes):
            for _ in islice(batches, samples // self.batch):
                pass
            settle()  # batches in flight are memory too
            taken.append(resident_megabytes())
        del batches
        gc.collect()
        return taken

    def tokens(self, texts: list[str]) -> list[list[int]]:
        ids, lengths = self.tokenizer.encode_batch(texts)
        return [row.tolist() for row in torch.from_numpy(ids).split(lengths.tolist())]


def resident_megabytes() -> float:
    """Memory of this process and its children that is no file; what they share counts once."""
    process = psutil.Process()
    total = 0
    for one in (process, *process.children(recursive=True)):
        lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()[1:]
        fields = dict(line.split(":") for line in lines)
        total += sum(int(fields[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem")) * 1024
    return total / 1e6


if __name__ == "__main__":
    ours = Ours(str(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    serve(
        {
            "loader": ours.loader,
            "bare_decode": ours.bare_decode,
            "stages": ours.stage_times,
            "first_batch": ours.first_batch,
            "memory": ours.memory,
            "tokens": ours.tokens,
        }
    )
