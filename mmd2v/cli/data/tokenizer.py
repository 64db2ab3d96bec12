"""`mmd2v data tokenizer`: a vocabulary from captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mmd2v.cli.data.common import SHARDS_HELP, Sourced
from mmd2v.data.tokenizers import VocabularyKind


@dataclass(frozen=True)
class Tokenizer(Sourced):
    """Learn a vocabulary from the captions of some shards and write a Hugging Face tokenizer.json."""

    shards: Annotated[Positional[tuple[str, ...]], arg(metavar="SHARDS ...", help=SHARDS_HELP)]
    out: Path
    """File to create."""
    kind: VocabularyKind = "wordpiece"
    """wordlevel: whole words; wordpiece: BERT's pieces; bpe: byte pairs, which know no unknown word."""
    vocab_size: int = 8192
    """Most entries, special tokens included."""

    def run(self) -> int:
        """Learn and print the size of the vocabulary."""
        from mmd2v.data.shards import ShardSet
        from mmd2v.data.tokenizers import train_tokenizer
        from mmd2v.files import check_output, write_text
        from mmd2v.progress import track

        check_output("--out", self.out, new=True)
        shards = ShardSet(self.shards, source=self.source)
        captions = (text for texts in track(shards.captions(), "reading", len(shards), unit="images") for text in texts)
        tokenizer = train_tokenizer(captions, self.kind, self.vocab_size)
        write_text(self.out, tokenizer.to_str(pretty=True))
        print(f"{self.out}: {tokenizer.get_vocab_size():,} entries")
        return 0
