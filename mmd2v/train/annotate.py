"""Run a run's frozen teachers over its training shards once and store what they give, for every epoch of the run.

Shards are dealt to the ranks in rounds, one each. Files appear whole or not at all; those that are finished are
skipped, so that an interrupted command goes on where it was.

Shapes: b samples of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

import mmd2v
from mmd2v.config.batch_plan import plan_batches, total_steps
from mmd2v.config.schema import Config
from mmd2v.data.annotation_files import ANY_EPOCH, ShardWriter, is_finished, shard_names, stored_file
from mmd2v.data.annotation_record import (
    RECORD_NAME,
    Annotation,
    SetRecord,
    StoredDtype,
    read_record,
    teacher_folder,
    write_record,
)
from mmd2v.data.annotation_settings import captions_fixed, differences, is_fixed, listed
from mmd2v.data.batch import Batch
from mmd2v.data.damage import DamagedSample, DamageTally, damage_allowed
from mmd2v.data.device import DeviceCopy
from mmd2v.data.positions import ShardPass
from mmd2v.data.shards import ShardSet
from mmd2v.data.stream import annotation_loader, open_sets
from mmd2v.data.tokenizers import Tokenizer, load_tokenizer
from mmd2v.distributed import environment
from mmd2v.distributed.collectives import gather_objects
from mmd2v.distributed.coordination import from_main_rank, on_every_rank, shared_error
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError, disk_message, unknown_name
from mmd2v.models.teachers import Targets, Teacher, build_teachers
from mmd2v.progress import Progress
from mmd2v.train.mock import mock_batch
from mmd2v.train.replay import Needs, needs, settings_of, token_batches


@dataclass(frozen=True)
class Options:
    """What of a run's teachers is stored, and how."""

    out: Path
    """Folder of all teachers."""
    epochs: int | None = None
    """How many epochs; None: those that the run reads, and of its last one the shards that it gets to."""
    teachers: tuple[str, ...] = ()
    """Names in the config; none: all."""
    tokens: bool = False
    """Store the tokens too, of teachers of images."""
    dtype: StoredDtype = "fp32"
    batch_size: int | None = None
    """Samples of a rank's forward pass; kernels round by it. None: the run's micro-batch on as many ranks."""


class _Task(NamedTuple):
    """One pass over a shard: for which teachers, and whether each one's outputs are of every epoch."""

    work: ShardPass
    epochs: dict[str, int | None]
    """Teacher → the epoch its file is of, or `ANY_EPOCH`."""


def annotate(config: Config, options: Options) -> str:
    """Store the outputs of a run's teachers; every rank of a launcher calls this. Returns a summary on rank
    0, elsewhere an empty text.

    Raises UserError for bad input, when ``options.out`` holds outputs of other settings, and when too many samples are
    damaged, on every rank.
    """
    world = environment.initialize(config.engine.device)
    names = from_main_rank(lambda: _chosen(config, options))
    config = config.model_copy(update={"teachers": {name: config.teachers[name] for name in names}})
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    sets: list[ShardSet] = on_every_rank(lambda: open_sets(config.data))
    needed: list[Needs] = from_main_rank(lambda: _needed(config, options, sets))
    teachers: dict[str, Teacher] = on_every_rank(lambda: build_teachers(config, world.device, tokenizer))
    annotations: dict[str, Annotation] = on_every_rank(
        lambda: {
            name: _describe(config, options, name, teacher, tokenizer, world.device)
            for name, teacher in teachers.items()
        }
    )
    return _Annotator(config, options, world, sets, needed, teachers, annotations, tokenizer).run()


def _chosen(config: Config, options: Options) -> list[str]:
    if not config.teachers:
        raise UserError("teachers: the config names none, so there is nothing to store")
    for name in options.teachers:
        if name not in config.teachers:
            raise unknown_name("--teacher", name, config.teachers)
    for flag, value in (("--batch-size", options.batch_size), ("--epochs", options.epochs)):
        if value is not None and value < 1:
            raise UserError(f"{flag}: found {value}, expected at least 1")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out: {options.out} is a file, expected a folder")
    names = [name for name in config.teachers if not options.teachers or name in options.teachers]
    for name in names:
        if config.teachers[name].modality == "text" and options.tokens:
            raise UserError(f"--tokens: teacher {name} sees text, expected teachers of images; choose with --teacher")
        if token_batches(config):
            raise UserError(
                "data.batch_tokens: makes every caption a sample of its own, which stored outputs do not know; give "
                "engine.batch_size instead"
            )
    return names


def _needed(config: Config, options: Options, sets: Sequence[ShardSet]) -> list[Needs]:
    if options.epochs is not None:
        return [Needs(options.epochs, frozenset()) for _ in sets]
    # The ranks of the training may be others than the present ones, and do not matter: a step takes the same samples.
    plan = plan_batches(config, 1)
    steps = total_steps(config, plan, sum(map(len, sets)))
    return needs(config, sets, batch=plan.global_batch, steps=steps)


