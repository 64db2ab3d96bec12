"""k-NN image classification: a labelled set as memory bank, cosine, majority vote; no training.

The neighbours are those of `cosine_topk`: by exact score, then lowest index, the index being that of the image in the
order of paths. Among classes with equally many votes the one whose neighbours' similarities sum to more wins, then the
first class.

Shapes: M images of the bank, N queries, D width, k neighbours, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mmd2v.data.labelled_images import LabelledImages, open_labelled
from mmd2v.data.transforms import decode_image
from mmd2v.errors import UserError, nearest
from mmd2v.progress import Progress
from mmd2v_kernels import cosine_topk

_VOTES = 1 << 22  # votes [rows, C] held at once
_BATCH = 256

EncodeImages = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""uint8 images [3, H, W] of any size → [B, D]"""


@dataclass(frozen=True)
class KnnResult:
    """Accuracy and what it was measured on."""

    top1: float
    """Fraction of the queries whose class is right."""
    k: int
    classes: list[str]
    train_images: int
    test_images: int

    def record(self) -> dict[str, Any]:
        """Return what goes into a JSON file."""
        counts = {"train_images": self.train_images, "test_images": self.test_images, "classes": len(self.classes)}
        return {"knn_top1": self.top1, "chance_top1": 1 / len(self.classes), "k": self.k, **counts}

    def text(self) -> str:
        """Return what a person reads."""
        return (
            f"memory bank of {self.train_images:,} images, {self.test_images:,} test images, {len(self.classes)} "
            f"classes\n{self.k}-NN top-1: {100 * self.top1:.2f} % (chance {100 / len(self.classes):.2f} %)"
        )


def knn_classify(train_MD: torch.Tensor, labels_M: torch.Tensor, queries_ND: torch.Tensor, k: int = 10) -> torch.Tensor:
    """Return the class of each query, int64 [N] on the CPU.

    ``labels_M`` is int64 [M], classes from 0. Rows are L2-normalised here. Memory beyond the inputs does not grow with
    N × M. Raises UserError for a ``k`` outside 1..M, embeddings that are not finite or of two widths, or labels that
    do not fit.
    """
    if labels_M.shape != train_MD.shape[:1] or (len(labels_M) and int(labels_M.min()) < 0):
        raise UserError(f"k-NN: labels {list(labels_M.shape)} for {len(train_MD)} images, expected one from 0 each")
    if not 1 <= k <= len(train_MD):
        raise UserError(f"--k: found {k}, expected 1..{len(train_MD)} (the images of the memory bank)")
    try:
        scores_Nk, index_Nk = cosine_topk(
            F.normalize(queries_ND.float(), dim=-1), F.normalize(train_MD.float(), dim=-1), k
        )
    except ValueError as error:
        raise UserError(f"k-NN: {error}") from error
    # On the CPU the sums run in the order of the neighbours, so that equal neighbourhoods have equal sums.
    scores_Nk, votes_Nk = scores_Nk.cpu(), labels_M.cpu()[index_Nk.cpu()]
    classes = int(labels_M.max()) + 1
    found = [torch.zeros(0, dtype=torch.int64)]
    for scores_nk, votes_nk in zip(
        *(rows.split(max(1, _VOTES // classes)) for rows in (scores_Nk, votes_Nk)), strict=True
    ):
        sums_nC = scores_nk.new_zeros(len(votes_nk), classes).scatter_add(1, votes_nk, scores_nk)
        counts_nC = torch.zeros_like(sums_nC).scatter_add(1, votes_nk, torch.ones_like(scores_nk))
        behind = counts_nC < counts_nC.amax(1, keepdim=True)
        found.append(sums_nC.masked_fill(behind, -torch.inf).argmax(1))  # the first of equal ones
    return torch.cat(found)


def knn_accuracy(
    train_MD: torch.Tensor,
    train_labels_M: torch.Tensor,
    test_ND: torch.Tensor,
    test_labels_N: torch.Tensor,
    k: int = 10,
) -> float:
    """Return the share of test rows that `knn_classify` puts into their class."""
    if len(test_ND) == 0 or test_labels_N.shape != test_ND.shape[:1]:
        raise UserError(f"k-NN: {list(test_labels_N.shape)} labels for {len(test_ND)} test images, expected one each")
    found = knn_classify(train_MD, train_labels_M, test_ND, k)
    return (found == test_labels_N.cpu()).double().mean().item()


def knn_of_folder(
    encode: EncodeImages, train: str | Path, test: str | Path, k: int = 10, batch_size: int = _BATCH
) -> KnnResult:
    """Classify the images of ``test`` by those of ``train``, both as `open_labelled` reads them.

    ``encode`` gets decoded images and does the resizing. Raises UserError for what cannot be read, and for classes of
    ``test`` that ``train`` does not have.
    """
    if k < 1 or batch_size < 1:
        raise UserError(f"--k, --batch-size: found {k}, {batch_size}, expected at least 1")
    bank, queries = train_and_test(train, test)
    if k > len(bank):
        raise UserError(f"--k: found {k}, expected 1..{len(bank)} (the images of the memory bank)")
    train_MD, train_labels = encode_class_folders(encode, bank, bank.classes, batch_size, "memory bank")
    test_ND, test_labels = encode_class_folders(encode, queries, bank.classes, batch_size, "test images")
    top1 = knn_accuracy(train_MD, train_labels, test_ND, test_labels, k)
    return KnnResult(top1, k, bank.classes, len(bank), len(queries))


def train_and_test(train: str | Path, test: str | Path) -> tuple[LabelledImages, LabelledImages]:
    """Open labelled images to learn from and to classify.

    Raises UserError for what cannot be read, a single class, and classes of ``test`` that ``train`` does not have.
    """
    bank, queries = open_labelled(train, "--train"), open_labelled(test, "--test")
    if len(bank.classes) < 2:
        raise UserError(f"--train: {train} has the class {bank.classes[0]} alone, expected at least two")
    unknown = [name for name in queries.classes if name not in bank.classes]
    if unknown:
        hint = nearest(unknown[0], bank.classes)
        raise UserError(
            f"--test: class '{unknown[0]}' of {test} is not among the {len(bank.classes)} of --train {train}.{hint}"
        )
    return bank, queries


def encode_class_folders(
    encode: EncodeImages,
    folders: LabelledImages,
    classes: Sequence[str],
    batch_size: int = _BATCH,
    what: str = "images",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (embeddings [M, D] on the CPU, labels int64 [M] as places in ``classes``), in the order of paths.

    An archive and the folder it was made of give the same rows. Raises UserError naming an image that does not decode.
    """
    place = {name: number for number, name in enumerate(classes)}
    names: list[str] = []
    labels: list[int] = []
    rows: list[torch.Tensor] = []
    images = folders.images()
    with Progress(f"encoding {what}", len(folders), unit="images") as progress:
        while chunk := list(islice(images, batch_size)):
            pixels = [
                data if isinstance(data, torch.Tensor) else decode_image(data, folders.where(name))
                for name, _, data in chunk
            ]
            rows.append(encode(pixels).float().cpu())
            names += [name for name, _, _ in chunk]
            labels += [place[of_class] for _, of_class, _ in chunk]
            progress.advance(len(chunk))
    order = torch.tensor(sorted(range(len(names)), key=names.__getitem__))
    return torch.cat(rows)[order], torch.tensor(labels)[order]
