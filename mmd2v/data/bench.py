"""How fast a data set loads on this machine, stage by stage, and which stage limits it.

The stages run one after the other on every sample, as in the loader, in one process on one thread; the loader is
measured apart, with its own processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from mmd2v.config.schema import DataConfig, ImageTransformConfig, SourceConfig, TokenizerConfig
from mmd2v.data.cursor import Cursor
from mmd2v.data.damage import Damage
from mmd2v.data.shards import ShardSet
from mmd2v.data.stream import train_loader
from mmd2v.data.tokenizers import Tokenizer, load_tokenizer
from mmd2v.data.transforms import decode_image, train_transform
from mmd2v.errors import UserError

_SEED = 0
STAGES = {
    "read": "bytes out of the shards",
    "decode": "image bytes to pixels",
    "crop": "random crop, resize, flip",
    "tokens": "one caption to ids",
}
_ADVICE = {
    "read": "the files arrive slowly: a faster or a nearer disk, or more workers, which wait at the same time",
    "decode": "the images on disk are larger than need be: pack them with --resize, or give more cores to --workers",
    "crop": "the images on disk are larger than need be: pack them with --resize, or give more cores to --workers",
    "tokens": "the tokenizer is slow for these captions; more cores for --workers help",
}


@dataclass
class StageTimes:
    """Seconds that each stage has taken, over the same samples."""

    samples: int
    bytes: int
    """Encoded bytes of their images."""
    seconds: dict[str, float]

    def rate(self, stage: str) -> float:
        """Samples a second if there were this stage alone."""
        return self.samples / max(self.seconds[stage], 1e-9)

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())


class Stages:
    """The loader's work on one data set, cut into stages that are timed one by one, in the order of training."""

    def __init__(
        self,
        shards: str | Sequence[str],
        image: ImageTransformConfig,
        tokenizer: Tokenizer | None,
        window: int = 16,
        source: SourceConfig | None = None,
    ) -> None:
        """Open the shards; ``window`` is how many of them are shuffled together."""
        self.image, self.tokenizer = image, tokenizer
        self.shards = ShardSet(shards, cache=2 * window, source=source)
        self._cursor = Cursor(self.shards.counts, seed=_SEED, window=window)
        self._next = 0

    def run(self, seconds: float, batch: int) -> StageTimes:
        """Work for at least that long, and to the end of a batch, from where the last call stopped.

        Damaged samples are passed over.

        Raises:
            Damage: every sample is damaged.
        """
        spent = {name: 0.0 for name in STAGES if name != "tokens" or self.tokenizer is not None}
        samples = size = damaged = 0
        clock = time.perf_counter
        end = clock() + seconds
        # Each image goes into a batch's row, so that as much memory is used as in the loader.
        side = self.image.size
        rows = torch.empty((batch, 3, side, side), dtype=torch.uint8, memory_format=torch.channels_last)
        while samples == 0 or clock() < end:
            start = clock()
            places = [self._cursor[index] for index in range(self._next, self._next + batch)]
            self._next += batch
            found = self.shards.read_many([(place.shard, place.row) for place in places])
            spent["read"] += clock() - start
            captions: list[str] = []
            for place, row, raw in zip(places, rows, found, strict=True):
                try:
                    if isinstance(raw, Damage):
                        raise raw
                    start = clock()
                    assert raw.image is not None  # images were asked for
                    pixels = decode_image(raw.image, raw.where)
                except Damage:
                    damaged += 1
                    if not samples and not captions and damaged >= len(self.shards):
                        raise
                    continue
                decoded = clock()
                row.copy_(train_transform(pixels, self.image, seed=_SEED, epoch=place.epoch, sample_id=raw.id))
                spent["decode"] += decoded - start
                spent["crop"] += clock() - decoded
                captions.append(raw.captions[0])
                size += len(raw.image)
            start = clock()
            if self.tokenizer is not None:
                self.tokenizer.encode_batch(captions)
                spent["tokens"] += clock() - start
            samples += len(captions)
        return StageTimes(samples, size, spent)


