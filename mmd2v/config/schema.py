"""The one description of a run. Every key a YAML file may hold is a field here; anything else is an error."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal["fp32", "bf16", "bf16_autocast", "fp16"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Of what is dropped: all of it would leave nothing to learn from."""
Positive = Annotated[float, Field(gt=0.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Triple = tuple[float, float, float]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


# --------------------------------------------------------------------------------------------- data


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
        None, description="key in a sample's JSON that holds a vector of floats, for the `attributes` objective"
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
        description="seconds without a batch after which the run stops with that name (not with workers: 0); none: no",
    )
    decode: Literal["loader", "device"] = Field(
        "loader",
        description="who decodes and crops training images: the loader's processes, or the device (nvJPEG; what is no "
        "plain JPEG stays with the loader; pixels may differ by a level or two)",
    )
    workers: NonNegativeInt = Field(1, description="loader processes a rank; 0 loads in the training process")
    prefetch: PositiveInt = Field(4, description="finished batches each worker keeps ready")

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


# -------------------------------------------------------------------------------------------- model


class EncoderConfig(Section):
    """Fields every modality encoder shares. Its output tokens are bridged linearly to the model's width if need be."""

    frozen: bool = Field(
        False,
        description="keep the encoder's own weights fixed, a backbone also in eval mode; what is added to a backbone "
        "(bridge, CLS, positions, norm) stays trainable",
    )
    cls: bool = Field(True, description="put a learned CLS token in front (text encoders use the tokenizer's own)")
    positions: Literal["learned", "sincos", "none"] = Field(
        "learned", description="position embedding added after the bridge (not for the CLS under sincos)"
    )
    norm: bool = Field(False, description="LayerNorm on the encoder's tokens before they enter the layers")
    dropout: Rate = Field(0.0, description="dropout probability on the tokens that enter the layers")
    token_drop: Rate = Field(
        0.0, description="fraction of an image's tokens left out at random in training (never the CLS); images only"
    )


class PatchEncoderConfig(EncoderConfig):
    """Image → non-overlapping patches through one strided convolution (ViT)."""

    kind: Literal["patch"] = Field("patch", description="patches of the pixels, trained from scratch")
    input: Literal["image"] = Field("image", description="the part of a sample it sees")
    patch_size: PositiveInt = Field(16, description="side of a patch, in pixels")


class TimmEncoderConfig(EncoderConfig):
    """Image → a feature map of a timm backbone, one token a position."""

    kind: Literal["timm"] = Field("timm", description="a timm backbone")
    input: Literal["image"] = Field("image", description="the part of a sample it sees")
    name: str = Field(description="timm model name")
    weights: str | None = Field(
        None, description="safetensors file, or a folder written by `mmd2v export` whose image encoder is this backbone"
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of timm.create_model")
    feature: int = Field(-1, description="which of the backbone's feature maps becomes the tokens; -1 is the last")
    feature_norm: bool = Field(False, description="LayerNorm on the backbone's features before the bridge")
    mean: Triple | None = Field(None, description="channel means of this backbone; none: data.image.mean")
    std: Triple | None = Field(None, description="channel deviations of this backbone; none: data.image.std")


class TokenEncoderConfig(EncoderConfig):
    """Token ids → an embedding table trained from scratch."""

    kind: Literal["tokens"] = Field("tokens", description="an embedding table trained from scratch")
    input: Literal["text"] = Field("text", description="the part of a sample it sees")


class HFTextEncoderConfig(EncoderConfig):
    """Token ids → the embedding module (words, positions, norm) of a Hugging Face encoder."""

    kind: Literal["hf"] = Field("hf", description="the embeddings of a Hugging Face encoder")
    input: Literal["text"] = Field("text", description="the part of a sample it sees")
    name: str = Field(description="folder or hub name of the encoder")
    positions: Literal["none"] = Field("none", description="the embedding module brings its own")


AnyEncoder = Annotated[
    PatchEncoderConfig | TimmEncoderConfig | TokenEncoderConfig | HFTextEncoderConfig, Field(discriminator="kind")
]


class InitConfig(Section):
    """Pretrained blocks a group of layers starts from."""

    source: str = Field(description="where the blocks come from: `hf:FOLDER-or-name`, `mmd2v:EXPORT-FOLDER`")
    first: NonNegativeInt = Field(0, description="index of the source block that the group's first layer takes")
    modality: str | None = Field(None, description="which modality's blocks of an mmd2v export; none: the same one")


class LayerConfig(Section):
    """A group of equal layers. Attention and MLP (each with its norm) are owned a modality or shared."""

    kind: Literal["separate", "mome", "shared"] | None = Field(
        None, description="shorthand: separate = both owned a modality, mome = shared attention, shared = both shared"
    )
    attention: Literal["separate", "shared"] | None = Field(None, description="who owns attention, if not by `kind`")
    mlp: Literal["separate", "shared"] | None = Field(None, description="who owns the MLP, if not by `kind`")
    count: PositiveInt = Field(1, description="number of such layers in a row")
    modalities: list[str] | None = Field(None, description="modalities that pass through; others skip; none: all")
    norm: Literal["pre", "post"] = Field("pre", description="where the LayerNorms stand")
    eps: float = Field(1e-6, gt=0, description="epsilon of the LayerNorms")
    heads: PositiveInt | None = Field(None, description="attention heads; none: model.heads")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP as a multiple of the width")
    layer_scale: float | None = Field(None, description="initial value of the residual branches' learned scale")
    drop_path: Rate = Field(0.0, description="probability that a sequence skips a residual branch in training")
    dropout: Rate = Field(0.0, description="dropout probability on each branch's output in training")
    init: dict[str, InitConfig] = Field(
        default_factory=dict, description="modality → pretrained blocks; `shared` names the shared parts"
    )

    @model_validator(mode="after")
    def _ownership(self) -> LayerConfig:
        if self.kind is None and (self.attention is None or self.mlp is None):
            raise ValueError("give `kind` (separate, mome, shared) or both `attention` and `mlp` (separate, shared)")
        if self.kind is not None and (self.attention is not None or self.mlp is not None):
            raise ValueError("give either `kind` or `attention` and `mlp`, not both")
        return self

    @property
    def attention_owner(self) -> str:
        """``"separate"`` or ``"shared"``."""
        return self.attention or ("separate" if self.kind == "separate" else "shared")

    @property
    def mlp_owner(self) -> str:
        """``"separate"`` or ``"shared"``."""
        return self.mlp or ("shared" if self.kind == "shared" else "separate")


class ProjectionConfig(Section):
    """What turns a pooled sequence into the embedding that is compared by cosine."""

    kind: Literal["none", "linear", "mlp"] = Field("linear", description="none: the pooled vector itself")
    dim: PositiveInt | None = Field(None, description="width of the embedding; none: the model's width")
    shared: bool = Field(False, description="one projection for all modalities")
    dropout: Rate = Field(0.0, description="dropout probability before the last linear map")


class ModelConfig(Section):
    """The student."""

    width: PositiveInt = Field(768, description="width of a token, D")
    heads: PositiveInt = Field(12, description="attention heads a layer")
    encoders: dict[str, AnyEncoder] = Field(description="modality name → its encoder")
    layers: list[LayerConfig] = Field(default_factory=list, description="groups of layers, first to last")
    final_norm: bool = Field(True, description="LayerNorm after the last layer")
    pooling: dict[str, Literal["cls", "mean"]] = Field(
        default_factory=dict, description="modality → cls or mean over its real tokens; default cls"
    )
    projection: ProjectionConfig = Field(
        default_factory=ProjectionConfig, description="from the pooled sequence to the embedding"
    )
    init_deviation: float = Field(
        0.02, gt=0, description="standard deviation of new weights (BERT's 0.02 suits D = 768; narrow models want more)"
    )
    freeze: list[str] = Field(
        default_factory=list, description="parameters kept fixed: wildcards over names, such as `layers.0.*`"
    )

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        for i, layer in enumerate(self.layers):
            heads = layer.heads or self.heads
            if self.width % heads:
                raise ValueError(f"layers.{i}: width {self.width} is not divisible by {heads} heads")
        return self


# ------------------------------------------------------------------------------ teachers, objectives


class TeacherConfig(Section):
    """A frozen model whose outputs the student learns to produce."""

    name: str = Field(description="`timm:NAME[@WEIGHTS]`, `hf:NAME-or-folder` or `mmd2v:EXPORT-FOLDER`")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of timm.create_model")
    modality: Literal["image", "text"] = Field("image", description="which part of a sample it sees")
    image_size: PositiveInt | None = Field(None, description="side of its input, in pixels; none: its published one")
    mean: Triple | None = Field(None, description="channel means it subtracts; none: its published ones")
    std: Triple | None = Field(None, description="channel deviations it divides by; none: its published ones")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="arithmetic of its forward pass; auto: half precision where the device has it, else fp32"
    )
    pooling: Literal["cls", "mean"] = Field(
        "cls", description="of a Hugging Face teacher: its first token or the mean over its real tokens"
    )
    outputs: str | None = Field(
        None,
        description="folder that `mmd2v data annotate` wrote: training replays what it holds and does not load the "
        "model, if that is what it would give in the whole run (else it runs, and a line says why)",
    )


class ObjectiveConfig(Section):
    """Fields every term of the loss shares."""

    weight: float = Field(1.0, description="factor of this term in the sum")


class CLSRegressionConfig(ObjectiveConfig):
    """Regress the teacher's CLS from each modality's pooled output (the source's multimodal loss)."""

    kind: Literal["cls_regression"] = Field("cls_regression", description="regression of a teacher's CLS")
    teacher: str = Field(
        description="key in `teachers`, or `encoder:MODALITY`: the pooled feature of the student's own frozen timm "
        "encoder, which then serves as teacher without a second forward pass"
    )
    normalize: Literal["none", "layer_norm", "l2"] = Field(
        "none", description="parameter-free normalisation of the target over its channels"
    )
    modalities: list[str] = Field(default_factory=list, description="who is regressed; none named: every modality")
    head: Literal["none", "linear", "norm_linear", "mlp"] = Field(
        "norm_linear", description="map from the student's width to the teacher's; none needs equal widths"
    )
    shared_head: bool = Field(True, description="one head for all modalities")
    loss: Literal["mse", "smooth_l1", "cosine"] = Field("mse", description="distance to the target")


class ContrastiveConfig(ObjectiveConfig):
    """Symmetric InfoNCE between two modalities, negatives from all ranks with gradient."""

    kind: Literal["contrastive"] = Field("contrastive", description="InfoNCE between two modalities")
    temperature: float = Field(0.07, ge=0.01, le=1, description="initial softmax temperature")
    learned: bool = Field(True, description="learn the temperature, its inverse clamped to [1, 100]")
    label_smoothing: Fraction = Field(0.0, description="probability mass spread evenly over the negatives")


class AttributesConfig(ObjectiveConfig):
    """Multi-label classification of a sample's known attributes (binary cross-entropy)."""

    kind: Literal["attributes"] = Field("attributes", description="classification of known attributes")
    modality: str = Field("image", description="whose pooled output is classified")
    classes: PositiveInt = Field(description="length of the label vector named by data.labels")
    prior: float = Field(0.5, gt=0, lt=1, description="probability every attribute starts with")


AnyObjective = Annotated[CLSRegressionConfig | ContrastiveConfig | AttributesConfig, Field(discriminator="kind")]


# ------------------------------------------------------------------------------------------- engine


class ParameterGroupConfig(Section):
    """Parameters that are trained differently."""

    match: str = Field(description="wildcard over parameter names, such as `layers.*.text.*`")
    lr_multiplier: float = Field(1.0, ge=0, description="factor on the learning rate")
    weight_decay: float | None = Field(None, ge=0, description="own weight decay; none: the optimiser's")


class OptimizerConfig(Section):
    """Optimiser and learning-rate schedule."""

    name: Literal["auto", "adamw", "deepspeed_adam", "apex_adam"] = Field(
        "auto", description="adamw: torch; deepspeed_adam: FusedAdam on CUDA, CPUAdam on CPU; apex_adam: NVIDIA apex"
    )
    lr: float = Field(5e-4, gt=0, description="peak learning rate")
    betas: tuple[Rate, Rate] = Field((0.9, 0.98), description="decay of Adam's two averages")
    eps: float = Field(1e-6, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    decay_all: bool = Field(
        False, description="decay 1-D parameters, CLS, positions and embeddings too (the source does)"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape after the warm-up")
    warmup: float = Field(0.1, ge=0, description="warm-up: a fraction of all steps if < 1, else a number of steps")
    min_lr_ratio: Fraction = Field(0.0, description="final learning rate as a fraction of the peak")
    clip_norm: float | None = Field(None, gt=0, description="largest global gradient norm; none: no clipping")
    groups: list[ParameterGroupConfig] = Field(
        default_factory=list, description="parameters with settings of their own; the first match wins"
    )


class EngineConfig(Section):
    """How a step is computed on the ranks."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA when there is one")
    batch_size: PositiveInt | None = Field(
        256, description="images (without images: samples) a step over all ranks; none under data.batch_tokens"
    )
    micro_batch_size: PositiveInt | None = Field(
        None, description="images a rank and forward pass; none: batch_size / ranks (no accumulation)"
    )
    precision: Precision = Field(
        "bf16_autocast", description="bf16_autocast: fp32 weights, bf16 products; bf16 / fp16: DeepSpeed's own modes"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="what DeepSpeed shards: 1 optimiser, 2 gradients, 3 weights")
    zero3_persistence_threshold: NonNegativeInt = Field(
        100_000, description="ZeRO-3 keeps parameters of fewer elements whole on every rank"
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="further DeepSpeed options, merged over the generated dictionary"
    )


class CheckpointConfig(Section):
    """What is kept of a run."""

    every: PositiveInt | None = Field(None, description="steps between checkpoints; none: only at the end")
    keep: PositiveInt = Field(2, description="newest checkpoints kept")


class EvaluationConfig(Section):
    """Recall during training."""

    every: PositiveInt | None = Field(None, description="steps between evaluations; none: only at the end")
    at_start: bool = Field(False, description="evaluate the untrained model too")
    batch_size: PositiveInt = Field(128, description="images a rank and forward pass")


class LoggingConfig(Section):
    """What a person sees."""

    every: PositiveInt = Field(10, description="steps between lines")
    tensorboard: bool = Field(True, description="write TensorBoard events beside metrics.jsonl")


class Config(Section):
    """One run."""

    name: str = Field(description="name of the run")
    run_dir: str = Field(description="folder that receives config, metrics and checkpoints")
    seed: int = Field(0, ge=0, description="seed of initialisation, data order, augmentation and dropout")
    steps: PositiveInt | None = Field(None, description="optimiser steps; give this or `epochs`")
    epochs: float | None = Field(None, gt=0, description="passes over data.train; give this or `steps`")
    data: DataConfig = Field(description="where samples come from")
    model: ModelConfig = Field(description="the student")
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict, description="name → frozen teacher")
    objectives: list[AnyObjective] = Field(min_length=1, description="terms of the loss, summed with their weights")
    optimizer: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="optimiser and learning-rate schedule"
    )
    engine: EngineConfig = Field(default_factory=EngineConfig, description="how a step is computed on the ranks")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="what is kept of the run")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="recall during training")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="what a person sees")

    @model_validator(mode="before")
    @classmethod
    def _tokens_replace_samples(cls, values: Any) -> Any:
        """Under data.batch_tokens the default of engine.batch_size does not count; a number that was written does."""
        if not isinstance(values, dict):
            return values
        data, engine = values.get("data"), values.get("engine", {})
        if isinstance(data, dict) and data.get("batch_tokens") is not None and isinstance(engine, dict):
            return {**values, "engine": {"batch_size": None, **engine}}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        modalities = set(self.model.encoders)
        for where, names in self._modality_references():
            for name in names:
                if name not in modalities:
                    raise ValueError(f"{where}: '{name}' is no modality; model.encoders has {sorted(modalities)}")
        for i, objective in enumerate(self.objectives):
            if isinstance(objective, CLSRegressionConfig):
                self._check_teacher(objective.teacher, f"objectives.{i}.teacher")
            if isinstance(objective, AttributesConfig) and self.data.labels is None:
                raise ValueError(f"objectives.{i}: the attributes objective needs data.labels")
        needs_text = any(encoder.input == "text" for encoder in self.model.encoders.values())
        if needs_text and self.data.tokenizer is None:
            raise ValueError("data.tokenizer: missing, but model.encoders has a text modality")
        self._check_batch_unit()
        return self

    def _check_batch_unit(self) -> None:
        """A step is counted in samples or in tokens."""
        engine, tokens = self.engine, self.data.batch_tokens
        if tokens is None:
            if engine.batch_size is None:
                raise ValueError("engine.batch_size: missing; expected a number of samples, or data.batch_tokens")
            return
        for name in ("batch_size", "micro_batch_size"):
            if getattr(engine, name) is not None:
                instead = "data.batch_tokens" if name == "batch_size" else "data.micro_batch_tokens"
                raise ValueError(
                    f"engine.{name}: found {getattr(engine, name)} beside data.batch_tokens {tokens}; a step is "
                    f"counted in samples or in tokens: set engine.{name} to null ({instead} says it), or "
                    "data.batch_tokens"
                )
        if self.uses_images:
            raise ValueError(
                "data.batch_tokens: this run uses images (model.encoders, or a teacher without `modality: text`), "
                "expected text alone; give engine.batch_size instead"
            )
        if self.data.tokenizer is None:
            raise ValueError("data.tokenizer: missing, but data.batch_tokens counts its tokens")
        if any(isinstance(objective, ContrastiveConfig) for objective in self.objectives):
            raise ValueError("data.batch_tokens: the contrastive objective needs batches of a fixed number of samples")

    @property
    def label_classes(self) -> int | None:
        """Length of the label vectors that the attributes objective reads; None without one."""
        return next((o.classes for o in self.objectives if isinstance(o, AttributesConfig)), None)

    @property
    def uses_images(self) -> bool:
        """Whether the student or a teacher sees images."""
        inputs = [encoder.input for encoder in self.model.encoders.values()]
        return "image" in inputs or any(teacher.modality == "image" for teacher in self.teachers.values())

    def _check_teacher(self, name: str, where: str) -> None:
        kind, _, modality = name.partition(":")
        if kind != "encoder" and name not in self.teachers:
            raise ValueError(f"{where}: '{name}' is not among teachers {sorted(self.teachers)}, nor encoder:MODALITY")
        if kind == "encoder":
            encoder = self.model.encoders.get(modality)
            if not (isinstance(encoder, TimmEncoderConfig) and encoder.frozen and encoder.feature == -1):
                raise ValueError(
                    f"{where}: '{name}' needs a frozen timm encoder with feature -1 under model.encoders.{modality}"
                )

    def _modality_references(self) -> list[tuple[str, list[str]]]:
        found = [(f"model.layers.{i}.modalities", layer.modalities or []) for i, layer in enumerate(self.model.layers)]
        found.append(("model.pooling", list(self.model.pooling)))
        for i, layer in enumerate(self.model.layers):
            found.append((f"model.layers.{i}.init", [m for m in layer.init if m != "shared"]))
        for i, objective in enumerate(self.objectives):
            if isinstance(objective, CLSRegressionConfig):
                found.append((f"objectives.{i}.modalities", objective.modalities))
            if isinstance(objective, AttributesConfig):
                found.append((f"objectives.{i}.modality", [objective.modality]))
        return found
