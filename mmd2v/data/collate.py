"""Samples' bytes → pixels and tokens → `Batch`.

Shapes: B images, N captions, S tokens, A labels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from mmd2v.config.schema import ArrayConfig, DataConfig
from mmd2v.data.array_members import parse_array
from mmd2v.data.batch import Batch
from mmd2v.data.cursor import Position
from mmd2v.data.damage import Damage, DamagedSample, DamageKind
from mmd2v.data.device_decode import EncodedImages, crop_of_upright_jpeg
from mmd2v.data.draws import permutation
from mmd2v.data.handover import new_images
from mmd2v.data.image_header import check_pixels
from mmd2v.data.shards import RawSample
from mmd2v.data.stored_outputs import StoredOutputs
from mmd2v.data.tokenizers import Tokenizer
from mmd2v.data.transforms import Crop, decode_image, eval_transform, train_transform
from mmd2v.data.watch import Stage, WorkerStates

_LARGEST_LABEL = torch.finfo(torch.float32).max


class FetchedSample(NamedTuple):
    """A sample's bytes, or what is wrong with them, and where they come from."""

    place: Position
    shard: str
    """Path of its shard."""
    set: str
    """Name of its data set in a mixture, else empty."""
    raw: RawSample | Damage


def chosen_captions(sample: RawSample, count: int, *, seed: int, epoch: int) -> list[str]:
    """The ``count`` captions of a sample for an epoch: its permuted captions, continued from epoch to epoch.

    Every caption has its turn, and none comes twice in an epoch as long as there are ``count`` of them.
    """
    total = len(sample.captions)
    if total == 1:
        return [sample.captions[0]] * count
    order = permutation(total, "order of captions", seed, sample.id)
    return [sample.captions[order[(epoch * count + place) % total]] for place in range(count)]


class TrainView:
    """What training makes of a sample: a random crop and some of its captions."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def crop_on_device(self, raw: RawSample, epoch: int) -> Crop | None:
        """The crop of an image that the device is to decode; None for one that is decoded here."""
        if self.config.decode == "loader":
            return None
        return crop_of_upright_jpeg(
            raw.image, self.config.image, seed=self.seed, epoch=epoch, sample_id=raw.id, where=raw.where
        )

    def image(self, raw: RawSample, epoch: int) -> torch.Tensor:
        """uint8 [3, S, S]."""
        decoded = decode_image(raw.image, raw.where)
        return train_transform(decoded, self.config.image, seed=self.seed, epoch=epoch, sample_id=raw.id)

    def captions(self, raw: RawSample, epoch: int) -> Sequence[str]:
        """``captions_per_image`` of the sample's captions."""
        return chosen_captions(raw, self.config.captions_per_image, seed=self.seed, epoch=epoch)

    @property
    def no_captions(self) -> Sequence[str]:
        """What stands in for the captions of a damaged sample."""
        return [""] * self.config.captions_per_image


