"""Whether a run may replay stored outputs of its teachers instead of running them, and which ones it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmd2v.config.batch_plan import BatchPlan
from mmd2v.config.schema import Config, TokenRegressionConfig
from mmd2v.data.annotation_files import ANY_EPOCH, shard_names, stored_file, stored_rows, stored_shards
from mmd2v.data.annotation_record import RECORD_NAME, Annotation, read_record, teacher_folder
from mmd2v.data.annotation_settings import differences, image_settings, listed, text_settings
from mmd2v.data.shards import ShardSet
from mmd2v.data.stored_outputs import StoredOutputs
from mmd2v.data.stream import open_sets, train_order
from mmd2v.data.tokenizers import Tokenizer, load_tokenizer
from mmd2v.errors import UserError, nearest
from mmd2v.models.teachers.identity import teacher_settings


@dataclass(frozen=True)
class Source:
    """Where a teacher's outputs come from."""

    stored: StoredOutputs | None
    """None: from the teacher itself."""
    said: str
    """A line for the user: which of the two, and why."""


class Needs(NamedTuple):
    """What a run reads of one data set."""

    epochs: int
    """Epochs that may reach into every shard: 0 … epochs - 1."""
    shards: frozenset[int]
    """Shards it reads in the epoch after them, which it does not finish."""

    def of_epoch(self, epoch: int, counts: Sequence[int]) -> list[int]:
        """The shards that have to be stored for an epoch, of ``counts`` samples each."""
        if epoch < self.epochs:
            return [shard for shard, count in enumerate(counts) if count]
        return sorted(self.shards) if epoch == self.epochs else []

    @property
    def all_epochs(self) -> range:
        """The epochs of which something has to be stored."""
        return range(self.epochs + bool(self.shards))


def needs(config: Config, sets: Sequence[ShardSet], *, batch: int, steps: int) -> list[Needs]:
    """What ``steps`` steps of ``batch`` samples read of each of the opened data sets."""
    order = train_order(config.data, sets, seed=config.seed, batch=batch)
    found = []
    for cursor, used in zip(order.cursors, order.mixture.used(steps * batch), strict=True):
        epochs, rest = divmod(used, cursor.epoch_length)
        found.append(Needs(epochs, frozenset(cursor.shards_until(epochs, rest))))
    return found


def settings_of(config: Config, teacher: str, tokenizer: Tokenizer | None, device: torch.device) -> dict[str, Any]:
    """Setting → value, of all that decides the outputs of a teacher on the run's training samples.

    Raises:
        UserError: the files of the teacher are missing, or a teacher of text has no tokenizer.
    """
    own = config.teachers[teacher]
    settings = teacher_settings(own, device, f"teachers.{teacher}.name")
    if own.modality == "image":
        return settings | image_settings(config.data, config.seed)
    if tokenizer is None:
        raise UserError(f"data.tokenizer: missing, but teachers.{teacher} sees text")
    return settings | text_settings(config.data, tokenizer, config.seed)


def choose_sources(config: Config, plan: BatchPlan, steps: int, device: torch.device) -> dict[str, Source]:
    """Decide for every teacher with ``outputs`` whether they can stand in for it during the whole run.

    Call it on one rank: it reads files. Raises UserError only for a tokenizer that cannot be loaded; whatever is wrong
    with the outputs is a reason to run the teacher.
    """
    sources = {}
    for name, teacher in config.teachers.items():
        if teacher.outputs is not None:
            found = _usable(config, name, plan, steps, device)
            if isinstance(found, str):
                sources[name] = Source(None, f"teacher {name}: live, because {teacher.outputs}: {found}")
            else:
                stored, epochs = found
                sources[name] = Source(stored, f"teacher {name}: replayed from {teacher.outputs} ({epochs})")
    return sources


