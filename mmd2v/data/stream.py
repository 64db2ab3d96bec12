"""Shards → batches, in loader processes: where → bytes → pixels and tokens → `Batch`.

Worker w of a rank makes the rank's batches w, w + workers, …, and batches are handed out in turn, so the sequence is
the same for every number of workers. What a sample looks like in an epoch (crop, flip, captions) depends on (seed,
epoch, sample id) alone.

Shapes: m images of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import NamedTuple

from webdataset import DataPipeline

from mmd2v.config.schema import DataConfig, ShardsConfig, SourceConfig, TrainSetConfig
from mmd2v.data.annotations import StoredOutputs
from mmd2v.data.collate import Collate, EvalView, FetchedSample, TrainView
from mmd2v.data.cursor import Cursor, Position, micro_batches
from mmd2v.data.loader import Loader, report_errors, worker_share
from mmd2v.data.mixture import Mixture, RoundRobin, SingleSet, TrainOrder, Weighted
from mmd2v.data.shards import ShardSet
from mmd2v.data.token_batches import TokenOrder, TokenPositions
from mmd2v.data.token_lengths import open_texts
from mmd2v.data.tokenizers import Tokenizer
from mmd2v.data.watch import Stage, WorkerStates
from mmd2v.errors import UserError

_FETCHED_AHEAD = 2
"""Windows of shards that are fetched from afar: the present one and the next."""


def dataset_size(train: TrainSetConfig | ShardsConfig, source: SourceConfig | None = None) -> int:
    """Number of samples of a data set, or of all of a mixture (each one's ``limit`` respected)."""
    sets = train.named_sets.values() if isinstance(train, TrainSetConfig) else [train]
    return sum(len(ShardSet(one.shards, one.limit, source=source)) for one in sets)


def train_order(
    config: DataConfig, sets: Sequence[ShardSet], *, seed: int, batch: int, micro_batch_size: int = 1
) -> TrainOrder:
    """The order of the training stream.

    Args:
        config: the data section of a run.
        sets: the opened data sets of ``config.train``, in their order.
        seed: of the order.
        batch: samples of a step over all ranks, G.
        micro_batch_size: indices that are looked up together, m.

    Raises:
        UserError: settings that do not fit together or to the sets.
    """
    names = list(config.train.named_sets)
    cursors = [
        Cursor(
            shards.counts,
            seed=seed,
            window=config.shuffle_shards,
            lanes=config.lanes,
            batch=batch,
            drop_last=config.last_batch == "drop",
            spread=micro_batch_size,
            name=name,
        )
        for name, shards in zip(names, sets, strict=True)
    ]
    return TrainOrder(_mixture(config.train, seed, batch), cursors, names)


def _mixture(train: TrainSetConfig, seed: int, batch: int) -> Mixture:
    if not train.sets:
        return SingleSet()
    if train.mix == "round_robin":
        return RoundRobin(len(train.sets), batch)
    return Weighted({name: one.weight for name, one in train.sets.items()}, seed)


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
    images: bool = True,
    outputs: Sequence[StoredOutputs] = (),
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
        images: whether images are read; without, samples need none.
        outputs: stored outputs of teachers that go into the batches.
        pin_memory: pin the batches; None: when there is a CUDA device.

    Raises:
        UserError: shards missing or damaged; while iterating: damage that is not put up with, naming shard and sample.
    """
    step = world_size * micro_batch_size * accumulation
    if start_index % step:
        raise UserError(
            f"start index: found {start_index}, expected a multiple of the {step} samples of a step "
            f"({world_size} ranks × {micro_batch_size} × {accumulation})"
        )
    tolerant = config.damage.limit > 0
    together = Cursor.lanes_together(config.lanes, step // config.lanes or 1, micro_batch_size)
    # A batch may straddle two windows of shards in each lane it touches.
    cache = 2 * config.shuffle_shards * together
    for stored in outputs:
        stored.keep_open(cache * len(config.train.named_sets))
    sets = [
        ShardSet(
            one.shards,
            one.limit,
            cache=cache,
            source=config.source,
            tolerant=tolerant,
        )
        for one in config.train.named_sets.values()
    ]
    order = train_order(config, sets, seed=seed, batch=step, micro_batch_size=micro_batch_size)
    tolerant = damage_allowed(config, sum(map(len, sets))) > 0
    for shards in sets:
        shards.tolerant = tolerant
    states = WorkerStates(config.workers)
    positions = _TrainPositions(order, sets, config.shuffle_shards, start_index, rank, world_size, micro_batch_size)
    fetch = _Fetch(sets, list(config.train.named_sets), images, tolerant, states)
    collate = Collate(TrainView(config, seed), tokenizer, config.labels, images, tolerant, states, outputs)
    return Loader(
        DataPipeline(positions, fetch, collate, report_errors),
        config,
        None,
        states=states,
        shard_name=lambda set_, shard: sets[set_].paths[shard],
        order=order,
        rank=rank,
        images=(micro_batch_size, config.image.size) if images else None,
        pin_memory=pin_memory,
    )


def token_loader(
    config: DataConfig,
    *,
    seed: int,
    tokenizer: Tokenizer,
    order: TokenOrder,
    rank: int,
    world_size: int,
    accumulation: int = 1,
    start_step: int = 0,
    pin_memory: bool | None = None,
) -> Loader:
    """Micro-batches of one rank in steps of ``config.batch_tokens`` tokens, without end and without images.

    Args:
        config: the data section of a run.
        seed: of the run.
        tokenizer: with which the lengths of ``order`` were counted.
        order: which texts a step has.
        rank: this rank.
        world_size: number of ranks, W.
        accumulation: micro-batches of a step, a; a step has the same texts for any W and a.
        start_step: steps done.
        pin_memory: as `train_loader`.

    Raises:
        UserError: as `train_loader`; a step may have fewer texts than W·a.
    """
    order.check_parts(world_size * accumulation)
    # A window may share its first and last shard with its neighbours, and two windows may be in use.
    ahead = _FETCHED_AHEAD * (config.shuffle_shards + 1)
    shards, _ = open_texts(config, tokenizer, cache=ahead)
    tolerant = shards.tolerant = damage_allowed(config, len(shards)) > 0
    states = WorkerStates(config.workers)
    positions = TokenPositions(order, shards, start_step, rank, world_size, accumulation, ahead)
    fetch = _Fetch([shards], [""], False, tolerant, states)
    collate = Collate(TrainView(config, seed), tokenizer, config.labels, False, tolerant, states)
    return Loader(
        DataPipeline(positions, fetch, collate, report_errors),
        config,
        None,
        states=states,
        shard_name=lambda _, shard: shards.paths[shard],
        order=order,
        rank=rank,
        pin_memory=pin_memory,
    )


class ShardPass(NamedTuple):
    """All samples of a shard in file order, as training sees them in an epoch."""

    set: int
    shard: int
    epoch: int


def annotation_loader(
    config: DataConfig,
    sets: Sequence[ShardSet],
    passes: Sequence[ShardPass],
    *,
    seed: int,
    tokenizer: Tokenizer | None,
    batch_size: int,
    images: bool = True,
    rank: int = 0,
    pin_memory: bool | None = None,
) -> Loader:
    """Go through shards in file order, with what training makes of each sample; a batch is of one pass alone.

    Args:
        config: the data section of a run.
        sets: the opened data sets of ``config.train``, in their order.
        passes: what to go through, in this order.
        seed: of the run.
        tokenizer: None leaves the text of the batches empty.
        batch_size: samples of a batch; the last one of a pass may have fewer.
        images: whether images are read; without, samples need none.
        rank: this rank, for messages.
        pin_memory: pin the batches; None: when there is a CUDA device.

    Raises:
        UserError: as `train_loader`.
    """
    tolerant = damage_allowed(config, sum(map(len, sets))) > 0
    for shards in sets:
        shards.tolerant = tolerant
    positions = _PassPositions(sets, passes, batch_size)
    states = WorkerStates(config.workers)
    fetch = _Fetch(sets, [""] * len(sets), images, tolerant, states)
    collate = Collate(TrainView(config, seed), tokenizer, None, images, tolerant, states)
    return Loader(
        DataPipeline(positions, fetch, collate, report_errors),
        config,
        positions.batches,
        states=states,
        shard_name=lambda set_, shard: sets[set_].paths[shard],
        rank=rank,
        pin_memory=pin_memory,
    )


def damage_allowed(config: DataConfig, samples: int) -> int:
    """How many of a data set's samples may be damaged; 0: the first one stops the run."""
    return int(config.damage.limit * samples)


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

    Slices differ by at most one image and may be empty; nothing is padded or repeated, and nothing damaged is put up
    with.

    Raises:
        UserError: as `train_loader`.
    """
    shard_set = ShardSet(shards.shards, shards.limit, source=config.source)
    total = len(shard_set)
    first, last = rank * total // world_size, (rank + 1) * total // world_size
    batches = math.ceil((last - first) / batch_size)
    states = WorkerStates(config.workers)
    positions = _EvalPositions(shard_set, first, last, batch_size)
    fetch = _Fetch([shard_set], [""], True, False, states)
    collate = Collate(EvalView(config), tokenizer, None, states=states)
    return Loader(
        DataPipeline(positions, fetch, collate, report_errors),
        config,
        batches,
        states=states,
        shard_name=lambda _, shard: shard_set.paths[shard],
        rank=rank,
        images=(batch_size, config.image.size),
        pin_memory=pin_memory,
    )


# The stages are objects and no closures, so that loader processes can be spawned as well as forked.


@dataclass(frozen=True)
class _TrainPositions:
    """First stage in training: where this worker's micro-batches lie."""

    order: TrainOrder
    sets: Sequence[ShardSet]
    window: int
    start_index: int
    rank: int
    world_size: int
    micro_batch_size: int

    def __call__(self) -> Iterator[list[Position]]:
        worker, workers = worker_share()
        share = micro_batches(
            start_index=self.start_index,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_size=self.micro_batch_size,
            first=worker,
            stride=workers,
        )
        for indices in share:
            self._fetch_ahead(indices)
            yield [self.order[index] for index in indices]

    def _fetch_ahead(self, indices: range) -> None:
        if not any(getattr(shards, "is_remote", False) for shards in self.sets):
            return
        found = self.order.upcoming_shards(indices, _FETCHED_AHEAD * self.window)
        for set_, shards in enumerate(self.sets):
            if getattr(shards, "is_remote", False):
                shards.prefetch([shard for of, shard in found if of == set_])


@dataclass(frozen=True)
class _PassPositions:
    """First stage where shards are gone through one by one: this worker's share of the batches of all passes."""

    sets: Sequence[ShardSet]
    passes: Sequence[ShardPass]
    batch_size: int

    @property
    def batches(self) -> int:
        """Batches of all workers together."""
        return sum(math.ceil(int(self.sets[set_].counts[shard]) / self.batch_size) for set_, shard, _ in self.passes)

    def __call__(self) -> Iterator[list[Position]]:
        worker, workers = worker_share()
        for number, start in islice(self._starts(), worker, None, workers):
            set_, shard, epoch = self.passes[number]
            shards = self.sets[set_]
            if getattr(shards, "is_remote", False):
                ahead = self.passes[number : number + _FETCHED_AHEAD]
                shards.prefetch([later.shard for later in ahead if later.set == set_])
            rows = range(start, min(start + self.batch_size, int(shards.counts[shard])))
            yield [Position(epoch, shard, row, set_) for row in rows]

    def _starts(self) -> Iterator[tuple[int, int]]:
        """(number of a pass, first row) of every batch."""
        for number, (set_, shard, _) in enumerate(self.passes):
            for start in range(0, int(self.sets[set_].counts[shard]), self.batch_size):
                yield number, start


@dataclass(frozen=True)
class _EvalPositions:
    """First stage in evaluation: this worker's share of the images ``first`` … ``last - 1`` in file order."""

    shards: ShardSet
    first: int
    last: int
    batch_size: int

    def __call__(self) -> Iterator[list[Position]]:
        worker, workers = worker_share()
        for start in range(self.first + worker * self.batch_size, self.last, workers * self.batch_size):
            rows = range(start, min(start + self.batch_size, self.last))
            yield [Position(0, *self.shards.locate(row)) for row in rows]


@dataclass(frozen=True)
class _Fetch:
    """Second stage: positions → bytes."""

    sets: Sequence[ShardSet]
    names: Sequence[str]
    images: bool
    tolerant: bool
    states: WorkerStates

    def __call__(self, source: Iterator[list[Position]]) -> Iterator[list[FetchedSample]]:
        for places in source:
            yield self._read(places)

    def _read(self, places: Sequence[Position]) -> list[FetchedSample]:
        """Read a batch shard by shard: a shard's index and file are looked up once, and a late one has a name."""
        fetched: dict[int, FetchedSample] = {}
        by_shard = sorted(range(len(places)), key=lambda i: (places[i].set, places[i].shard))
        for (set_, shard), group in groupby(by_shard, key=lambda i: (places[i].set, places[i].shard)):
            rows = list(group)
            self.states.enter(Stage.READING, set_, shard)
            shards = self.sets[set_]
            raws = shards.read_many([(shard, places[i].row) for i in rows], images=self.images)
            for i, raw in zip(rows, raws, strict=True):
                fetched[i] = FetchedSample(places[i], shards.paths[shard], self.names[set_], raw)
        return [fetched[i] for i in range(len(places))]