class EvalView:
    """What evaluation makes of a sample: the fixed crop and all captions."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def crop_on_device(self, raw: RawSample, epoch: int) -> Crop | None:
        """None: evaluation is decoded here, so that its numbers are the same on every device."""
        return None

    def image(self, raw: RawSample, epoch: int) -> torch.Tensor:
        """uint8 [3, S, S]."""
        return eval_transform(decode_image(raw.image, raw.where), self.config.image)

    def captions(self, raw: RawSample, epoch: int) -> Sequence[str]:
        """All captions, in their order."""
        return raw.captions

    no_captions: Sequence[str] = ("",)


@dataclass
class Collate:
    """Third stage of a pipeline."""

    view: TrainView | EvalView
    tokenizer: Tokenizer | None
    labels: tuple[str, int] | None
    """Key in a sample's JSON, and how many numbers it holds."""
    images: bool = True
    """Whether images are decoded; without, the batch's are [B, 3, 0, 0]."""
    tolerant: bool = False
    """Give damaged samples weight 0 instead of raising."""
    states: WorkerStates | None = None
    outputs: Sequence[StoredOutputs] = ()
    """Teachers' stored outputs that go into the batch."""
    arrays: Mapping[str, ArrayConfig] = field(default_factory=dict)
    """Name → array that goes into the batch."""

    def __call__(self, source: Iterator[list[FetchedSample]]) -> Iterator[Batch]:
        """Turn each list of samples into a batch."""
        for samples in source:
            yield self.batch(samples)
            self._enter(Stage.WAITING)

    def batch(self, samples: Sequence[FetchedSample]) -> Batch:
        """Make one batch. Its images lie in memory as they are decoded, channels last.

        Raises:
            Damage: of the first damaged sample, unless ``tolerant``.
        """
        size = self.view.config.image.size if self.images else 0
        images = new_images(len(samples), size)
        arrays = {name: torch.zeros(len(samples), *array.shape) for name, array in self.arrays.items()}
        texts: list[str] = []
        owners: list[int] = []
        labels: list[list[float] | None] = []
        damaged: dict[int, DamagedSample] = {}
        encoded: list[tuple[int, tuple[str, int], memoryview, Crop]] = []
        for row, sample in enumerate(samples):
            self._enter(Stage.DECODING, sample.place)
            try:
                captions, label, crop = self._fill(images, arrays, row, sample)
                if crop is not None:
                    encoded.append((row, (sample.shard, sample.place.row), sample.raw.image, crop))
            except Damage as damage:
                if not self.tolerant:
                    raise
                damaged[row] = DamagedSample(damage.kind, sample.shard, sample.place.row, str(damage))
                for values in (images, *arrays.values()):
                    values[row] = 0
                captions, label = self.view.no_captions, None
            labels.append(label)
            if self.tokenizer is not None:
                texts += captions
                owners += [row] * len(captions)
        self._enter(Stage.TOKENIZING)
        empty = np.zeros(0, np.int32)
        ids_S, lengths_N = (empty, empty) if self.tokenizer is None else self.tokenizer.encode_batch(texts)
        places = [None if row in damaged else sample.place for row, sample in enumerate(samples)]
        weights = None
        if self.tolerant:
            weights = torch.ones(len(samples))
            weights[list(damaged)] = 0
        return Batch(
            images=images,
            text_ids=torch.from_numpy(ids_S),
            text_lengths=torch.from_numpy(lengths_N),
            caption_image=torch.tensor(owners, dtype=torch.int64),
            sample_ids=tuple(_name(sample, row in damaged) for row, sample in enumerate(samples)),
            labels=None if self.labels is None else _label_matrix(labels, self.labels[1]),
            weights=weights,
            damaged=tuple(damaged.values()),
            encoded=EncodedImages.pack(encoded),
            mean_over=samples[0].place.mean_over if samples else None,
            teacher_outputs={key: value for stored in self.outputs for key, value in stored.read(places).items()},
            arrays=arrays,
        )

    def _fill(
        self, images: torch.Tensor, arrays: Mapping[str, torch.Tensor], row: int, sample: FetchedSample
    ) -> tuple[Sequence[str], list[float] | None, Crop | None]:
        """Put a sample's pixels and arrays into their row; return captions, labels and, if the device does it, the
        crop.
        """
        raw, crop = sample.raw, None
        if isinstance(raw, Damage):
            raise raw
        captions = self._captions(raw, sample.place) if self.tokenizer is not None else ()
        longest = self.view.config.damage.max_caption_length
        for caption in captions:
            if len(caption) > longest:
                raise Damage(
                    DamageKind.CAPTION_TOO_LONG,
                    f"{raw.where}: found a caption of {len(caption):,} characters, expected at most {longest:,} "
                    "(data.damage.max_caption_length)",
                )
        label = None if self.labels is None else _label(raw, *self.labels)
        for name, array in self.arrays.items():
            arrays[name][row] = parse_array(raw.arrays[array.key], array, raw.where)
        if self.images:
            # A decompression bomb is refused by its header, before any of its pixels has been made.
            check_pixels(raw.image, self.view.config.damage.max_pixels, raw.where, "data.damage.max_pixels")
            crop = self.view.crop_on_device(raw, sample.place.epoch)
            images[row] = 0 if crop is not None else self.view.image(raw, sample.place.epoch)
        for stored in self.outputs:
            stored.check(sample.place, raw.id)
        return captions, label, crop

    def _captions(self, raw: RawSample, place: Position) -> Sequence[str]:
        if place.caption is None:
            return self.view.captions(raw, place.epoch)
        if place.caption >= len(raw.captions):
            raise Damage(
                DamageKind.NO_CAPTION,
                f"{raw.where}: found {len(raw.captions)} captions, expected more than {place.caption} by its shard's "
                "file of token lengths: the shard was replaced",
            )
        return [raw.captions[place.caption]]

    def _enter(self, stage: Stage, place: Position | None = None) -> None:
        if self.states is not None:
            self.states.enter(stage, *((place.set, place.shard) if place is not None else ()))


def _name(sample: FetchedSample, damaged: bool) -> str:
    """The id of a sample, ``SET/ID`` in a mixture; of a damaged one its place, as its id may be what is damaged."""
    raw = sample.raw
    own = f"{sample.shard}#{sample.place.row}" if damaged or isinstance(raw, Damage) else raw.id
    if sample.place.caption:  # the first one, most often the only one, goes by the sample's name
        own = f"{own}#{sample.place.caption}"
    return f"{sample.set}/{own}" if sample.set else own


def _label(raw: RawSample, key: str, classes: int) -> list[float]:
    """The labels of a sample (of a class's number, a vector with a 1 there), or a `Damage` that says what is wrong."""
    value = raw.meta.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < classes:
            return [float(value == place) for place in range(classes)]
        problem = f"'{key}' is {value}, expected a class from 0 to {classes - 1} (classes of the objective)"
    elif not isinstance(value, list) or not all(isinstance(x, (int, float)) for x in value):
        found = f"a {type(value).__name__}" if key in raw.meta else f"only {sorted(raw.meta)}"
        problem = f"data.labels names '{key}', expected a list of numbers or the number of a class, found {found}"
    elif len(value) != classes:
        problem = f"'{key}' has {len(value)} numbers, expected {classes} (classes of the objective)"
    elif not all(abs(x) <= _LARGEST_LABEL for x in value):  # NaN compares false
        problem = f"'{key}' holds a number that is not finite in float32"
    else:
        return value
    raise Damage(DamageKind.BAD_LABELS, f"{raw.where}: {problem}")


def _label_matrix(rows: Sequence[list[float] | None], classes: int) -> torch.Tensor:
    """float32 [B, A], zeros for damaged samples."""
    nothing = [0.0] * classes
    return torch.tensor([nothing if row is None else row for row in rows], dtype=torch.float32).view(-1, classes)
