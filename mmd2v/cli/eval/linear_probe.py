"""`mmd2v eval linear-probe`: logistic regression on frozen features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from mmd2v.cli.eval.common import OfModel, short


@dataclass(frozen=True, kw_only=True)
class LinearProbe(OfModel):
    """Linear probe: L2-regularised logistic regression on frozen features, its strength chosen on held-out images."""

    model: Positional[str]
    """Folder written by `mmd2v export`, or KIND:PATH of another model."""
    train: Annotated[Path, arg(metavar="DATA")]
    """Images to fit: a folder of class folders of images, or a .tar, .tar.gz or .zip of one; of an archive with several
    sets, one of them: cifar10.tar.gz/cifar10/train; CIFAR's binary files: 'data_batch_*.bin'; or shards with .cls."""
    test: Annotated[Path, arg(metavar="DATA")]
    """Images to classify, in the same forms."""
    features: Literal["embedding", "pooled"] = "embedding"
    """embedding: what retrieval compares; pooled: the vector before the projection."""

    def run(self) -> int:
        """Measure and print accuracy."""
        from mmd2v.evaluation.features import image_features, require
        from mmd2v.evaluation.linear_probe import probe_of_folder

        model = self.load(self.model)
        require(model, "image", f"{self.model}: linear probe")
        found = probe_of_folder(
            lambda images: image_features(model, images, self.features, self.batch_size),
            self.train,
            self.test,
            model.device,
        )
        return self.report(model, {"features": self.features, "test": short(self.test)}, found.text(), found.record())