def _describe(
    config: Config, options: Options, name: str, teacher: Teacher, tokenizer: Tokenizer | None, device: torch.device
) -> Annotation:
    """Describe what will be stored, after a pass of the teacher over one sample that is none."""
    found: Targets = teacher(mock_batch(config, tokenizer, 1).to(device))
    if options.tokens and found.tokens_BTD is None:
        raise UserError(f"--tokens: teacher {name} ({config.teachers[name].name}) gives none; choose with --teacher")
    return Annotation(
        settings=settings_of(config, name, tokenizer, device),
        width=found.cls_BD.shape[-1],
        captions=None if teacher.modality == "image" else config.data.captions_per_image,
        tokens=(found.tokens_BTD.shape[1], found.tokens_BTD.shape[2])
        if options.tokens and found.tokens_BTD is not None
        else None,
        dtype=options.dtype,
    )


@dataclass
class _Annotator:
    """The work of one rank."""

    config: Config
    options: Options
    world: World
    sets: Sequence[ShardSet]
    needed: Sequence[Needs]
    teachers: Mapping[str, Teacher]
    annotations: Mapping[str, Annotation]
    tokenizer: Tokenizer | None

    def __post_init__(self) -> None:
        self.set_names = list(self.config.data.train.named_sets)
        self.names = [shard_names(shards.paths) for shards in self.sets]
        self.copy = DeviceCopy(self.world.device, self.config.data.image)
        self.tally = DamageTally(damage_allowed(self.config.data.damage, sum(map(len, self.sets))))

    def run(self) -> str:
        """Store everything that is missing; return a summary on rank 0."""
        from_main_rank(self._prepare)
        fixed = self._fixed_texts()
        tasks: list[_Task] = from_main_rank(lambda: self._tasks(fixed))
        if tasks:
            self._work(tasks)
        return self._summary(tasks) if self.world.is_main else ""

    # ------------------------------------------------------------------------------------- planning

    def _folder(self, teacher: str) -> Path:
        return teacher_folder(self.options.out, teacher)

    def _prepare(self) -> None:
        """Write the records; refuse a folder of other outputs before anything is changed."""
        records = {}
        for name, annotation in self.annotations.items():
            folder = self._folder(name)
            stored = read_record(folder)
            if stored is not None:
                found = differences(stored.settings, annotation.settings) + differences(stored.form, annotation.form)
                if found:
                    raise UserError(
                        f"--out: {folder} holds outputs of other settings: {listed(found)}; name another folder, or "
                        "remove this one"
                    )
            records[folder] = replace(annotation, sets=self._sets(stored))
        for folder, record in records.items():
            write_record(folder, record, mmd2v.__version__)

    def _sets(self, stored: Annotation | None) -> dict[str, SetRecord]:
        """What is stored of every set once this command has finished: with what an earlier one has stored."""
        records = dict(stored.sets) if stored is not None else {}
        for name, shards, names, need in zip(self.set_names, self.sets, self.names, self.needed, strict=True):
            old = records.get(name, SetRecord(0, {}))
            counts = {shard: int(count) for shard, count in zip(names, shards.counts, strict=True) if count}
            larger = {shard: max(count, old.shards.get(shard, 0)) for shard, count in counts.items()}
            records[name] = SetRecord(max(old.epochs, len(need.all_epochs)), {**old.shards, **larger})
        return records

    def _fixed_texts(self) -> set[tuple[int, int]]:
        """(set, shard) of which every epoch takes the same captions; every rank reads its share."""
        if all(annotation.captions is None for annotation in self.annotations.values()):
            return set()
        every = [(i, shard) for i, shards in enumerate(self.sets) for shard in range(len(shards.paths))]
        own = [place for place in every[self.world.rank :: self.world.size] if self.sets[place[0]].counts[place[1]]]
        count = self.config.data.captions_per_image

        def read() -> set[tuple[int, int]]:
            with self._progress("reading captions", len(own), "shards") as progress:
                found = set()
                for i, shard in own:
                    if captions_fixed(self.sets[i], shard, count):
                        found.add((i, shard))
                    if progress is not None:
                        progress.advance()
                return found

        return set().union(*gather_objects(on_every_rank(read)))

    def _tasks(self, fixed: set[tuple[int, int]]) -> list[_Task]:
        """What is to be done, epoch by epoch."""
        tasks = []
        always = {
            name: annotation.captions is None and is_fixed(self.config.data.image)
            for name, annotation in self.annotations.items()
        }
        for epoch in range(max(len(need.all_epochs) for need in self.needed)):
            for i, (shards, need) in enumerate(zip(self.sets, self.needed, strict=True)):
                for shard in need.of_epoch(epoch, shards.counts.tolist()):
                    missing = {}
                    for name, annotation in self.annotations.items():
                        is_any = always[name] or (annotation.captions is not None and (i, shard) in fixed)
                        # What is the same in every epoch is stored with the first, which has every shard of later ones.
                        if is_any and epoch:
                            continue
                        of = ANY_EPOCH if is_any else epoch
                        if not is_finished(self._path(name, i, shard, of), annotation, int(shards.counts[shard])):
                            missing[name] = of
                    if missing:
                        tasks.append(_Task(ShardPass(i, shard, epoch), missing))
        return tasks

    def _path(self, teacher: str, set_: int, shard: int, epoch: int | None) -> Path:
        return stored_file(self._folder(teacher), self.set_names[set_], epoch, self.names[set_][shard])

    # ------------------------------------------------------------------------------------- the work

    def _batch_size(self) -> int:
        """Samples of a forward pass: as many as in training, should it have as many ranks."""
        engine = self.config.engine
        share = -(-plan_batches(self.config, 1).global_batch // self.world.size)
        return self.options.batch_size or engine.micro_batch_size or share

    def _work(self, tasks: Sequence[_Task]) -> None:
        own = tasks[self.world.rank :: self.world.size]
        rounds = -(-len(tasks) // self.world.size)
        loader = annotation_loader(
            self.config.data,
            self.sets,
            [task.work for task in own],
            seed=self.config.seed,
            tokenizer=self.tokenizer,
            batch_size=self._batch_size(),
            images=any(annotation.captions is None for annotation in self.annotations.values()),
            rank=self.world.rank,
        )
        batches = iter(loader)
        with self._progress("annotating", sum(map(self._samples, tasks)), "samples") as progress:
            for number in range(rounds):
                damaged: list[DamagedSample] = []
                error: str | None = None
                if number < len(own):
                    try:
                        damaged = self._store(own[number], batches, progress)
                    except (UserError, SafetensorError) as problem:
                        error = str(problem)
                    except OSError as problem:
                        error = f"{problem.filename or self.options.out}: {disk_message(problem)}"
                # The ranks meet after every round: an error of one is one of all, and rank 0 knows how far all are.
                outcomes = gather_objects((error, damaged))
                if errors := [f"rank {rank}: {text}" for rank, (text, _) in enumerate(outcomes) if text]:
                    raise shared_error("\n".join(errors) if len(outcomes) > 1 else str(error))
                self._count(sample for _, samples in outcomes for sample in samples)
                if progress is not None:
                    others = tasks[number * self.world.size : (number + 1) * self.world.size][1:]
                    progress.advance(sum(map(self._samples, others)))

    def _store(self, task: _Task, batches: Iterator[Batch], progress: Progress | None) -> list[DamagedSample]:
        """Store one shard; return its damaged samples."""
        set_, shard, _ = task.work
        rows = self._samples(task)
        writers = {
            name: ShardWriter(self._path(name, set_, shard, epoch), self.annotations[name], rows)
            for name, epoch in task.epochs.items()
        }
        damaged: list[DamagedSample] = []
        done = 0
        while done < rows:
            batch = self.copy(next(batches))
            damaged += batch.damaged
            weights = [1.0] * len(batch) if batch.weights is None else batch.weights.tolist()
            ids = [sample if weight else None for sample, weight in zip(batch.sample_ids, weights, strict=True)]
            for name, writer in writers.items():
                targets: Targets = self.teachers[name](batch)
                writer.add(ids, targets.cls_BD, targets.tokens_BTD if self.options.tokens else None)
            done += len(batch)
            if progress is not None:
                progress.advance(len(batch))
        for writer in writers.values():
            writer.write()
        return damaged

    def _samples(self, task: _Task) -> int:
        return int(self.sets[task.work.set].counts[task.work.shard])

    def _count(self, samples: Iterator[DamagedSample]) -> None:
        """Tally damaged samples, each once however many epochs it is met in; stop when there are too many."""
        for sample in samples:
            self.tally.add(sample)
        try:
            self.tally.check()
        except UserError as error:
            raise shared_error(str(error)) from None

    def _progress(self, what: str, total: int, unit: str) -> Progress | nullcontext[None]:
        return Progress(what, total, unit=unit) if self.world.is_main else nullcontext()

    def _summary(self, tasks: Sequence[_Task]) -> str:
        lines = []
        for name in self.annotations:
            wrote = [task for task in tasks if name in task.epochs]
            size = sum(
                os.path.getsize(self._path(name, task.work.set, task.work.shard, task.epochs[name])) for task in wrote
            )
            what = f"wrote {len(wrote):,} files, {size / 1e6:,.2f} MB" if wrote else "all files were there already"
            lines.append(
                f"{self._folder(name) / RECORD_NAME}: {what}; replay with --teachers.{name}.outputs {self.options.out}"
            )
        if self.tally.total:
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.tally.by_kind().items())
            lines.append(f"left out {self.tally.total:,} damaged samples ({kinds})")
        return "\n".join(lines)
