"""`mmd2v eval pairs`: text-pair retrieval with an exported encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from mmd2v.cli.eval.common import OfExport


@dataclass(frozen=True, kw_only=True)
class Pairs(OfExport):
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
