"""Encoding images and sentences with the student inside the engine: each rank its share, in step.

Every forward pass is one of all ranks, because ZeRO-3 gathers weights in each; while the device computes, a thread
reads, decodes and tokenises the next batch.

Shapes: M images, N texts, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Literal, TypeVar

import torch

from mmd2v.config.schema import ImageTransformConfig
from mmd2v.data.batch import Batch
from mmd2v.data.class_folders import ClassFolders
from mmd2v.data.tokenizers import Tokenizer
from mmd2v.data.transforms import decode_image, eval_transform
from mmd2v.distributed.collectives import gather_objects, gather_variable, rank, world_size
from mmd2v.evaluation.encoding import in_step
from mmd2v.train.module import TrainModule

Feature = Literal["embedding", "pooled"]
Item = TypeVar("Item")

_THREADS = 4  # that decode: ranks of a node share its cores


class SlicedEncoder:
    """Features of a modality by the module of a run, which is put into eval mode by the caller."""

    def __init__(self, module: TrainModule, modality: str, feature: Feature, device: torch.device) -> None:
        self._module, self._modality, self._feature, self._device = module, modality, feature, device

    def images(
        self, folders: ClassFolders, classes: Sequence[str], image: ImageTransformConfig, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ([M, D], labels int64 [M] as places in ``classes``) of all images in the order of their paths.

        The same on every rank; every rank must call it. Raises UserError, on every rank, for an image that cannot be
        read.
        """
        place = {name: number for number, name in enumerate(classes)}
        names: list[str] = []
        labels: list[int] = []

        def batches() -> Iterator[Batch]:
            own = islice(folders.images(), rank(), None, world_size())
            with ThreadPoolExecutor(_THREADS) as threads:
                while chunk := list(islice(own, batch_size)):
                    names.extend(name for name, _, _ in chunk)
                    labels.extend(place[of_class] for _, of_class, _ in chunk)
                    pixels = threads.map(
                        lambda one: eval_transform(decode_image(one[2], folders.where(one[0])), image), chunk
                    )
                    yield _image_batch(torch.stack(list(pixels)))

        rows_MD = self._encode(batches(), "image")
        gathered = gather_objects((names, labels))
        all_names = [name for of_rank, _ in gathered for name in of_rank]
        all_labels = torch.tensor([label for _, of_rank in gathered for label in of_rank])
        order = torch.tensor(sorted(range(len(all_names)), key=all_names.__getitem__))
        return rows_MD[order.to(rows_MD.device)], all_labels[order]

    def texts(self, texts: Sequence[str], tokenizer: Tokenizer, batch_size: int) -> torch.Tensor:
        """Return [N, D] of the texts, the same on every rank; every rank must call it."""
        first, last = (len(texts) * r // world_size() for r in (rank(), rank() + 1))

        def batches() -> Iterator[Batch]:
            for start in range(first, last, batch_size):
                ids_S, lengths_N = tokenizer.encode_batch(texts[start : min(start + batch_size, last)])
                yield _text_batch(torch.from_numpy(ids_S), torch.from_numpy(lengths_N))

        return self._encode(batches(), "text")

    def _encode(self, batches: Iterable[Batch], what: str) -> torch.Tensor:
        rows: list[torch.Tensor] = []
        with torch.no_grad():
            for batch, is_own in in_step(_ahead(batches), what):
                output = self._module(batch.to(self._device), None, (self._modality,))
                if is_own:
                    rows.append(getattr(output, self._feature)[self._modality].float())
        return gather_variable(torch.cat(rows))


def _image_batch(pixels: torch.Tensor) -> Batch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return Batch(pixels, nothing.int(), nothing.int(), nothing)


def _text_batch(ids_S: torch.Tensor, lengths_N: torch.Tensor) -> Batch:
    images = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    return Batch(images, ids_S, lengths_N, torch.zeros(len(lengths_N), dtype=torch.int64))


def _ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items, each made in a thread while the one before is used."""
    source = iter(items)
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, source, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, source, None)
            yield item
