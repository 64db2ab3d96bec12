"""`mmd2v data labelled`: shards for fine-tuning with classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mmd2v.errors import UserError


@dataclass(frozen=True)
class Labelled:
    """Pack labelled images or sentences into shards for fine-tuning with the classification objective."""

    source: Annotated[Positional[Path], arg(metavar="SOURCE")]
    """Images: a folder of class folders, an archive of one, CIFAR's binary files, shards with .cls. Sentences, with
    --text and --label: a tab-separated file with a header."""
    out: Path
    """Folder to create."""
    text: Annotated[tuple[str, ...], arg(metavar="COLUMN ...")] = ()
    """Column of the sentence, or the two of a pair."""
    label: Annotated[str | None, arg(metavar="COLUMN")] = None
    """Column of the class."""
    separator: str = "[SEP]"
    """Between the sentences of a pair: the tokenizer's own token."""
    quoted: bool = False
    """Fields are quoted as in CSV."""
    classes: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Classes in the order of their labels; by default those of SOURCE, sorted. Name the training set's for a test
    set."""
    shard_size: int = 1000
    """Samples a shard."""

    def run(self) -> int:
        """Write and print what was written."""
        from mmd2v.data.labelled_packing import pack_images, pack_sentences

        if self.text and self.label is not None:
            found = pack_sentences(
                self.source,
                self.out,
                self.text,
                self.label,
                separator=self.separator,
                quoted=self.quoted,
                shard_size=self.shard_size,
                classes=self.classes,
            )
        elif self.text or self.label is not None:
            raise UserError("--text, --label: found one of them, expected both (sentences) or none (images)")
        else:
            found = pack_images(self.source, self.out, self.shard_size, self.classes)
        names = ", ".join(f"{place} {name}" for place, name in enumerate(found.classes[:20]))
        print(f"{self.out}: {found.report.samples:,} samples, {len(found.classes)} classes: {names}")
        return 0
