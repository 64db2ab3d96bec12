"""What a table measures of the export of a run of one modality."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from table import without_folder

import mmd2v
from mmd2v.data.batch import Batch
from mmd2v.evaluation.features import image_features, modality_of, text_features
from mmd2v.evaluation.knn import knn_of_folder
from mmd2v.evaluation.text_pairs import pairs_of_file
from mmd2v.inference import Encoder
from mmd2v.models.student import Student


class Measured(NamedTuple):
    """Numbers as fractions, and what they are shares of."""

    numbers: dict[str, float]
    queries: int


@dataclass
class Measurement:
    """k-NN classification of the pooled vector, or text-pair retrieval with mean pooling; one at a time."""

    kind: Literal["knn", "pairs"]
    files: tuple[Path, ...]
    """knn: memory bank and test images; pairs: the file."""
    count: int
    """knn: neighbours; pairs: pairs used at most."""
    threads: int = 1
    _lock: Any = field(default_factory=threading.Lock, repr=False)
    _encoded: dict[bytes, dict[bytes, Any]] = field(default_factory=dict, repr=False)

    def __call__(self, export: Path) -> Measured:
        """Measure the export in a folder."""
        with self._lock, torch.inference_mode():
            torch.set_num_threads(self.threads)
            encoder = mmd2v.load(export)
            return self._knn(encoder) if self.kind == "knn" else self._pairs(encoder)

    def words(self) -> str:
        """Say what is measured, in the words of ``mmd2v eval``; nothing that names the machine's folders."""
        names = [without_folder(str(file)) for file in self.files]
        if self.kind == "pairs":
            return f"eval pairs EXPORT --pairs {names[0]} --limit {self.count} --pooling mean"
        return f"eval knn EXPORT --train {names[0]} --test {names[1]} --k {self.count} --features pooled"

    def title(self) -> str:
        """Name the numbers."""
        if self.kind == "pairs":
            return "Recall of text-pair retrieval (mean pooling)"
        return f"Accuracy of {self.count}-NN classification (pooled vector)"

    def _pairs(self, encoder: Encoder) -> Measured:
        found = pairs_of_file(lambda texts: text_features(encoder, texts, "mean"), self.files[0], limit=self.count)
        # The mean of the four first; bounds of ties and the chance level stay out of the table.
        kept = {key: found.metrics[key] for key in ("mean", *found.metrics) if key == "mean" or _is_recall(key)}
        return Measured(kept, found.pairs)

    def _knn(self, encoder: Encoder) -> Measured:
        share_encoder(encoder.student, modality_of(encoder, "image", "k-NN"), self._encoded)
        found = knn_of_folder(lambda images: image_features(encoder, images, "pooled"), *self.files, self.count)
        return Measured({"knn_top1": found.top1}, found.test_images)


def share_encoder(student: Student, modality: str, encoded: dict[bytes, dict[bytes, Any]]) -> None:
    """Let a student's modality encoder take from ``encoded`` what one with the same weights said of the same images.

    Rows of a table share a frozen encoder, which costs several times what the blocks behind it do.
    """
    module = student.encoders[modality]
    weights = _digest(*module.state_dict().values())
    if weights not in encoded:
        encoded.clear()  # of trained encoders no two are equal: hold one's outputs at most
    of_weights = encoded.setdefault(weights, {})
    forward: Callable[..., Any] = module.forward

    def shared(batch: Batch, *rest: Any) -> Any:
        key = _digest(batch.images)
        if key not in of_weights:
            of_weights[key] = forward(batch, *rest)
        return of_weights[key]

    module.forward = shared


def _is_recall(key: str) -> bool:
    return "_R@" in key and key.rpartition("@")[2].isdigit() and not key.startswith("chance")


def _digest(*tensors: torch.Tensor) -> bytes:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.digest()
