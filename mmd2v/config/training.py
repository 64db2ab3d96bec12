"""The config's sections on how a run is computed and kept: `optimizer`, `engine`, `checkpoint` and the like."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mmd2v.config.section import LONGEST_WAIT, Fraction, NonNegativeInt, PositiveInt, Rate, Section

Precision = Literal["fp32", "bf16", "bf16_autocast", "fp16"]
AUTO: Literal["auto"] = "auto"
"""`engine.precision` until `mmd2v.train.precision` gives it a name."""


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
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="layer-wise decay of the learning rate: of n layers, layer i has this to the power n - i, encoders "
        "and token types n + 1, all else the full rate; times a group's own lr_multiplier",
    )
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
    precision: Literal["auto", Precision] = Field(
        AUTO,
        description="auto: bf16_autocast where the devices of all ranks have instructions for it, else fp32, and that "
        "of the checkpoint when a run goes on; bf16_autocast: fp32 weights, bf16 products; bf16 / fp16: DeepSpeed's "
        "own modes",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="what DeepSpeed shards: 1 optimiser, 2 gradients, 3 weights")
    zero3_persistence_threshold: NonNegativeInt = Field(
        100_000, description="ZeRO-3 keeps parameters of fewer elements whole on every rank"
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="further DeepSpeed options, merged over the generated dictionary"
    )
    rank_timeout: float = Field(
        120.0,
        ge=1,
        le=LONGEST_WAIT,
        description="seconds without a sign of life after which a rank counts as frozen and the run ends, naming it; a "
        "rank that died is noticed at once",
    )


class BestConfig(Section):
    """What makes a checkpoint the best one of a run."""

    metric: str = Field(
        description="a number of the evaluations during training, such as i2t_R@1, knn_top1 or pairs/NAME/mean"
    )
    mode: Literal["max", "min"] = Field("max", description="whether more or less of it is better")


class CheckpointConfig(Section):
    """What is kept of a run."""

    every: PositiveInt | None = Field(None, description="steps between checkpoints; none: only at the end")
    minutes: float | None = Field(
        None, gt=0, description="minutes between checkpoints, beside or instead of `every`; none: no clock"
    )
    keep: PositiveInt = Field(2, description="newest checkpoints kept, beside the permanent ones")
    permanent_every: PositiveInt | None = Field(
        None, description="checkpoints at multiples of this step are kept for ever; it makes none by itself"
    )
    best: BestConfig | None = Field(
        None,
        description="make a checkpoint at each evaluation after a step that beats those before it, and keep it until "
        "it is beaten; none: no number decides",
    )
    asynchronous: bool = Field(
        True,
        description="copy the state to the host and write it beside the training; false: no copy, the training waits",
    )
    verify: bool = Field(
        True, description="check the SHA-256 of every file before a run continues; false: its size only"
    )


class StabilityConfig(Section):
    """What is done when the loss is no number or jumps."""

    non_finite: Literal["stop", "skip", "roll_back"] = Field(
        "stop",
        description="loss or gradient infinite or not a number: end the run; skip: leave the step out on every rank; "
        "roll_back: go back to the newest checkpoint and on with the data after it",
    )
    skip_limit: PositiveInt = Field(10, description="most steps of a run that `non_finite: skip` leaves out")
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="roll back, too, when the mean loss between two lines is more than this many times the median of "
        "the steps before; none: never",
    )
    spike_window: PositiveInt = Field(500, description="steps of that median; nothing is judged before so many")
    roll_backs: NonNegativeInt = Field(2, description="most times that a run rolls back")


class KnnEvaluationConfig(Section):
    """k-NN image classification during training."""

    train: str = Field(description="memory bank: a folder of class folders of images, or an archive of one")
    test: str = Field(description="images to classify, in the same forms")
    k: PositiveInt = Field(10, description="neighbours that vote")
    features: Literal["embedding", "pooled"] = Field(
        "pooled", description="embedding: what retrieval compares; pooled: the vector before the projection"
    )


class PairsEvaluationConfig(Section):
    """Text-pair retrieval during training."""

    file: str = Field(description="labelled pairs, of which the positive ones are used")
    format: Literal["auto", "mrpc", "qqp", "qqp_glue"] = Field("auto", description="as `mmd2v eval pairs`")
    limit: PositiveInt = Field(25_000, description="the first so many positive pairs at most")
    features: Literal["embedding", "pooled"] = Field(
        "pooled", description="embedding: what retrieval compares; pooled: the vector before the projection"
    )


class EvaluationConfig(Section):
    """What is measured during training: recall on `data.eval`, and what is named here. All ranks share the work."""

    every: PositiveInt | None = Field(None, description="steps between evaluations; none: only at the end")
    at_start: bool = Field(False, description="evaluate the untrained model too")
    batch_size: PositiveInt = Field(128, description="images a rank and forward pass")
    knn: KnnEvaluationConfig | None = Field(None, description="classify images by their neighbours; none: not")
    pairs: dict[str, PairsEvaluationConfig] = Field(
        default_factory=dict, description="name → text pairs that are to find each other"
    )


class LoggingConfig(Section):
    """What a person sees."""

    every: PositiveInt = Field(10, description="steps between lines")
    tensorboard: bool = Field(True, description="write TensorBoard events beside metrics.jsonl")
