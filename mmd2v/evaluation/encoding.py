"""Encoding an evaluation set over all ranks: every rank its own slice once, embeddings gathered on every rank.

Shapes: B images and N captions of a batch, then M images and N captions of the whole set, E width of an embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from mmd2v.data.batch import Batch
from mmd2v.distributed.collectives import gather_objects, gather_variable, rank
from mmd2v.distributed.coordination import shared_error
from mmd2v.errors import UserError

_ID_BYTES = 16


class HasEmbedding(Protocol):
    """Anything with embeddings by modality, such as `mmd2v.models.student.StudentOutput`."""

    @property
    def embedding(self) -> dict[str, torch.Tensor]:
        """Modality → [rows, E], L2-normalised."""


Encode = Callable[[Batch], HasEmbedding]


@dataclass(frozen=True)
class EncodedSet:
    """An evaluation set in embedding space; images with one id are one image."""

    image_ME: torch.Tensor
    text_NE: torch.Tensor
    caption_image_N: torch.Tensor
    """int64 [N], row of ``image_ME`` that each caption describes."""
    duplicates: int
    """Images left out because their id had come before; their captions count for the first one."""


def encode_set(student: Encode, loader: Iterable[Batch], device: torch.device, *, image: str, text: str) -> EncodedSet:
    """Encode this rank's batches and gather those of all ranks, in rank order.

    Every rank must call it. Ranks run the same number of forward passes (one that has run out repeats its last batch
    and drops the result), because ZeRO-3 gathers weights in each of them. A module is put into eval mode meanwhile.
    Raises UserError on every rank when any rank cannot read its data, has no image, or finds embeddings that are not
    finite.
    """
    images: list[torch.Tensor] = []
    texts: list[torch.Tensor] = []
    owners: list[torch.Tensor] = []
    ids: list[torch.Tensor] = []
    seen = 0
    module = student if isinstance(student, nn.Module) else nn.Module()
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            for batch, is_own in in_step(loader):
                output = student(batch.to(device))
                if is_own:
                    images.append(_embedding(output, image))
                    texts.append(_embedding(output, text))
                    owners.append(batch.caption_image.to(device) + seen)
                    ids.append(_id_hashes(batch.sample_ids).to(device))
                    seen += len(batch)
    finally:
        module.train(training)
    own_images, own_texts, own_ids, own_owners = (torch.cat(rows) for rows in (images, texts, ids, owners))
    _check_rows(images=(own_images, own_ids), captions=(own_texts, own_owners))
    _check_finite({image: own_images, text: own_texts})
    before = sum(gather_objects(seen)[: rank()])
    return _without_duplicates(
        gather_variable(own_images),
        gather_variable(own_texts),
        gather_variable(own_owners + before),
        gather_variable(own_ids),
    )


def in_step(loader: Iterable[Batch], what: str = "image") -> Iterator[tuple[Batch, bool]]:
    """Yield (batch, whether it is this rank's own) equally often on all ranks; errors are raised on all of them.

    ``what`` messages call one item of the set.
    """
    batches = iter(loader)
    last: Batch | None = None
    while True:
        batch, error = None, None
        try:
            batch = next(batches, None)
        except UserError as problem:
            error = str(problem)
        status = gather_objects((batch is not None, error))
        for _, message in status:
            if message is not None:
                raise shared_error(message)
        if not any(has_batch for has_batch, _ in status):
            if last is None:
                raise shared_error(f"evaluation: the set holds no {what}")
            return
        if last is None and not all(has_batch for has_batch, _ in status):
            raise shared_error(
                f"evaluation: fewer {what}s than the {len(status)} ranks; use fewer ranks or more {what}s"
            )
        own = batch is not None
        last = batch if batch is not None else last
        assert last is not None
        yield last, own


def _embedding(output: HasEmbedding, modality: str) -> torch.Tensor:
    if modality not in output.embedding:
        raise shared_error(
            f"evaluation: retrieval needs image and text, but the encoder gave no '{modality}', only "
            f"{sorted(output.embedding)}"
        )
    return output.embedding[modality].float()


def _check_rows(**pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Both counts are asserted: one embedding an image with an id, one a caption with an image."""
    sizes = {what: tuple(map(len, pair)) for what, pair in pairs.items()}
    for of_rank in gather_objects(sizes):
        for what, (embeddings, inputs) in of_rank.items():
            if embeddings != inputs:
                raise shared_error(f"evaluation: {embeddings} embeddings for {inputs} {what} of a rank")


def _check_finite(embeddings: dict[str, torch.Tensor]) -> None:
    counts = {name: (int((~rows.isfinite().all(dim=1)).sum()), len(rows)) for name, rows in embeddings.items()}
    of_ranks = gather_objects(counts)
    for name in embeddings:
        bad, total = (sum(counts[name][i] for counts in of_ranks) for i in (0, 1))
        if bad:
            raise shared_error(
                f"evaluation: {bad} of {total} {name} embeddings hold NaN or infinity: no recall of these"
            )


def _id_hashes(sample_ids: tuple[str, ...]) -> torch.Tensor:
    """int64 [B, 2]: 128 bits of each id, which collectives can carry on any device."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=_ID_BYTES).digest() for name in sample_ids)
    return torch.frombuffer(bytearray(digests), dtype=torch.int64).view(-1, 2)


def _without_duplicates(
    image_ME: torch.Tensor, text_NE: torch.Tensor, caption_row_N: torch.Tensor, ids_M2: torch.Tensor
) -> EncodedSet:
    distinct, group_M = ids_M2.unique(dim=0, return_inverse=True)
    rows_M = torch.arange(len(ids_M2), device=ids_M2.device)
    first = torch.full((len(distinct),), len(ids_M2), device=ids_M2.device)
    first = first.scatter_reduce(0, group_M, rows_M, "amin")
    kept = first.sort().values
    place = torch.searchsorted(kept, first[group_M])
    return EncodedSet(image_ME[kept], text_NE, place[caption_row_N], len(ids_M2) - len(kept))
