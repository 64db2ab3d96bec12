"""`mmd2v data`: pack, generate and check shards, build a tokenizer, measure how fast they load."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from mmd2v.config.load import load_config
from mmd2v.config.overrides import split_overrides
from mmd2v.config.schema import SourceConfig
from mmd2v.data.addresses import display
from mmd2v.data.sources import FORMATS, Format
from mmd2v.data.tokenizers import VocabularyKind
from mmd2v.errors import UserError

TokenizerKind = Literal["hf", "sentencepiece", "fairseq_gpt2"]
_SHARDS_HELP = (
    "A folder of .tar files; a path with {000..007} braces or wildcards; an address (https://, s3://, any of fsspec's) "
    "of a folder or shards; pipe:COMMAND; a .txt list of these or a shards.json; one or more."
)

_LOCAL_HELP = "A folder of .tar files; a path with {000..007} braces or wildcards; a .txt list of these; one or more."

_FORMAT_HELP = "; ".join(
    ["Format of SOURCE; auto looks at it", *(f"{name}: {kind.summary}" for name, kind in FORMATS.items())]
)


@dataclass(frozen=True, kw_only=True)
class _Sourced:
    """What every command has that reads shards from wherever they are."""

    config: Annotated[Path | None, arg(metavar="CONFIG.yaml")] = None
    """Config of a run whose data.source says how addresses are fetched (cache, access, storage options)."""

    @property
    def source(self) -> SourceConfig | None:
        """How shards that are no local files are fetched; None: the defaults. Raises UserError: no such config."""
        return None if self.config is None else load_config(self.config).data.source


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
    max_pixels: Annotated[int | None, arg(metavar="N")] = None
    """Images of more pixels count as damaged (decompression bombs); by default training's limit, 100 million."""
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
            max_pixels=self.max_pixels,
            skip_bad=self.skip_bad,
        )
        print(f"{self.out}: {report}")
        return 0


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
        from mmd2v.errors import UserError

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

    shards: Annotated[Positional[tuple[str, ...]], arg(metavar="SHARDS ...", help=_LOCAL_HELP)]
    show: int = 20
    """Problems to print."""

    def run(self) -> int:
        """Check and print counts and problems."""
        from mmd2v.data.check import check_shards

        report = check_shards(self.shards)
        for problem in report.problems[: self.show]:
            print(problem)
        if report.problem_count > (shown := len(report.problems[: self.show])):
            print(f"… and {report.problem_count - shown:,} more")
        print(report)
        return 1 if report.problem_count else 0


@dataclass(frozen=True)
class Stats(_Sourced):
    """Count images, captions, sizes and lengths; images are not decoded. Damage is counted, not an error."""

    shards: Annotated[Positional[tuple[str, ...]], arg(metavar="SHARDS ...", help=_SHARDS_HELP)]
    tokenizer: Annotated[Path | None, arg(metavar="PATH")] = None
    """Count tokens too: file or folder of the tokenizer, as in data.tokenizer.path."""
    kind: TokenizerKind = "hf"
    """As in data.tokenizer.kind."""
    max_length: int = 64
    """Longest sequence, in tokens, special tokens included: how many captions would it cut?"""
    picture: Annotated[Path | None, arg(metavar="FILE.png|.svg")] = None
    """Draw histograms into this file."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write all numbers into this file."""

    def run(self) -> int:
        """Count, print the numbers, and write what was asked for."""
        from mmd2v.config.schema import TokenizerConfig
        from mmd2v.data.stats import data_stats
        from mmd2v.files import check_output, write_json
        from mmd2v.report.stats_picture import check_stats_picture, write_stats_picture

        if self.max_length < 1:
            raise UserError(f"--max-length: found {self.max_length}, expected at least 1")
        if self.picture is not None:
            check_stats_picture("--picture", self.picture)
        if self.json is not None:
            check_output("--json", self.json)
        settings = None
        if self.tokenizer is not None:
            settings = TokenizerConfig(kind=self.kind, path=str(self.tokenizer), max_length=self.max_length)
        stats = data_stats(self.shards, settings, source=self.source)
        print(stats)
        if self.json is not None:
            write_json(self.json, stats.to_json())
        if self.picture is not None:
            write_stats_picture(self.picture, stats, _title(self.shards))
        return 0


@dataclass(frozen=True)
class Show(_Sourced):
    """Draw a contact sheet: some images, or texts, with their first captions. The same seed draws the same ones."""

    shards: Annotated[Positional[tuple[str, ...]], arg(metavar="SHARDS ...", help=_SHARDS_HELP)]
    out: Annotated[Path, arg(metavar="FILE.png")]
    """Picture to write."""
    count: int = 24
    """Samples to show."""
    seed: int = 0
    """Which samples are drawn."""

    def run(self) -> int:
        """Draw and say how many of how many."""
        from mmd2v.data.shards import ShardSet
        from mmd2v.report.contact_sheet import draw_samples, write_sheet
        from mmd2v.report.retrieval_picture import check_picture

        if self.count < 1:
            raise UserError(f"--count: found {self.count}, expected at least 1")
        check_picture("--out", self.out)
        shards = ShardSet(self.shards, source=self.source, tolerant=True)
        cells = draw_samples(shards, self.count, self.seed)
        shown = f"{len(cells):,} of {len(shards):,} samples"
        write_sheet(self.out, cells, f"{_title(self.shards)}: {shown}")
        print(f"{self.out}: {shown}")
        return 0


def _title(shards: Sequence[str]) -> str:
    """What a picture calls some shards: where they are, short."""
    first = "/".join(Path(display(shards[0])).parts[-2:])
    return first if len(shards) == 1 else f"{first} and {len(shards) - 1} more"


