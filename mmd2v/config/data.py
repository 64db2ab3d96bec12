"""The config's `data` section: where samples come from and what is done to them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mmd2v.config.section import LONGEST_WAIT, Fraction, NonNegativeInt, Positive, PositiveInt, Section, Triple


class TokenizerConfig(Section):
    """How a caption becomes token ids."""

    kind: Literal["hf", "sentencepiece", "fairseq_gpt2"] = Field(
        "hf",
        description="hf: a `tokenizer.json`; sentencepiece: a `.model`; fairseq_gpt2: a folder with dict.txt, "
        "encoder.json and vocab.bpe",
    )
    path: str = Field(description="file or folder of the tokenizer")
    max_length: PositiveInt = Field(64, description="longest sequence, in tokens, special tokens included")
    append_end: bool = Field(True, description="keep the end-of-sequence token after the text")


class ImageTransformConfig(Section):
    """What happens to an image between its file and the student."""

    size: PositiveInt = Field(224, description="side of the square the student sees, in pixels")
    crop_scale: tuple[Fraction, Fraction] = Field(
        (0.6, 1.0),
        description="least and greatest area of the random training crop as a fraction of the image; (1, 1) keeps it "
        "whole",
    )
    crop_ratio: tuple[Positive, Positive] = Field(
        (0.75, 4 / 3), description="least and greatest width / height of the random crop"
    )
    flip: Fraction = Field(0.5, description="probability of a horizontal flip in training")
    interpolation: Literal["bicubic", "bilinear"] = Field("bicubic", description="resize filter, antialiased")
    eval_resize: Literal["center_crop", "squash"] = Field(
        "center_crop", description="outside training: shortest side to `size` and centre crop, or squash to a square"
    )
    mean: Triple = Field((0.485, 0.456, 0.406), description="channel means the student subtracts, RGB in [0, 1]")
    std: Triple = Field((0.229, 0.224, 0.225), description="channel deviations the student divides by, RGB in [0, 1]")

    @model_validator(mode="after")
    def _ordered(self) -> ImageTransformConfig:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}: found ({low:g}, {high:g}); expected 0 < least <= greatest")
        return self


_SHARDS_DESCRIPTION = (
    "a folder of .tar files; a path with {000..007} braces or wildcards; an address (https://, s3://, gs://, any of "
    "fsspec's) of a folder or shards; pipe:COMMAND; a .txt list of these or a shards.json; or a list"
)


class ShardsConfig(Section):
    """A data set packed as WebDataset shards."""

    shards: str | list[str] = Field(description=_SHARDS_DESCRIPTION)
    limit: PositiveInt | None = Field(None, description="use only the first N images of the set")


class MixedSetConfig(ShardsConfig):
    """One data set of a mixture."""

    weight: Positive = Field(1.0, description="its share of the samples under `mix: weighted`, relative to the others")


class TrainSetConfig(Section):
    """What is trained on: one data set (`shards`), or several (`sets`)."""

    shards: str | list[str] | None = Field(None, description=_SHARDS_DESCRIPTION)
    limit: PositiveInt | None = Field(None, description="use only the first N images of `shards`")
    sets: dict[str, MixedSetConfig] = Field(default_factory=dict, description="name → data set, instead of `shards`")
    mix: Literal["weighted", "round_robin"] = Field(
        "weighted",
        description="of several sets: `weighted` draws every sample by the sets' weights; `round_robin` takes one "
        "whole batch of each set in turn",
    )

    @model_validator(mode="after")
    def _one_way(self) -> TrainSetConfig:
        if (self.shards is None) == (not self.sets):
            raise ValueError("give exactly one of `shards` (one data set) and `sets` (several)")
        if self.sets and self.limit is not None:
            raise ValueError("limit: belongs to `shards`; under `sets` every set has its own")
        return self

    @property
    def named_sets(self) -> dict[str, ShardsConfig]:
        """Name → data set; one that stands alone has no name."""
        if self.shards is not None:
            return {"": ShardsConfig(shards=self.shards, limit=self.limit)}
        return dict(self.sets)


class DamageConfig(Section):
    """What is done about damaged samples in training; evaluation always stops at the first."""

    limit: Fraction = Field(
        1e-3,
        description="largest share of the data set's samples that may be damaged before the run stops: they keep their "
        "slots with weight 0 and are reported; 0 stops at the first",
    )
    max_pixels: PositiveInt = Field(
        100_000_000, description="images of more pixels count as damaged (decompression bombs)"
    )
    max_caption_length: PositiveInt = Field(100_000, description="captions of more characters count as damaged")


class SourceConfig(Section):
    """How shards that are not local files come to this node: addresses of any fsspec file system, and ``pipe:``."""

    access: Literal["cache", "range"] = Field(
        "cache",
        description="cache: a shard is brought whole into a folder all processes of the node share; range: samples "
        "are read from where they are, which needs the index `mmd2v data pack` writes beside a shard",
    )
    cache_dir: str | None = Field(
        None,
        description="folder of the cache, on a local disk; none: $MMD2V_CACHE, else one in the temporary folder. A "
        "shard is kept by its address without query and its SHA-256 or size in shards.json, else by what its server "
        "tells (ETag, checksum, time of change); where nothing tells, and of a pipe:, by its whole address: then "
        "delete the folder when shards were replaced",
    )
    cache_gb: Positive = Field(50.0, description="most the cache may hold, in GB (10⁹ bytes) a node")
    retries: NonNegativeInt = Field(5, description="further attempts at what failed")
    retry_delay: Positive = Field(
        1.0, description="pause before the first retry, in seconds; doubled each time up to a minute, ±50 % by chance"
    )
    timeout: Positive = Field(60.0, description="seconds without a byte after which an attempt is given up")
    prefetch: NonNegativeInt = Field(
        4, description="shards each loader process fetches ahead at the same time; 0: only what is needed at once"
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the fsspec file system, such as {anon: true} for S3"
    )


class ArrayConfig(Section):
    """Floats of a fixed shape that lie beside a sample's image and captions: what a further modality sees."""

    key: str = Field(
        "npy", description="extension of the member that holds it in NumPy's format: `npy` or NAME.npy, lower case"
    )
    shape: tuple[PositiveInt, ...] = Field(
        min_length=1, description="its shape, the same for all samples, such as [patches, values of a patch]"
    )

    @field_validator("key")
    @classmethod
    def _is_array(cls, key: str) -> str:
        if key != key.lower() or "/" in key or not (key == "npy" or (key.endswith(".npy") and not key.startswith("."))):
            raise ValueError(f"found '{key}'; expected npy or NAME.npy, in lower case")
        return key