def _usable(
    config: Config, name: str, plan: BatchPlan, steps: int, device: torch.device
) -> tuple[StoredOutputs, str] | str:
    """The stored outputs and which epochs they are of, or why they cannot be used."""
    own = config.teachers[name]
    assert own.outputs is not None  # the caller's condition
    if token_batches(config):
        return "data.batch_tokens makes every caption a sample of its own, which stored outputs do not know"
    if own.shared_encoder is not None:
        return "it runs the student's encoder too (shared_encoder)"
    for objective in config.objectives:
        if objective.needs_layer_results and getattr(objective, "teacher", None) == name:
            return f"the {objective.kind} objective needs what is not stored"
    folder = teacher_folder(own.outputs, name)
    tokenizer = load_tokenizer(config.data.tokenizer) if own.modality == "text" and config.data.tokenizer else None
    try:
        annotation = read_record(folder)
        if annotation is None:
            return _nothing_stored(own.outputs, name)
        needs_tokens = any(isinstance(o, TokenRegressionConfig) and o.teacher == name for o in config.objectives)
        if needs_tokens and annotation.tokens is None:
            return "it holds no tokens, which the token_regression objective needs; annotate with --tokens"
        if found := differences(annotation.settings, settings_of(config, name, tokenizer, device)):
            return listed(found)
        sets = open_sets(config.data)
        needed = needs(config, sets, batch=plan.global_batch, steps=steps)
        lacks, fixed = _lacking(config, annotation, folder, sets, needed)
    except UserError as error:
        return str(error)
    if lacks:
        return lacks
    paths = {set_name: shards.paths for set_name, shards in zip(config.data.train.named_sets, sets, strict=True)}
    epochs = max(len(need.all_epochs) for need in needed)
    told = "one for every epoch" if fixed else f"{epochs} epoch" + "s" * (epochs != 1)
    return StoredOutputs(name, folder, annotation, paths, files=1), told


def token_batches(config: Config) -> bool:
    """Whether a step is counted in tokens: then a sample is one caption, and not an image with those of an epoch."""
    return config.data.batch_tokens is not None


def _nothing_stored(outputs: str, name: str) -> str:
    folder = Path(outputs)
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        return f"there is no such folder.{nearest(folder.name, siblings)}"
    teachers = [path.parent.name for path in folder.glob(f"*/{RECORD_NAME}")]
    return f"it holds nothing of a teacher '{name}', found {sorted(teachers)}.{nearest(name, teachers)}"


def _lacking(
    config: Config, annotation: Annotation, folder: Path, sets: Sequence[ShardSet], needed: Sequence[Needs]
) -> tuple[str | None, bool]:
    """What is not stored that the run needs (None: nothing), and whether all of it is the same in every epoch."""
    fixed = True
    for set_name, shards, need in zip(config.data.train.named_sets, sets, needed, strict=True):
        in_set = f" of data.train.sets.{set_name}" if set_name else ""
        names, counts = shard_names(shards.paths), shards.counts.tolist()
        if set_name not in annotation.sets:
            stored_sets = [f"data.train.sets.{name}" if name else "data.train.shards" for name in annotation.sets]
            return f"it holds nothing{in_set or ' of data.train.shards'}, found {', '.join(stored_sets)}", fixed
        always = stored_shards(folder, set_name, ANY_EPOCH)
        checked: set[Path] = set()
        for epoch in need.all_epochs:
            wanted = need.of_epoch(epoch, counts)
            own = stored_shards(folder, set_name, epoch)
            absent = [names[shard] for shard in wanted if names[shard] not in own and names[shard] not in always]
            if absent:
                return (
                    f"the run reads {len(need.all_epochs)} epochs{in_set}, and of epoch {epoch} (the first is 0) "
                    f"{len(absent)} of {len(wanted)} shards are missing, such as {absent[0]}; annotate again"
                ), fixed
            for shard in wanted:
                fixed = fixed and names[shard] not in own
                path = stored_file(folder, set_name, epoch if names[shard] in own else ANY_EPOCH, names[shard])
                if path in checked:
                    continue
                checked.add(path)
                # The record is written first: after an interrupted command it promises more than there is.
                stored = stored_rows(path, annotation)
                if stored is None:
                    return f"{path} is damaged or of another annotation; annotate again", fixed
                if stored < counts[shard]:
                    counted = f"stored {stored} samples, now {counts[shard]}"
                    return f"shard {names[shard]}{in_set}: {counted}; annotate again", fixed
    return None, fixed
