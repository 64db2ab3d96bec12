"""`mmd2v eval retrieval`: image–text recall of a model on a caption file or shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Retrieval:
    """Image–text recall at 1, 5 and 10 in both directions; also under torchrun, each rank encoding its share."""

    model: Positional[str]
    """Folder written by `mmd2v export`, or another model as KIND:PATH."""
    data: Positional[tuple[str, ...]] = ()
    """A caption file (dataset_coco.json, dataset_flickr30k.json, a list of {"image", "caption"}, captions_*.json), or
    shards: a folder of .tar files, a path with {000..007} braces or wildcards, one or more."""
    shards: tuple[str, ...] = ()
    """The same as DATA."""
    images: tuple[str, ...] = ()
    """Images of a caption file: folders, .tar files or folders of them. By default the folder of the file."""
    split: tuple[str, ...] = ()
    """Splits of a Karpathy file, such as test."""
    protocol: Literal["karpathy", "image_per_caption"] = "karpathy"
    """karpathy: an image is one candidate. image_per_caption: every caption owns a copy of its image, which shows what
    that mistake does to a number."""
    json: Path | None = None
    """File to write the numbers to."""
    dump: Annotated[Path | None, arg(metavar="DIR")] = None
    """New folder for embeddings, ids and positives, from which every number can be computed again."""
    cache: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder that keeps embeddings by the content of model and data."""
    resamples: int = 1000
    """Bootstrap resamples of the images, each with its captions; 0: no confidence intervals."""
    seed: int = 0
    """Seed of the resamples and of the self-check."""
    limit: int | None = None
    """Use only the first N images."""
    expect_images: int | None = None
    """Fail unless the set has this many images. COCO's and Flickr30K's test sets are recognised and checked anyway."""
    expect_captions: int | None = None
    """Fail unless the set has this many captions."""
    allow_copies: bool = False
    """Measure a set in which one image file goes by two ids."""
    batch_size: int = 128
    """Images a rank and forward pass."""
    workers: int | None = None
    """Threads a rank that decode images; by default one a core."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of matrix products."""

    def run(self) -> int:
        """Measure and print a table."""
        from mmd2v.evaluation.bootstrap import Bootstrap
        from mmd2v.evaluation.retrieval_run import HowMeasured, RetrievalData, evaluate_retrieval
        from mmd2v.files import write_json

        found = evaluate_retrieval(
            self.model,
            RetrievalData(
                [*self.data, *self.shards],
                self.images,
                self.split,
                self.limit,
                (self.expect_images, self.expect_captions),
                self.allow_copies,
            ),
            HowMeasured(
                protocol=self.protocol,
                bootstrap=Bootstrap(self.resamples, self.seed),
                batch_size=self.batch_size,
                workers=self.workers,
                device=self.device,
                precision=self.precision,
                cache=self.cache,
            ),
            out=self.json,
            dump=self.dump,
        )
        if found is None:  # another rank than the first
            return 0
        print(found.text())
        if self.json is not None:
            write_json(self.json, found.record())
        return 0
