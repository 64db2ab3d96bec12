"""`mmd2v data`: pack, generate and check shards, build a tokenizer, measure how fast they load."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from mmd2v.data.sources import FORMATS, Format
from mmd2v.data.tokenizers import VocabularyKind

_SHARDS_HELP = "A folder of .tar files, a path with {000..007} braces or wildcards; one or more."

_FORMAT_HELP = "; ".join(
    ["Format of SOURCE; auto looks at it", *(f"{name}: {kind.summary}" for name, kind in FORMATS.items())]
)


@dataclass(frozen=True)
class Pack:
    """Pack captioned images, or text alone, into WebDataset shards; the folder appears whole or not at all.

    Interrupted (Ctrl-C, kill), the command leaves OUT.partial, and the same command goes on behind its last finished
    shard; the result has the same bytes.
    """

    source: Annotated[Positional[Path], arg(metavar="SOURCE")]
    """Caption file, folder or archive; see --format."""
    out: Path
    """Folder to create."""
    images: Annotated[tuple[Path, ...], arg(metavar="DIR|TAR ...")] = ()
    """Folders or uncompressed .tar files of the images; by default the folder of SOURCE."""
    format: Annotated[Format, arg(help=_FORMAT_HELP)] = "auto"
    split: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Splits to take from a Karpathy file, for example: --split train restval."""
    shard_size: int = 1000
    """Samples a shard."""
    resize: Annotated[int | None, arg(metavar="PX")] = None
    """Shrink images whose shorter side is longer than this, in pixels."""
    limit: Annotated[int | None, arg(metavar="N")] = None
    """Write the first N samples alone."""
    max_captions: Annotated[int | None, arg(metavar="N")] = None
    """Take the first N captions of an image alone."""
    skip_bad: bool = False
    """Leave damaged samples out and count them by kind, instead of stopping at the first."""
    image_column: Annotated[str | None, arg(metavar="NAME")] = None
    """CSV column of image names; by default one of the usual names."""
    caption_column: Annotated[str | None, arg(metavar="NAME")] = None
    """CSV column of captions; by default one of the usual names."""
    passage_words: Annotated[int | None, arg(metavar="N")] = None
    """Most words of a passage of text; 256 by default. Texts are cut behind paragraphs, or else sentences."""

    def run(self) -> int:
        """Pack and print what was written."""
        from mmd2v.data.packing import pack

        report = pack(
            self.source,
            self.out,
            images=self.images,
            format=self.format,
            splits=self.split,
            shard_size=self.shard_size,
            resize=self.resize,
            image_column=self.image_column,
            caption_column=self.caption_column,
            max_captions=self.max_captions,
            passage_words=self.passage_words,
            limit=self.limit,
            skip_bad=self.skip_bad,
        )
        print(f"{self.out}: {report}")
        return 0


@dataclass(frozen=True)
class Synth:
    """Generate scenes of coloured, textured shapes with captions: deterministic by seed, nothing to download."""

    out: Path
    """Folder to create."""
    split: str = "train"
    """train; val: other scenes; test: combinations of attributes that training never shows."""
    count: int = 20_000
    """Scenes."""
    size: int = 64
    """Side of the images, in pixels."""
    seed: int = 0
    """Seed of the world."""
    captions: int = 5
    """Captions a scene."""
    shard_size: int = 1000
    """Samples a shard."""

    def run(self) -> int:
        """Generate and print what was written."""
        from mmd2v.data.generate import generate

        report = generate(
            self.out,
            split=self.split,
            count=self.count,
            size=self.size,
            seed=self.seed,
            captions_per_image=self.captions,
            shard_size=self.shard_size,
        )
        print(f"{self.out}: {report}")
        return 0


@dataclass(frozen=True)
class Check:
    """Read and decode everything in some shards; exit status 1 when something is wrong."""

    shards: Annotated[Positional[tuple[str, ...]], arg(metavar="SHARDS ...", help=_SHARDS_HELP)]
    show: int = 20
    """Problems to print."""

    def run(self) -> int:
        """Check and print counts and problems."""
        from mmd2v.data.check import check_shards

        report = check_shards(self.shards)
        for problem in report.problems[: self.show]:
            print(problem)
        if len(report.problems) > self.show:
            print(f"… and {len(report.problems) - self.show:,} more")
        print(report)
        return 1 if report.problems else 0


@dataclass(frozen=True)
class Tokenizer:
    """Learn a vocabulary from the captions of some shards and write a Hugging Face tokenizer.json."""

    shards: Annotated[Positional[tuple[str, ...]], arg(metavar="SHARDS ...", help=_SHARDS_HELP)]
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
        shards = ShardSet(self.shards)
        captions = (text for texts in track(shards.captions(), "reading", len(shards), unit="images") for text in texts)
        tokenizer = train_tokenizer(captions, self.kind, self.vocab_size)
        write_text(self.out, tokenizer.to_str(pretty=True))
        print(f"{self.out}: {tokenizer.get_vocab_size():,} entries")
        return 0


@dataclass(frozen=True)
class Bench:
    """Measure how fast some shards load on this machine, stage by stage, and what limits."""

    shards: Annotated[Positional[tuple[str, ...]], arg(metavar="SHARDS ...", help=_SHARDS_HELP)]
    size: int = 224
    """Side of the training image, in pixels."""
    batch: int = 64
    """Images of a batch."""
    workers: int = 1
    """Loader processes; 0 loads in this one."""
    seconds: float = 10.0
    """How long to measure, in seconds."""
    tokenizer: Annotated[Path | None, arg(metavar="PATH")] = None
    """File or folder of a tokenizer; without one the text is left out."""

    def run(self) -> int:
        """Measure and print a table."""
        from mmd2v.data.bench import bench

        report = bench(
            self.shards,
            size=self.size,
            batch=self.batch,
            workers=self.workers,
            seconds=self.seconds,
            tokenizer=self.tokenizer,
        )
        print(report)
        return 0


_Commands = (
    Annotated[Pack, tyro.conf.subcommand("pack")]
    | Annotated[Synth, tyro.conf.subcommand("synth")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Tokenizer, tyro.conf.subcommand("tokenizer")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


def main(argv: Sequence[str]) -> int:
    """Run ``mmd2v data ARGV`` and return the exit status."""
    command = tyro.cli(_Commands, args=list(argv), prog="mmd2v data", description=sys.modules[__name__].__doc__)
    return command.run()
