"""Encoding a caption set with any model over all ranks: each its own slice once, all results on every rank.

While the model computes, a thread reads and decodes the next batch.

Shapes: m images and n captions of this rank, M images and N captions of the set, E width of an embedding.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch

from mmd2v.data.transforms import decode_image
from mmd2v.distributed.collectives import gather_objects, gather_variable, rank, world_size
from mmd2v.distributed.coordination import shared_error
from mmd2v.errors import UserError
from mmd2v.evaluation.caption_sets import Captioned, CaptionSet
from mmd2v.evaluation.models import RetrievalModel

_Result = TypeVar("_Result")

_DIGEST_BYTES = 16
_NORM_TOLERANCE = 0.02
"""Half precision gives a length of 1 to three digits."""
_SHOWN = 3


@runtime_checkable
class EncodesIds(Protocol):
    """A model whose image embedding follows from the id alone: then no image is read (chance levels, stored ones)."""

    def encode_ids(self, ids: Sequence[str]) -> torch.Tensor:
        """Return [B, E], L2-normalised."""


@dataclass(frozen=True)
class Described:
    """What a set holds, the same on every rank; images with one id are one image."""

    ids: tuple[str, ...]
    """M"""
    captions: tuple[str, ...]
    """N"""
    caption_image: tuple[int, ...]
    """N places in ``ids``."""
    digests: tuple[bytes, ...]
    """M, of the encoded bytes of the images; empty ones where they are not read."""
    kept: tuple[int, ...]
    """M rows of the set: the first one of each id."""
    duplicates: int
    """Rows whose id had come before; their captions count for the first one."""


@dataclass(frozen=True)
class EncodedCaptions:
    """A set in embedding space, the same on every rank."""

    image_ME: torch.Tensor
    text_NE: torch.Tensor
    described: Described


Tell = Callable[[int, str], None]
"""(batches done, what is being done)"""


def describe_set(captions: CaptionSet, batch_size: int, tell: Tell, *, allow_copies: bool = False) -> Described:
    """Read the whole set without encoding it. Every rank must call it; raises UserError on all as `encode_captions`."""
    own: list[Captioned] = []
    digests: list[bytes] = []
    for number, rows in enumerate(_batches(len(captions), batch_size)):
        tell(number, "reading")
        found = _together(lambda rows=rows: captions.read(rows) if rows else [])
        digests += [_digest(one.image) for one in found]
        own += [Captioned(one.id, one.captions, None, one.where) for one in found]
    return _describe(own, digests, allow_copies)


def encode_captions(
    model: RetrievalModel,
    captions: CaptionSet,
    batch_size: int,
    tell: Tell,
    *,
    workers: int | None = None,
    allow_copies: bool = False,
) -> EncodedCaptions:
    """Encode this rank's slice and gather those of all ranks; every rank must call it.

    ``workers`` are the threads of this rank that decode images. Raises UserError, on every rank, when any rank cannot
    read or decode an image; when the model gives another number of rows, two widths, lengths other than 1, NaN or
    infinity; when one id names two images, or (unless ``allow_copies``) one image goes by two ids.
    """
    own: list[Captioned] = []
    digests: list[bytes] = []
    image_rows = [torch.zeros(0, model.width, device=model.device)]
    text_rows = [torch.zeros(0, model.width, device=model.device)]
    batches = list(_batches(len(captions), batch_size))
    with _Reader(captions, batches, workers, decode=not isinstance(model, EncodesIds)) as reader:
        for number in range(len(batches)):
            tell(number, "encoding")

            def encode(number: int = number) -> _Prepared:
                prepared = reader.batch(number)
                if prepared.samples:
                    image_rows.append(_encode_images(model, prepared, batch_size))
                    text_rows.append(_encode_texts(model, prepared, batch_size))
                    widths = image_rows[-1].shape[1], text_rows[-1].shape[1]
                    if widths[0] != widths[1]:
                        raise UserError(
                            f"evaluation: image embeddings are {widths[0]} wide, text embeddings {widths[1]}: no "
                            "recall between two spaces"
                        )
                return prepared

            prepared = _together(encode)
            own += [Captioned(one.id, one.captions, None, one.where) for one in prepared.samples]
            digests += prepared.digests
    images, texts = ([part for part in parts if len(part)] or parts for parts in (image_rows, text_rows))
    image_mE, text_nE = torch.cat(images).float(), torch.cat(texts).float()
    _check_rows({"image": image_mE, "text": text_nE})
    described = _describe(own, digests, allow_copies)
    kept = torch.tensor(described.kept, device=model.device)
    return EncodedCaptions(gather_variable(image_mE)[kept], gather_variable(text_nE), described)


@dataclass(frozen=True)
class _Prepared:
    samples: list[Captioned]
    digests: list[bytes]
    pixels: list[torch.Tensor]
    """uint8 [3, H, W] each; none where images are not decoded."""


class _Reader:
    """Reads and decodes one batch ahead."""

    def __init__(self, captions: CaptionSet, batches: list[range], workers: int | None, *, decode: bool) -> None:
        self._captions, self._batches, self._decodes = captions, batches, decode
        self._ahead = ThreadPoolExecutor(1, "mmd2v-read")
        self._pool = ThreadPoolExecutor(workers or _threads(), "mmd2v-decode")
        self._next: Future[_Prepared] | None = None

    def __enter__(self) -> _Reader:
        self._next = self._ahead.submit(self._read, 0) if self._batches else None
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._ahead, self._pool):
            pool.shutdown(wait=True, cancel_futures=True)

    def batch(self, number: int) -> _Prepared:
        """Return a batch; they are asked for in order."""
        assert self._next is not None
        prepared = self._next.result()
        if number + 1 < len(self._batches):
            self._next = self._ahead.submit(self._read, number + 1)
        return prepared

    def _read(self, number: int) -> _Prepared:
        rows = self._batches[number]
        samples = self._captions.read(rows) if rows else []
        digests = [_digest(one.image) for one in samples]
        pixels = list(self._pool.map(self._decode, samples)) if self._decodes else []
        return _Prepared([Captioned(one.id, one.captions, None, one.where) for one in samples], digests, pixels)

    def _decode(self, sample: Captioned) -> torch.Tensor:
        if sample.image is None:
            raise UserError(f"{sample.where}: no image is read, which this model needs")
        return decode_image(sample.image, sample.where)


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores))


def _batches(total: int, batch_size: int) -> Iterator[range]:
    """Yield this rank's batches, equally many on every rank; the last may be empty.

    Ranks share whole batches, so that any number of them forms the same ones: embeddings are equal to the last bit.
    """
    batches = -(-total // batch_size)
    first, last = batches * rank() // world_size(), batches * (rank() + 1) // world_size()
    for number in range(first, first + -(-batches // world_size())):
        start = min(number, last) * batch_size
        yield range(min(start, total), min(start + batch_size, total) if number < last else min(start, total))


def _together(action: Callable[[], _Result]) -> _Result:
    """Run ``action``, which must not communicate; an error of any rank ends all of them, at once."""
    result, error = None, None
    try:
        result = action()
    except UserError as problem:
        error = problem
    for number, message in enumerate(gather_objects(None if error is None else str(error))):
        if message is not None:
            of_rank = f"rank {number}: " if world_size() > 1 else ""
            raise shared_error(of_rank + message) from error
    return result  # type: ignore[return-value] - an action that raised does not get here


def _encode_images(model: RetrievalModel, prepared: _Prepared, batch_size: int) -> torch.Tensor:
    if isinstance(model, EncodesIds):
        rows = model.encode_ids([one.id for one in prepared.samples])
    else:
        rows = model.encode_image(prepared.pixels, batch_size)
    return _one_each(rows, len(prepared.samples), "images")


def _encode_texts(model: RetrievalModel, prepared: _Prepared, batch_size: int) -> torch.Tensor:
    texts = [caption for one in prepared.samples for caption in one.captions]
    return _one_each(model.encode_text(texts, batch_size), len(texts), "captions")


def _one_each(rows: torch.Tensor, inputs: int, what: str) -> torch.Tensor:
    if rows.ndim != 2 or len(rows) != inputs:
        raise UserError(f"evaluation: found embeddings {list(rows.shape)} for {inputs} {what}, expected one row each")
    return rows


def _check_rows(embeddings: dict[str, torch.Tensor]) -> None:
    """Raise UserError on every rank for rows that are not finite or not of length 1."""
    counts = {}
    for name, rows in embeddings.items():
        finite = rows.isfinite().all(dim=1)
        off = finite & ((rows.norm(dim=1) - 1).abs() > _NORM_TOLERANCE)
        counts[name] = (int((~finite).sum()), int(off.sum()), len(rows), rows.shape[1])
    of_ranks = gather_objects(counts)
    for name in embeddings:
        bad, off, total = (sum(counts[name][i] for counts in of_ranks) for i in range(3))
        if bad:
            raise shared_error(
                f"evaluation: {bad} of {total} {name} embeddings hold NaN or infinity: no recall of these"
            )
        if off:
            raise shared_error(
                f"evaluation: {off} of {total} {name} embeddings are not of length 1, as cosine needs them"
            )
        if len(widths := {counts[name][3] for counts in of_ranks if counts[name][2]}) > 1:
            raise shared_error(f"evaluation: {name} embeddings are {sorted(widths)} wide on different ranks")


def _digest(image: bytes | memoryview | None) -> bytes:
    return b"" if image is None else hashlib.blake2b(image, digest_size=_DIGEST_BYTES).digest()


def _describe(own: list[Captioned], own_digests: list[bytes], allow_copies: bool) -> Described:
    """Put the ranks' slices together. Raises UserError, on every rank, for ids and images that do not fit."""
    gathered = gather_objects(([(one.id, one.captions, one.where) for one in own], own_digests))
    samples = [sample for samples, _ in gathered for sample in samples]
    all_digests = [digest for _, digests in gathered for digest in digests]
    place: dict[str, int] = {}
    kept, digests, captions, owners = [], [], [], []
    for row, ((name, texts, where), digest) in enumerate(zip(samples, all_digests, strict=True)):
        if name not in place:
            place[name] = len(kept)
            kept.append(row)
            digests.append(digest)
        elif digest != digests[place[name]]:
            first = samples[kept[place[name]]][2]
            raise shared_error(f"evaluation: id '{name}' names two different images: {first} and {where}")
        captions += texts
        owners += [place[name]] * len(texts)
    if not captions:
        raise shared_error(f"evaluation: retrieval needs images and captions, found {len(kept)} and 0")
    if not allow_copies:
        _check_copies([samples[row][0] for row in kept], digests)
    ids = tuple(place)
    duplicates = len(samples) - len(kept)
    return Described(ids, tuple(captions), tuple(owners), tuple(digests), tuple(kept), duplicates)


def _check_copies(ids: list[str], digests: list[bytes]) -> None:
    """The same bytes under two ids are one image that competes with itself."""
    first: dict[bytes, str] = {}
    pairs = [(first.setdefault(digest, name), name) for name, digest in zip(ids, digests, strict=True) if digest]
    copies = [(other, name) for other, name in pairs if other != name]
    if copies:
        shown = ", ".join(f"'{name}' is '{other}'" for other, name in copies[:_SHOWN])
        raise shared_error(
            f"evaluation: {len(copies)} of {len(ids)} images are the same file as another with another id ({shown}), "
            "expected each image once, with all its captions; --allow-copies measures them as they are"
        )
