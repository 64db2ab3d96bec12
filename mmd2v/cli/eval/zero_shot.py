"""`mmd2v eval zero-shot`: classification by the names of the classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mmd2v.cli.eval.common import OfModel, short


@dataclass(frozen=True, kw_only=True)
class ZeroShot(OfModel):
    """Zero-shot classification of images by the names of their classes: top-1 and top-5, chance beside."""

    model: Positional[str]
    """Folder written by `mmd2v export`, or KIND:PATH of another model of images and texts."""
    data: Annotated[Path, arg(metavar="DATA")]
    """A folder of class folders of images, or a .tar, .tar.gz or .zip of one; CIFAR's binary files; shards
    with .cls."""
    classes: Annotated[Path | None, arg(metavar="FILE")] = None
    """Names of the classes: a line each or a JSON list, in the order of the labels; or a JSON object, label → name. By
    default the labels themselves; WordNet ids get their names in ImageNet."""
    templates: Annotated[Path | None, arg(metavar="FILE")] = None
    """Prompts, a line each or a JSON list, with {} or {c} for the class; by default a short set of our own."""

    def run(self) -> int:
        """Measure and print accuracy."""
        from functools import partial

        from mmd2v.evaluation.features import require
        from mmd2v.evaluation.zero_shot import zero_shot_of

        model = self.load(self.model)
        for kind in ("image", "text"):
            require(model, kind, f"{self.model}: zero-shot classification")
        found = zero_shot_of(
            partial(model.encode_image, batch_size=self.batch_size),
            partial(model.encode_text, batch_size=self.batch_size),
            self.data,
            self.classes,
            self.templates,
        )
        prompts = "own short set" if self.templates is None else self.templates.name
        described = {"data": short(self.data), "prompts": prompts}
        return self.report(model, described, found.text(), found.record())