class DataConfig(Section):
    """Where samples come from and how a batch is made of them."""

    train: TrainSetConfig = Field(description="training set, or a mixture of several")
    eval: ShardsConfig | None = Field(None, description="held-out set for recall; none: no recall in training")
    source: SourceConfig = Field(
        default_factory=SourceConfig, description="how shards that are not local files are fetched"
    )
    image: ImageTransformConfig = Field(
        default_factory=ImageTransformConfig, description="what happens to an image before the student sees it"
    )
    tokenizer: TokenizerConfig | None = Field(None, description="needed whenever a text modality is trained")
    arrays: dict[str, ArrayConfig] = Field(
        default_factory=dict,
        description="name → array of every sample, for encoders whose `input` is that name; others are not read",
    )
    captions_per_image: PositiveInt = Field(
        1,
        description="captions drawn an image (without images: a text sample) and epoch, without repetition as long as "
        "there are enough",
    )
    batch_tokens: PositiveInt | None = Field(
        None,
        description="tokens of a step over all ranks, in place of engine.batch_size, for runs without images: texts of "
        "like length come together, a step never has more tokens, every text (each caption is a sample of its own) "
        "comes once an epoch. Needs the token lengths that `mmd2v data lengths` writes; at least 8 × the longest text",
    )
    micro_batch_tokens: PositiveInt | None = Field(
        None,
        description="under batch_tokens: tokens of a rank and forward pass, exceeded by one text at most; none: "
        "batch_tokens / ranks (no accumulation)",
    )
    lengths_dir: str | None = Field(
        None,
        description="under batch_tokens: folder of the files of token lengths; none: beside the shards or, where these "
        "cannot be written, in the cache folder of the node",
    )
    labels: str | None = Field(
        None,
        description="key in a sample's JSON that holds its label: a vector of floats for the `attributes` objective, "
        "the number of the class for `classification`",
    )
    shuffle_shards: PositiveInt = Field(16, description="shards whose samples are shuffled together")
    lanes: PositiveInt = Field(
        1,
        description="parts of an epoch that are read side by side; with one (or a few) a node, a node reads only its "
        "own shards. Part of the order: keep it when the number of ranks changes. Must divide engine.batch_size",
    )
    last_batch: Literal["wrap", "drop"] = Field(
        "wrap",
        description="samples that fill no whole batch at the end of an epoch: `wrap` fills it from the next epoch, "
        "`drop` leaves them out (others every epoch)",
    )
    damage: DamageConfig = Field(default_factory=DamageConfig, description="what is done about damaged samples")
    trace: str | None = Field(
        None, description="file that receives the sample ids every rank consumed, as FILE.rank0.jsonl and so on"
    )
    stall_warning: Positive = Field(
        60.0, description="seconds without a batch after which the worker and shard waited for are named"
    )
    stall_timeout: Positive | None = Field(
        1800.0,
        le=LONGEST_WAIT,
        description="seconds without a batch after which the run ends with that name; none: it never does",
    )
    decode: Literal["loader", "device"] = Field(
        "loader",
        description="who decodes and crops training images: the loader's processes, or the device (nvJPEG; what is no "
        "plain JPEG stays with the loader; pixels may differ by a level or two)",
    )
    workers: NonNegativeInt = Field(1, description="loader processes a rank; 0 loads in the training process")
    prefetch: PositiveInt = Field(4, description="finished batches each worker keeps ready")

    @field_validator("arrays")
    @classmethod
    def _named(cls, arrays: dict[str, ArrayConfig]) -> dict[str, ArrayConfig]:
        for name in ("image", "text"):
            if name in arrays:
                raise ValueError(f"'{name}' is an input of its own; give the array another name")
        return arrays

    @model_validator(mode="after")
    def _droppable(self) -> DataConfig:
        if self.last_batch == "drop" and self.train.sets and self.train.mix == "weighted":
            raise ValueError("last_batch: 'drop' needs batches of one data set; use 'wrap' under `mix: weighted`")
        if self.lanes > 1 and self.train.sets and self.train.mix == "weighted":
            raise ValueError(
                f"lanes: {self.lanes} lanes need batches of one data set; use 1 under `mix: weighted`, or `round_robin`"
            )
        return self

    @model_validator(mode="after")
    def _token_batches(self) -> DataConfig:
        if self.batch_tokens is None:
            for name in ("micro_batch_tokens", "lengths_dir"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: found {getattr(self, name)}, which needs batch_tokens; remove it")
            return self
        if self.train.sets:
            raise ValueError(
                "batch_tokens: found a mixture (train.sets), expected one data set; train.shards also takes a list of "
                "folders"
            )
        for name, only in (("lanes", 1), ("last_batch", "wrap"), ("captions_per_image", 1)):
            if getattr(self, name) != only:
                raise ValueError(
                    f"batch_tokens: found {name}: {getattr(self, name)}, expected {only}; token batches give every "
                    "text once an epoch and no step is left incomplete"
                )
        if self.micro_batch_tokens is not None and self.micro_batch_tokens > self.batch_tokens:
            raise ValueError(
                f"micro_batch_tokens: found {self.micro_batch_tokens}, expected at most batch_tokens "
                f"{self.batch_tokens}"
            )
        return self
