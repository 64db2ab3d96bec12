"""`mmd2v eval`: measure an exported encoder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from mmd2v.inference import Encoder


@dataclass(frozen=True)
class Retrieval:
    """Image–text recall at 1, 5 and 10 in both directions; also under torchrun, each rank encoding its share."""

    model: Positional[Path]
    """Folder written by `mmd2v export`."""
    shards: tuple[str, ...]
    """A folder of .tar files, a path with {000..007} braces or wildcards; one or more."""
    json: Path | None = None
    """File to write the numbers to."""
    limit: int | None = None
    """Use only the first N images."""
    expect_images: int | None = None
    """Fail unless the set has this many images (COCO test: 5000, Flickr30K test: 1000)."""
    expect_captions: int | None = None
    """Fail unless the set has this many captions (COCO test: 25010, Flickr30K test: 5000)."""
    batch_size: int = 128
    """Images a rank and forward pass."""
    workers: int | None = None
    """Loader processes a rank; by default those of the export's config."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of matrix products."""

    def run(self) -> int:
        """Measure and print a table."""
        from mmd2v.evaluation.exported import evaluate_export
        from mmd2v.files import write_json

        found = evaluate_export(
            self.model,
            list(self.shards),
            limit=self.limit,
            expected=(self.expect_images, self.expect_captions),
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.device,
            precision=self.precision,
            out=self.json,
        )
        if found is None:  # another rank than the first
            return 0
        print(found.text())
        if self.json is not None:
            write_json(self.json, found.record())
        return 0


@dataclass(frozen=True, kw_only=True)
class _OfExport:
    """What every command has that encodes with an export by itself."""

    json: Path | None = None
    """File to write the numbers to."""
    batch_size: int = 128
    """Inputs a forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of matrix products."""

    def load(self, model: Path) -> Encoder:
        """Open the export once it is sure that the numbers can be written."""
        from mmd2v.errors import UserError
        from mmd2v.files import check_output
        from mmd2v.inference import load

        if self.batch_size < 1:
            raise UserError(f"--batch-size: found {self.batch_size}, expected at least 1")
        if self.json is not None:
            check_output("--json", self.json)
        return load(model, self.device, self.precision)

    def report(self, encoder: Encoder, described: dict[str, str], text: str, record: dict[str, Any]) -> int:
        """Print the result, and write it with what it was measured with."""
        from mmd2v.files import write_json

        how = ", ".join(f"{key} {value}" for key, value in described.items())
        print(f"{encoder.config.name}: {how}\n{encoder.preprocessing()}\n{text}")
        if self.json is not None:
            measured = {"model": encoder.config.name, **described, "preprocessing": encoder.preprocessing()}
            write_json(self.json, {**measured, **record})
        return 0


@dataclass(frozen=True, kw_only=True)
class Knn(_OfExport):
    """k-NN image classification: a labelled set as memory bank, cosine, majority vote, top-1."""

    model: Positional[Path]
    """Folder written by `mmd2v export`."""
    train: Annotated[Path, arg(metavar="DATA")]
    """Memory bank: a folder of class folders of images, or a .tar, .tar.gz or .zip of one; of an archive with several
    sets, one of them: cifar10.tar.gz/cifar10/train."""
    test: Annotated[Path, arg(metavar="DATA")]
    """Images to classify, in the same forms."""
    k: int = 10
    """Neighbours that vote."""
    features: Literal["embedding", "pooled"] = "embedding"
    """embedding: what retrieval compares; pooled: the vector before the projection."""

    def run(self) -> int:
        """Measure and print accuracy."""
        from mmd2v.evaluation.features import image_features, modality_of
        from mmd2v.evaluation.knn import knn_of_folder

        encoder = self.load(self.model)
        modality_of(encoder, "image", f"{self.model}: k-NN classification")
        found = knn_of_folder(
            lambda images: image_features(encoder, images, self.features, self.batch_size),
            self.train,
            self.test,
            self.k,
        )
        return self.report(encoder, {"features": self.features}, found.text(), found.record())


@dataclass(frozen=True, kw_only=True)
class Pairs(_OfExport):
    """Text-pair retrieval: sentences 1 as memory bank, sentences 2 as queries, and the inverse; R@1 and R@5."""

    model: Positional[Path]
    """Folder written by `mmd2v export`."""
    pairs: Annotated[Path, arg(metavar="FILE")]
    """Labelled pairs, of which the positive ones are used."""
    format: Literal["auto", "mrpc", "qqp", "qqp_glue"] = "auto"
    """mrpc: the MSR paraphrase corpus; qqp: Quora's pairs with CSV quoting; qqp_glue: GLUE's file, without."""
    limit: Annotated[int, arg(metavar="N")] = 25_000
    """Use the first N positive pairs at most."""
    pooling: Literal["embedding", "cls", "mean", "mean_padded"] = "embedding"
    """embedding: the export's own text embedding; cls, mean: of the last layer's tokens, padding left out; mean_padded:
    padding counted, of an export whose text encoder computes it."""

    def run(self) -> int:
        """Measure and print recall."""
        from mmd2v.evaluation.features import modality_of, text_features
        from mmd2v.evaluation.text_pairs import pairs_of_file

        encoder = self.load(self.model)
        modality_of(encoder, "text", f"{self.model}: text-pair retrieval")
        found = pairs_of_file(
            lambda texts: text_features(encoder, texts, self.pooling, self.batch_size),
            self.pairs,
            self.format,
            self.limit,
        )
        described = {"pooling": self.pooling, "file": self.pairs.name}
        return self.report(encoder, described, found.text(), found.record())


def main(argv: Sequence[str]) -> int:
    """Run ``mmd2v eval ARGV`` and return the exit status."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"retrieval": Retrieval, "knn": Knn, "pairs": Pairs},
        args=list(argv),
        prog="mmd2v eval",
        description=sys.modules[__name__].__doc__,
    )
    return command.run()
