"""`mmd2v eval pairs`: text-pair retrieval with an exported encoder or another model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from mmd2v.cli.eval.common import OfModel


@dataclass(frozen=True, kw_only=True)
class Pairs(OfModel):
    """Text-pair retrieval: sentences 1 as memory bank, sentences 2 as queries, and the inverse; R@1 and R@5."""

    model: Positional[str]
    """Folder written by `mmd2v export`, KIND:PATH of another model, hf-text:FOLDER of a Hugging Face text encoder."""
    pairs: Annotated[tuple[str, ...], arg(metavar="[NAME=]FILE")]
    """Labelled pairs, of which the positive ones are used. The 16 published numbers and their mean: qqp_train=FILE
    qqp_dev=FILE mrpc_train=FILE mrpc_test=FILE, whose counts are then asserted."""
    format: Literal["auto", "mrpc", "qqp", "qqp_glue"] = "auto"
    """mrpc: the MSR paraphrase corpus; qqp: Quora's pairs with CSV quoting; qqp_glue: GLUE's file, without. mrpc_train
    and mrpc_test are always of the first."""
    limit: Annotated[int, arg(metavar="N")] = 25_000
    """Use the first N positive pairs of a file at most."""
    pooling: tuple[Literal["embedding", "cls", "mean", "mean_padded"], ...] = ("embedding",)
    """One or several. embedding: the model's own text embedding; cls, mean: of the last layer's tokens, padding left
    out; mean_padded: padding counted, of a text encoder that computes it."""

    def run(self) -> int:
        """Measure and print recall."""
        from functools import partial

        from mmd2v.errors import UserError
        from mmd2v.evaluation.features import require, text_features
        from mmd2v.evaluation.text_pairs import named_files, pairs_of_files

        files = named_files(self.pairs)
        if not files or not self.pooling:
            raise UserError("--pairs, --pooling: found none, expected at least one")
        encoder = self.load(self.model)
        require(encoder, "text", f"{self.model}: text-pair retrieval")
        found = {
            pooling: pairs_of_files(
                partial(text_features, encoder, pooling=pooling, batch_size=self.batch_size),
                files,
                self.format,
                self.limit,
            )
            for pooling in self.pooling
        }
        alone = len(files) == 1 and next(iter(files)) == next(iter(files.values())).name
        described = {"pooling": ", ".join(found)}
        if alone:
            described["file"] = next(iter(files))
        parts = {pooling: next(iter(report.results.values())) if alone else report for pooling, report in found.items()}
        if len(parts) == 1:
            (part,) = parts.values()
            return self.report(encoder, described, part.text(), part.record())
        text = "\n\n".join(f"pooling {pooling}\n{part.text()}" for pooling, part in parts.items())
        return self.report(
            encoder, described, text, {"poolings": {pooling: part.record() for pooling, part in parts.items()}}
        )
