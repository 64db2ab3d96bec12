"""Shards → batches, in loader processes: where → bytes → pixels and tokens → `Batch`.

Worker w of a rank makes the rank's batches w, w + workers, …, and batches are handed out in turn, so the sequence is
the same for every number of workers. What a sample looks like in an epoch (crop, flip, captions) depends on (seed,
epoch, sample id) alone.

Shapes: m images of a micro-batch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from webdataset import DataPipeline

from mmd2v.config.schema import ArrayConfig, DataConfig, ShardsConfig, TrainSetConfig
from mmd2v.data.addresses import display
from mmd2v.data.collate import Collate, EvalView, TrainView
from mmd2v.data.cursor import Cursor
from mmd2v.data.loader import Loader, report_errors
from mmd2v.data.mixture import Mixture, RoundRobin, SingleSet, TrainOrder, Weighted
from mmd2v.data.positions import FETCHED_AHEAD, EvalPositions, PassPositions, ShardPass, TrainPositions
from mmd2v.data.sample_reader import SampleReader
from mmd2v.data.shards import ShardSet
from mmd2v.data.stored_outputs import StoredOutputs
from mmd2v.data.token_batches import TokenOrder, TokenPositions
from mmd2v.data.token_lengths import open_texts
from mmd2v.data.tokenizers import Tokenizer
from mmd2v.data.watch import WorkerStates
from mmd2v.errors import UserError


class TrainFacts(NamedTuple):
    """What is known of a training set before anything is built."""

    samples: int
    """Of all data sets together, each one's ``limit`` respected."""
    layout: str
    """Digest of the sets' names and of how many samples each of their shards has: the order is a function of it."""


def open_sets(config: DataConfig, cache: int = 2) -> list[ShardSet]:
    """Open the data sets that are trained on, each with ``cache`` shards kept open.

    Shards that are cut off or missing are damage of their samples, unless ``config.damage.limit`` is 0.
    """
    tolerant = config.damage.limit > 0
    return [
        ShardSet(one.shards, one.limit, cache=cache, source=config.source, tolerant=tolerant)
        for one in config.train.named_sets.values()
    ]