@dataclass(frozen=True)
class Tokenizer(_Sourced):
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
        shards = ShardSet(self.shards, source=self.source)
        captions = (text for texts in track(shards.captions(), "reading", len(shards), unit="images") for text in texts)
        tokenizer = train_tokenizer(captions, self.kind, self.vocab_size)
        write_text(self.out, tokenizer.to_str(pretty=True))
        print(f"{self.out}: {tokenizer.get_vocab_size():,} entries")
        return 0


@dataclass(frozen=True)
class Lengths(_Sourced):
    """Count the tokens of every text, which training in batches of tokens (data.batch_tokens) needs; resumable.

    Writes a small file a shard, NAME.tar.FINGERPRINT.lengths, that belongs to this tokenizer. Counts are without
    special tokens and before truncation, so that they serve every max_length.
    """

    shards: Annotated[Positional[tuple[str, ...]], arg(metavar="SHARDS ...", help=_SHARDS_HELP)]
    tokenizer: Annotated[Path, arg(metavar="PATH")]
    """File or folder of the tokenizer, as in data.tokenizer.path."""
    kind: TokenizerKind = "hf"
    """As in data.tokenizer.kind."""
    max_length: int = 64
    """Only to say how many texts it cuts, special tokens included."""
    out: Annotated[str | None, arg(metavar="DIR")] = None
    """Folder of the files, which the config then names as data.lengths_dir; by default beside the shards or, where
    these cannot be written, in the cache folder of this machine."""
    workers: int | None = None
    """Processes; by default one for each core."""

    def run(self) -> int:
        """Count and print totals."""
        from mmd2v.config.schema import TokenizerConfig
        from mmd2v.data.token_lengths import write_lengths

        if self.max_length < 1:
            raise UserError(f"--max-length: found {self.max_length}, expected at least 1")
        settings = TokenizerConfig(
            kind=self.kind, path=str(self.tokenizer), max_length=self.max_length, append_end=False
        )
        print(write_lengths(self.shards, settings, out=self.out, workers=self.workers, source=self.source))
        return 0


@dataclass(frozen=True)
class Annotate:
    """Run the frozen teachers of a run over its training shards once and store their outputs, so that training replays
    them (teachers.NAME.outputs: OUT) instead of loading and running the teachers; the losses are the same.

    One file a shard and epoch, of every crop, flip and choice of captions that the run will draw; a single one for all
    epochs where nothing is drawn: for images crop_scale (1, 1) and flip 0 or 1, for text captions_per_image equal to
    (or a multiple of) the captions of each image. A run with other teachers, images, captions or seed runs its
    teachers itself and says what differs.

    Interrupted (Ctrl-C, kill), the same command goes on behind the last finished file. Runs alone, or under a launcher:
    deepspeed --num_accelerators 2 --module mmd2v data annotate CONFIG.yaml --out OUT. Any key of the config can be set
    as in `mmd2v train`: --data.workers 4. A rank holds the outputs of one shard in memory.
    """

    config: Annotated[Positional[str], arg(metavar="CONFIG.yaml")]
    """YAML file that describes the run."""
    out: Path
    """Folder to write to; the outputs of a teacher go to OUT/NAME."""
    epochs: Annotated[int | None, arg(metavar="N")] = None
    """Epochs to store; by default what the run reads: of an epoch that it does not finish, the shards it gets to."""
    teacher: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Teachers to run; by default all of the config."""
    tokens: tyro.conf.FlagCreatePairsOff[bool] = False
    """Store the tokens too, not the CLS alone; of teachers of images."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of the stored numbers; fp32 keeps them exactly, the others halve the files."""
    batch_size: Annotated[int | None, arg(metavar="N")] = None
    """Samples of a rank's forward pass; by default the run's micro-batch on as many ranks. Arithmetic rounds by it:
    with the training's micro-batch (and as many threads) the losses are the same to the last bit, else to rounding."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        """Store the outputs and print what was written."""
        from mmd2v.distributed.environment import shutdown
        from mmd2v.errors import told_once_a_node

        try:
            config = load_config(self.config, self.overrides)
        except UserError as error:
            raise told_once_a_node(error) from None
        from mmd2v.train.annotate import Options, annotate

        options = Options(self.out, self.epochs, self.teacher, self.tokens, self.dtype, self.batch_size)
        if summary := annotate(config, options):
            print(summary)
        shutdown()
        return 0


_ANNOTATE_FLAGS = {
    "--out": True,
    "--epochs": True,
    "--teacher": True,
    "--tokens": False,
    "--dtype": True,
    "--batch-size": True,
    "--help": False,
}
"""Flags of `mmd2v data annotate` itself → whether a value follows; every other one overrides a key of the config."""


@dataclass(frozen=True)
class Bench(_Sourced):
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
            source=self.source,
        )
        print(report)
        return 0


_Commands = (
    Annotated[Pack, tyro.conf.subcommand("pack")]
    | Annotated[Labelled, tyro.conf.subcommand("labelled")]
    | Annotated[Synth, tyro.conf.subcommand("synth")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Stats, tyro.conf.subcommand("stats")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Tokenizer, tyro.conf.subcommand("tokenizer")]
    | Annotated[Lengths, tyro.conf.subcommand("lengths")]
    | Annotated[Annotate, tyro.conf.subcommand("annotate")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


def main(argv: Sequence[str]) -> int:
    """Run ``mmd2v data ARGV`` and return the exit status."""
    own, overrides = split_overrides(argv, _ANNOTATE_FLAGS) if argv[:1] == ["annotate"] else (list(argv), [])
    command = tyro.cli(_Commands, args=own, prog="mmd2v data", description=sys.modules[__name__].__doc__)
    if overrides:
        command = replace(command, overrides=tuple(overrides))
    return command.run()
