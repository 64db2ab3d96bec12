"""`mmd2v eval knn`: k-NN image classification with an exported encoder or another model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from mmd2v.cli.eval.common import OfModel, short


@dataclass(frozen=True, kw_only=True)
class Knn(OfModel):
    """k-NN image classification: a labelled set as memory bank, cosine, majority vote, top-1."""

    model: Positional[str]
    """Folder written by `mmd2v export`, or KIND:PATH of another model."""
    train: Annotated[Path, arg(metavar="DATA")]
    """Memory bank: a folder of class folders of images, or a .tar, .tar.gz or .zip of one; of an archive with several
    sets, one of them: cifar10.tar.gz/cifar10/train; CIFAR's binary files: 'data_batch_*.bin'; or shards with .cls."""
    test: Annotated[Path, arg(metavar="DATA")]
    """Images to classify, in the same forms."""
    k: int = 10
    """Neighbours that vote."""
    features: Literal["embedding", "pooled"] = "embedding"
    """embedding: what retrieval compares; pooled: the vector before the projection."""

    def run(self) -> int:
        """Measure and print accuracy."""
        from mmd2v.evaluation.features import image_features, require
        from mmd2v.evaluation.knn import knn_of_folder

        encoder = self.load(self.model)
        require(encoder, "image", f"{self.model}: k-NN classification")
        found = knn_of_folder(
            lambda images: image_features(encoder, images, self.features, self.batch_size),
            self.train,
            self.test,
            self.k,
        )
        return self.report(encoder, {"features": self.features, "test": short(self.test)}, found.text(), found.record())
