"""Shards → batches, in loader processes: where → bytes → pixels and tokens → `Batch`.

Worker w of a rank makes the rank's batches w, w + workers, …, and batches are handed out in turn, so the sequence is
the same for every number of workers. What a sample looks like in an epoch (crop, flip, captions) depends on (seed,
epoch, sample id) alone.

Shapes: B images, N captions, S tokens, A labels, H W pixels.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info
from webdataset import DataPipeline

from mmd2v.config.schema import DataConfig, ShardsConfig
from mmd2v.data.batch import Batch
from mmd2v.data.cursor import Cursor, Position, micro_batches
from mmd2v.data.draws import permutation
from mmd2v.data.shards import RawSample, ShardSet
from mmd2v.data.tokenizers import Tokenizer
from mmd2v.data.transforms import decode_image, eval_transform, train_transform
from mmd2v.errors import UserError


class FetchedSample(NamedTuple):
    """A sample's bytes and the epoch it is used in."""

    epoch: int
    raw: RawSample


@dataclass(frozen=True)
class _Failure:
    """A UserError on its way out of a worker: torch would wrap the exception itself in a traceback."""

    message: str


def dataset_size(shards: ShardsConfig) -> int:
    """Number of images of a data set (its ``limit`` respected)."""
    return len(ShardSet(shards.shards, shards.limit))


def chosen_captions(sample: RawSample, count: int, *, seed: int, epoch: int) -> list[str]:
    """The ``count`` captions of a sample for an epoch: its permuted captions, continued from epoch to epoch.

    Every caption has its turn, and none comes twice in an epoch as long as there are ``count`` of them.
    """
    total = len(sample.captions)
    order = permutation(total, "order of captions", seed, sample.id)
    return [sample.captions[order[(epoch * count + place) % total]] for place in range(count)]


class Loader:
    """Batches of one rank; every ``iter`` starts over. A UserError from a worker is raised here as it is.

    Attributes:
        batches: how many batches an iteration gives; None without end.
    """

    def __init__(
        self, pipeline: DataPipeline, config: DataConfig, batches: int | None, pin_memory: bool | None = None
    ) -> None:
        """Wrap a pipeline of `Batch` in loader processes; ``pin_memory`` None: when there is a CUDA device."""
        self.batches = batches
        # The tokenizers library must not start threads in forked loader processes.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        workers = config.workers if batches is None else min(config.workers, batches)
        self._loader: DataLoader = DataLoader(
            pipeline,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=config.prefetch if workers else None,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            worker_init_fn=_start_worker,
        )

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        while True:
            try:
                item = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise UserError(
                    f"a loader process died ({str(error).splitlines()[0]}): most often the machine ran out of memory "
                    "or of shared memory (/dev/shm); lower data.workers or data.prefetch"
                ) from error
            if isinstance(item, _Failure):
                raise UserError(item.message)
            yield item

    def __len__(self) -> int:
        """Batches of a finite loader."""
        if self.batches is None:
            raise TypeError("a training loader has no length: it never ends")
        return self.batches


def _start_worker(worker: int) -> None:
    # One process a core: more threads in each would only fight.
    torch.set_num_threads(1)
    # Ctrl-C goes to the whole group; the training process answers it and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _worker_share() -> tuple[int, int]:
    """(this worker, number of workers); (0, 1) in the training process."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info is not None else (0, 1)


def train_loader(
    config: DataConfig,
    *,
    seed: int,
    tokenizer: Tokenizer | None,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    accumulation: int = 1,
    start_index: int = 0,
    pin_memory: bool | None = None,
) -> Loader:
    """Micro-batches of one rank, without end, from a global sample index on.

    Args:
        config: the data section of a run.
        seed: of the order, the augmentation and the choice of captions.
        tokenizer: None leaves the text of the batches empty.
        rank: this rank.
        world_size: number of ranks, W.
        micro_batch_size: images of a micro-batch, m.
        accumulation: micro-batches of a step, a; a step takes G = W·m·a samples, the same ones for any W at equal G.
        start_index: global index of the first sample: 0, or steps · G to resume.
        pin_memory: pin the batches; None: when there is a CUDA device.

    Raises:
        UserError: shards missing or damaged; while iterating: a sample that cannot be read, naming shard and sample.
    """
    step = world_size * micro_batch_size * accumulation
    if start_index % step:
        raise UserError(
            f"start index: found {start_index}, expected a multiple of the {step} samples of a step "
            f"({world_size} ranks × {micro_batch_size} × {accumulation})"
        )
    # A batch may straddle two windows of shards.
    shards = ShardSet(config.train.shards, config.train.limit, cache=2 * config.shuffle_shards)
    cursor = Cursor(shards.counts, seed=seed, window=config.shuffle_shards)
    positions = _TrainPositions(cursor, start_index, rank, world_size, micro_batch_size)
    collate = _Collate(_Augment(config, seed), tokenizer, config.labels)
    return Loader(DataPipeline(positions, _Fetch(shards), collate, _report), config, None, pin_memory)


def eval_loader(
    config: DataConfig,
    *,
    shards: ShardsConfig,
    tokenizer: Tokenizer | None,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool | None = None,
) -> Loader:
    """This rank's contiguous slice of the images in file order, each once, with all their captions in order.

    Slices differ by at most one image and may be empty; nothing is padded or repeated.

    Raises:
        UserError: as `train_loader`.
    """
    shard_set = ShardSet(shards.shards, shards.limit)
    total = len(shard_set)
    first, last = rank * total // world_size, (rank + 1) * total // world_size

    positions = _EvalPositions(shard_set, first, last, batch_size)
    collate = _Collate(_Evaluate(config), tokenizer, None)
    batches = math.ceil((last - first) / batch_size)
    return Loader(DataPipeline(positions, _Fetch(shard_set), collate, _report), config, batches, pin_memory)


# The stages are objects and no closures, so that loader processes can be spawned as well as forked.


@dataclass(frozen=True)
class _TrainPositions:
    """First stage in training: where this worker's micro-batches lie."""

    cursor: Cursor
    start_index: int
    rank: int
    world_size: int
    micro_batch_size: int

    def __call__(self) -> Iterator[list[Position]]:
        worker, workers = _worker_share()
        share = micro_batches(
            start_index=self.start_index,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_size=self.micro_batch_size,
            first=worker,
            stride=workers,
        )
        for indices in share:
            yield [self.cursor[index] for index in indices]