@dataclass(frozen=True)
class BenchReport:
    """What `bench` measured."""

    stages: StageTimes
    loader_samples: int
    loader_seconds: float
    first_batch: float
    """Seconds from the call to the first batch, processes started."""
    workers: int
    cores: int
    """Cores this process may use."""

    @property
    def loader_rate(self) -> float:
        """Samples a second of the whole loader."""
        return self.loader_samples / self.loader_seconds

    @property
    def limit(self) -> str:
        """The stage that takes most of a loader process's time."""
        return max(self.stages.seconds, key=lambda name: self.stages.seconds[name])

    def __str__(self) -> str:
        """A table, and what limits."""
        size = self.stages.bytes / self.stages.samples / 1e6  # MB an image
        lines = [f"{'stage':<10} {'samples/s':>10} {'MB/s':>8} {'share':>6}   a core"]
        for name, seconds in self.stages.seconds.items():
            rate = self.stages.rate(name)
            megabytes = "" if name == "tokens" else f"{rate * size:,.1f}"
            share = f"{seconds / self.stages.total:.0%}"
            lines.append(f"{name:<10} {rate:>10,.0f} {megabytes:>8} {share:>6}   {STAGES[name]}")
        alone = self.stages.samples / self.stages.total
        lines.append(f"{'all':<10} {alone:>10,.0f} {alone * size:>8,.1f} {'':>6}   the stages in one process")
        processes = f"{self.workers} processes" if self.workers > 1 else "1 process" if self.workers else "no process"
        each = self.loader_rate / max(1, self.workers)
        lines.append(
            f"{'loader':<10} {each:>10,.0f} {each * size:>8,.1f} {'':>6}   "
            f"{self.loader_rate:,.0f} samples/s in all with {processes} of its own on {self.cores} cores; "
            f"first batch after {self.first_batch:.1f} s"
        )
        share = self.stages.seconds[self.limit] / self.stages.total
        lines.append(f"limit: {self.limit}, {share:.0%} of a loader process's time: {_ADVICE[self.limit]}")
        if self.workers > self.cores:
            lines.append(f"--workers {self.workers} is more than the {self.cores} cores there are")
        elif each < 0.7 * alone:
            lines.append(
                f"the loader reaches {each / alone:.0%} of what its stages allow: other programs use its cores, or its "
                "processes share them with this one"
            )
        return "\n".join(lines)


def bench(
    shards: Sequence[str],
    *,
    size: int = 224,
    batch: int = 64,
    workers: int = 1,
    seconds: float = 10.0,
    tokenizer: str | Path | None = None,
    source: SourceConfig | None = None,
) -> BenchReport:
    """Measure the stages for about half of ``seconds`` and the loader for the other half.

    Args:
        shards: see `mmd2v.data.shards.expand_shards`.
        size: side of the training image.
        batch: images of a batch.
        workers: loader processes.
        seconds: of measurement, without the start of the processes.
        tokenizer: file or folder; its kind is told by its name. None: no text.
        source: how shards that are no local files are fetched; none: the defaults.

    Raises:
        UserError: a value out of range, or anything wrong with shards or tokenizer.
    """
    for flag, value, least in (("--size", size, 1), ("--batch", batch, 1), ("--workers", workers, 0)):
        if value < least:
            raise UserError(f"{flag}: found {value}, expected at least {least}")
    if not seconds > 0:
        raise UserError(f"--seconds: found {seconds:g}, expected more than 0")
    text = None if tokenizer is None else TokenizerConfig(kind=tokenizer_kind(tokenizer), path=str(tokenizer))
    config = DataConfig.model_validate(
        {
            "train": {"shards": list(shards)},
            "image": {"size": size},
            "tokenizer": None if text is None else text.model_dump(),
            "workers": workers,
            "source": (source if source is not None else SourceConfig()).model_dump(),
        }
    )
    loaded = None if text is None else load_tokenizer(text)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    try:
        stages = Stages(list(shards), config.image, loaded, config.shuffle_shards, config.source)
        try:
            stages.run(0, batch)  # imports, first pages of the files
            times = stages.run(seconds / 2, batch)
        finally:
            stages.shards.close()
        taken, first, samples = time_loader(config, loaded, batch=batch, seconds=seconds / 2)
    finally:
        torch.set_num_threads(threads)
    return BenchReport(times, samples, taken, first, workers, len(os.sched_getaffinity(0)))


def time_loader(
    config: DataConfig, tokenizer: Tokenizer | None, *, batch: int, seconds: float
) -> tuple[float, float, int]:
    """Return (seconds measured, seconds to the first batch, samples measured) of a training loader at full speed."""
    clock = time.perf_counter
    began = clock()
    loader = train_loader(config, seed=_SEED, tokenizer=tokenizer, rank=0, world_size=1, micro_batch_size=batch)
    batches = iter(loader)
    next(batches)
    first = clock() - began
    # Batches that were made while nobody was waiting say nothing about the rate.
    for _ in islice(batches, config.workers * (config.prefetch + 1)):
        pass
    start = now = clock()
    samples = 0
    while samples == 0 or now - start < seconds:
        samples += len(next(batches).sample_ids)
        now = clock()
    if isinstance(batches, Generator):
        batches.close()  # ends the processes, and closes the shards
    return now - start, first, samples


def tokenizer_kind(path: str | Path) -> str:
    """Tell the kind of a tokenizer, as in `TokenizerConfig`, by its files."""
    path = Path(path).expanduser()
    if path.suffix == ".model" or (path.is_dir() and any(path.glob("*.model")) and not (path / "dict.txt").exists()):
        return "sentencepiece"
    return "fairseq_gpt2" if path.is_dir() and (path / "dict.txt").exists() else "hf"