def train_facts(config: DataConfig, *, seed: int, batch: int | None) -> TrainFacts:
    """Count the training set; ``batch`` are the samples of a step over all ranks, None of a run in steps of tokens.

    Raises:
        UserError: no such shards, or settings of the order that do not fit together or to the sets.
    """
    sets = open_sets(config)
    if batch is not None:
        train_order(config, sets, seed=seed, batch=batch)
    digest = hashlib.sha256()
    for name, shards in zip(config.train.named_sets, sets, strict=True):
        digest.update(json.dumps([name, len(shards.counts)]).encode() + shards.counts.astype("<i8").tobytes())
    return TrainFacts(sum(map(len, sets)), digest.hexdigest()[:16])


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
    label_classes: int | None = None,
    outputs: Sequence[StoredOutputs] = (),
    arrays: Mapping[str, ArrayConfig] | None = None,
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
        label_classes: numbers of a sample's labels, A; None leaves them out.
        outputs: stored outputs of teachers that go into the batches.
        arrays: name → array that goes into the batches; without, samples need none.
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
    together = Cursor.lanes_together(config.lanes, step // config.lanes or 1, micro_batch_size)
    # A batch may straddle two windows of shards in each lane it touches.
    cache = 2 * config.shuffle_shards * together
    for stored in outputs:
        stored.keep_open(cache * len(config.train.named_sets))
    sets = open_sets(config, cache)
    order = train_order(config, sets, seed=seed, batch=step, micro_batch_size=micro_batch_size)
    positions = TrainPositions(order, sets, config.shuffle_shards, start_index, rank, world_size, micro_batch_size)
    collate = _collate(config, seed, tokenizer, images, label_classes, outputs, arrays)
    names = list(config.train.named_sets)
    return _loader(
        config, sets, names, positions, collate, micro_batch_size, order=order, rank=rank, pin_memory=pin_memory
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
    label_classes: int | None = None,
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
        label_classes: as `train_loader`.
        pin_memory: as `train_loader`.

    Raises:
        UserError: as `train_loader`; a step may have fewer texts than W·a.
    """
    order.check_parts(world_size * accumulation)
    # A window may share its first and last shard with its neighbours, and two windows may be in use.
    ahead = FETCHED_AHEAD * (config.shuffle_shards + 1)
    shards, _ = open_texts(config, tokenizer, cache=ahead)
    positions = TokenPositions(order, shards, start_step, rank, world_size, accumulation, ahead)
    collate = _collate(config, seed, tokenizer, False, label_classes)
    return _loader(config, [shards], [""], positions, collate, 0, order=order, rank=rank, pin_memory=pin_memory)


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
    positions = PassPositions(sets, passes, batch_size)
    collate = _collate(config, seed, tokenizer, images, None)
    names = [""] * len(sets)
    return _loader(
        config, sets, names, positions, collate, batch_size, batches=positions.batches, rank=rank, pin_memory=pin_memory
    )


def eval_loader(
    config: DataConfig,
    *,
    shards: ShardsConfig,
    tokenizer: Tokenizer | None,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    arrays: Mapping[str, ArrayConfig] | None = None,
    label_classes: int | None = None,
    images: bool = True,
    pin_memory: bool | None = None,
) -> Loader:
    """This rank's contiguous slice of the images in file order, each once, with all their captions in order.

    Slices differ by at most one image and may be empty; nothing is padded or repeated, and nothing damaged is put up
    with. ``arrays``, ``label_classes`` and ``images`` as in `train_loader`.

    Raises:
        UserError: as `train_loader`.
    """
    shard_set = ShardSet(shards.shards, shards.limit, source=config.source)
    total = len(shard_set)
    first, last = rank * total // world_size, (rank + 1) * total // world_size
    batches = math.ceil((last - first) / batch_size)
    positions = EvalPositions(shard_set, first, last, batch_size)
    labels = None if config.labels is None or label_classes is None else (config.labels, label_classes)
    collate = Collate(EvalView(config), tokenizer, labels, images, arrays=arrays or {})
    return _loader(
        config, [shard_set], [""], positions, collate, batch_size, batches=batches, rank=rank, pin_memory=pin_memory
    )


def _collate(
    config: DataConfig,
    seed: int,
    tokenizer: Tokenizer | None,
    images: bool,
    label_classes: int | None,
    outputs: Sequence[StoredOutputs] = (),
    arrays: Mapping[str, ArrayConfig] | None = None,
) -> Collate:
    """What training makes of samples: damaged ones get weight 0, unless the limit is 0."""
    labels = None if config.labels is None or label_classes is None else (config.labels, label_classes)
    tolerant = config.damage.limit > 0
    return Collate(TrainView(config, seed), tokenizer, labels, images, tolerant, outputs=outputs, arrays=arrays or {})


def _loader(
    config: DataConfig,
    sets: Sequence[ShardSet],
    names: Sequence[str],
    positions: Any,
    collate: Collate,
    batch_size: int,
    *,
    batches: int | None = None,
    order: TrainOrder | TokenOrder | None = None,
    rank: int,
    pin_memory: bool | None,
) -> Loader:
    """Put the stages together: places → bytes → batches, and what tells who is late."""
    states = collate.states = WorkerStates(config.workers)
    keys = [array.key for array in collate.arrays.values()]
    reader = SampleReader(sets, names, collate.images, states, keys)
    return Loader(
        DataPipeline(positions, reader, collate, report_errors),
        config,
        batches,
        states=states,
        shard_name=lambda set_, shard: display(sets[set_].paths[shard]),
        order=order,
        rank=rank,
        images=(batch_size, config.image.size) if collate.images else None,
        pin_memory=pin_memory,
    )