@dataclass(frozen=True)
class _EvalPositions:
    """First stage in evaluation: this worker's share of the images ``first`` … ``last - 1`` in file order."""

    shards: ShardSet
    first: int
    last: int
    batch_size: int

    def __call__(self) -> Iterator[list[Position]]:
        worker, workers = _worker_share()
        for start in range(self.first + worker * self.batch_size, self.last, workers * self.batch_size):
            rows = range(start, min(start + self.batch_size, self.last))
            yield [Position(0, *self.shards.locate(row)) for row in rows]


@dataclass(frozen=True)
class _Fetch:
    """Second stage: positions → bytes, by random access. Another way to read shards replaces this stage alone."""

    shards: ShardSet

    def __call__(self, source: Iterator[list[Position]]) -> Iterator[list[FetchedSample]]:
        for places in source:
            yield [FetchedSample(place.epoch, self.shards.read(place.shard, place.row)) for place in places]


class _Augment:
    """What training makes of a sample: a random crop and some of its captions."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.image_config = config.image
        self.captions_per_image = config.captions_per_image
        self.seed = seed

    def image(self, sample: FetchedSample) -> torch.Tensor:
        decoded = decode_image(sample.raw.image, sample.raw.where)
        return train_transform(decoded, self.image_config, seed=self.seed, epoch=sample.epoch, sample_id=sample.raw.id)

    def captions(self, sample: FetchedSample) -> Sequence[str]:
        return chosen_captions(sample.raw, self.captions_per_image, seed=self.seed, epoch=sample.epoch)


class _Evaluate:
    """What evaluation makes of a sample: the fixed crop and all captions."""

    def __init__(self, config: DataConfig) -> None:
        self.image_config = config.image

    def image(self, sample: FetchedSample) -> torch.Tensor:
        return eval_transform(decode_image(sample.raw.image, sample.raw.where), self.image_config)

    def captions(self, sample: FetchedSample) -> Sequence[str]:
        return sample.raw.captions


@dataclass(frozen=True)
class _Collate:
    """Third stage: bytes → pixels and tokens → `Batch`."""

    view: _Augment | _Evaluate
    tokenizer: Tokenizer | None
    labels: str | None

    def __call__(self, source: Iterator[list[FetchedSample]]) -> Iterator[Batch]:
        for samples in source:
            yield self.batch(samples)

    def batch(self, samples: Sequence[FetchedSample]) -> Batch:
        """Make one batch. Its images lie in memory as they are decoded, channels last."""
        size = self.view.image_config.size
        images = torch.empty((len(samples), 3, size, size), dtype=torch.uint8, memory_format=torch.channels_last)
        texts: list[str] = []
        owners: list[int] = []
        for row, sample in enumerate(samples):
            images[row] = self.view.image(sample)
            if self.tokenizer is not None:
                captions = self.view.captions(sample)
                texts += captions
                owners += [row] * len(captions)
        empty = np.zeros(0, np.int32)
        ids_S, lengths_N = (empty, empty) if self.tokenizer is None else self.tokenizer.encode_batch(texts)
        return Batch(
            images=images,
            text_ids=torch.from_numpy(ids_S),
            text_lengths=torch.from_numpy(lengths_N),
            caption_image=torch.tensor(owners, dtype=torch.int64),
            sample_ids=tuple(sample.raw.id for sample in samples),
            labels=None if self.labels is None else _labels([sample.raw for sample in samples], self.labels),
        )


def _report(source: Iterator[Batch]) -> Iterator[Batch | _Failure]:
    """Last stage: a UserError becomes an item, which the training process raises again."""
    try:
        yield from source
    except UserError as error:
        yield _Failure(str(error))


def _labels(samples: Sequence[RawSample], key: str) -> torch.Tensor:
    """float32 [B, A] from each sample's JSON, or a UserError naming the sample whose labels are absent or odd."""
    rows: list[list[float]] = []
    for sample in samples:
        value = sample.meta.get(key)
        if not isinstance(value, list) or not all(isinstance(x, (int, float)) for x in value):
            found = f"a {type(value).__name__}" if key in sample.meta else f"only {sorted(sample.meta)}"
            raise UserError(f"{sample.where}: data.labels names '{key}', expected a list of numbers, found {found}")
        if rows and len(value) != len(rows[0]):
            raise UserError(f"{sample.where}: '{key}' has {len(value)} numbers, other samples have {len(rows[0])}")
        rows.append(value)
    return torch.tensor(rows, dtype=torch.float32)
