"""The config's `teachers` and `objectives` sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from mmd2v.config.data2vec import DecoderConfig, EMAConfig
from mmd2v.config.section import Fraction, NonNegativeInt, Positive, PositiveInt, Section, Triple


def _different(names: tuple[str, str]) -> tuple[str, str]:
    if names[0] == names[1]:
        raise ValueError(f"found {names[0]} twice, expected two different modalities")
    return names


_TwoModalities = Annotated[tuple[str, str], AfterValidator(_different)]
_BETWEEN = "the two modalities; none: the image and the text, where there is nothing else"
_Exchange = Literal["gather", "ring"]
_EXCHANGE = (
    "how ranks see each other's embeddings: gather them all on each, or pass the second modality's round a ring, where "
    "a rank holds those of two others at a time and a logit serves both directions"
)


class TeacherConfig(Section):
    """A model without gradient whose outputs the student learns to produce."""

    name: str = Field(
        description="`timm:NAME[@WEIGHTS]`, `hf:NAME-or-folder`, `mmd2v:EXPORT`, or a folder of `mmd2v convert`: "
        "`data2vec2-image:FOLDER`, `data2vec2-text:FOLDER`, `beit2:FOLDER`; or `ema:MODALITY`: an average of the "
        "student itself over the steps so far"
    )
    ema: EMAConfig | None = Field(None, description="of an `ema:MODALITY`: how it follows the student; none: defaults")
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
    shared_encoder: str | None = Field(
        None,
        description="modality of the student whose encoder, frozen and with this teacher's own weights, runs once for "
        "both, in the teacher's precision",
    )
    outputs: str | None = Field(
        None,
        description="folder that `mmd2v data annotate` wrote: training replays what it holds and does not load the "
        "model, if that is what it would give in the whole run (else it runs, and a line says why)",
    )

    @model_validator(mode="after")
    def _follower(self) -> TeacherConfig:
        if self.averaged is None:
            if self.ema is not None:
                raise ValueError(f"ema: given for '{self.name}', expected a name `ema:MODALITY` beside it")
            return self
        # Values and not what was written: a run's own config.yaml spells out the defaults.
        for key in ("outputs", "shared_encoder", "image_size", "mean", "std", "kwargs", "pooling"):
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                raise ValueError(f"{key}: given for '{self.name}', which is the student's own average; leave it out")
        return self

    @property
    def averaged(self) -> str | None:
        """The modality of the student that this teacher is an average of; None: it is another model."""
        kind, _, modality = self.name.partition(":")
        return modality if kind == "ema" else None


class ObjectiveConfig(Section):
    """Fields every term of the loss shares."""

    weight: float = Field(1.0, description="factor of this term in the sum")

    @property
    def needs_layer_results(self) -> bool:
        """Whether its teacher must give more than CLS and tokens, which is all that stored outputs hold."""
        return False


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
    between: _TwoModalities | None = Field(None, description=_BETWEEN)
    exchange: _Exchange = Field("gather", description=_EXCHANGE)
    final: bool = Field(True, description="compare the final embeddings")
    layers: list[NonNegativeInt] = Field(
        default_factory=list,
        description="compare the CLS after these layers too, counted from 0, each with a head and temperature of its "
        "own",
    )
    dim: PositiveInt | None = Field(None, description="width of the layers' heads; none: that of the embedding")

    @model_validator(mode="after")
    def _levels(self) -> ContrastiveConfig:
        if not self.final and not self.layers:
            raise ValueError("final: found false without `layers`; nothing is compared, expected either of the two")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers: found {self.layers}, expected each layer once")
        return self


class SigLIPConfig(ObjectiveConfig):
    """Sigmoid loss over all pairs of two modalities (Zhai et al. 2023), pairs of all ranks with gradient."""

    kind: Literal["siglip"] = Field("siglip", description="sigmoid loss over all pairs of two modalities")
    scale: Positive = Field(10.0, description="initial factor of the cosine")
    bias: float = Field(-10.0, description="initial summand: at the start, most pairs are negatives")
    learned: bool = Field(True, description="learn scale (its logarithm) and bias")
    between: _TwoModalities | None = Field(None, description=_BETWEEN)
    exchange: _Exchange = Field("gather", description=_EXCHANGE)


class ContrastiveTargetConfig(ObjectiveConfig):
    """InfoNCE of each modality with the teacher's CLS of its own sample, against a memory bank of teacher CLS."""

    kind: Literal["contrastive_target"] = Field(
        "contrastive_target", description="InfoNCE with a teacher's CLS against a memory bank"
    )
    teacher: str = Field(description="key in `teachers`")
    modalities: list[str] = Field(default_factory=list, description="who is compared; none named: every modality")
    shared_head: bool = Field(False, description="one head (LayerNorm, linear) for all modalities")
    temperature: float = Field(0.07, ge=0.01, le=1, description="initial softmax temperature")
    learned: bool = Field(True, description="learn the temperature, its inverse clamped to [1, 100]")
    in_batch: bool = Field(True, description="the targets of the step's other samples, of all ranks, are negatives too")
    bank_size: NonNegativeInt = Field(
        65_536, description="newest teacher CLS kept as negatives, over all ranks (a multiple of their number); 0: none"
    )
    bank_precision: Literal["fp16", "bf16"] = Field(
        "fp16", description="of the bank; its rows have length 1, which fp16 holds more exactly"
    )

    @model_validator(mode="after")
    def _negatives(self) -> ContrastiveTargetConfig:
        if not self.bank_size and not self.in_batch:
            raise ValueError("bank_size: found 0 without `in_batch`; there is no negative, expected either of the two")
        return self


class LayerResultsConfig(ObjectiveConfig):
    """Regress the teacher's averaged layer results at every token: unimodal distillation, and data2vec's target."""

    kind: Literal["layer_results"] = Field("layer_results", description="regression of averaged layer results")
    teacher: str = Field(description="key in `teachers`; it must see the same modality, in as many tokens")
    modality: str = Field(description="whose layers' results are regressed")
    loss: Literal["mse", "smooth_l1"] = Field("mse", description="distance to the target")
    final_norm: bool | None = Field(
        None, description="LayerNorm without weights on both averages; none: for images, not for text (data2vec 2.0)"
    )
    count_padding: bool = Field(
        False, description="padding counts in statistics and mean, as in the source; needs the encoder's `padding`"
    )
    keep: Fraction = Field(
        1.0,
        gt=0,
        description="share of the tokens that count, by the teacher's CLS attention; the CLS always does",
    )
    keep_by: Literal["most", "least"] = Field(
        "most", description="under `keep`: the tokens that the teacher's CLS attends to most, or least"
    )

    @property
    def needs_layer_results(self) -> bool:
        """See `ObjectiveConfig.needs_layer_results`."""
        return True


class TokenRegressionConfig(ObjectiveConfig):
    """Regress the teacher's last tokens one by one: a CNN's feature map too, if the student's grid is the same."""

    kind: Literal["token_regression"] = Field("token_regression", description="regression of the teacher's tokens")
    teacher: str = Field(description="key in `teachers`; of as many tokens as the student, with CLS or without")
    modality: str = Field(description="whose tokens are regressed")
    normalize: Literal["none", "layer_norm"] = Field(
        "layer_norm", description="parameter-free normalisation of each target token over its channels"
    )
    head: Literal["none", "linear", "norm_linear", "mlp"] = Field(
        "norm_linear", description="map from the student's width to the teacher's; none needs equal widths"
    )
    loss: Literal["mse", "smooth_l1", "cosine"] = Field("mse", description="distance to the target")


class Data2VecConfig(ObjectiveConfig):
    """data2vec 2.0's own loss: predict the teacher's averaged layer results at the tokens that the student misses."""

    kind: Literal["data2vec"] = Field("data2vec", description="prediction of the teacher's results at hidden tokens")
    teacher: str = Field(description="key in `teachers`; an `ema:MODALITY`, or another that sees as many tokens")
    modality: str = Field(description="whose hidden tokens are predicted; model.masking has it")
    top_layers: PositiveInt | None = Field(None, description="last layers of the teacher that are averaged; none: all")
    final_norm: bool | None = Field(
        None, description="LayerNorm without weights on the average; none: for images, not for text"
    )
    loss: Literal["mse", "smooth_l1"] = Field("mse", description="distance to the target")
    beta: Positive = Field(1.0, description="smooth_l1: distance up to which it is quadratic")
    cls_weight: float | None = Field(
        None,
        ge=0,
        description="weight of the distance between the student's CLS and the mean of the sample's targets; none: 0.01 "
        "for images, 0 for text. The published recipe sums it over the clones of a GPU, 256 of them: 2.56 in this unit",
    )
    min_target_var: float = Field(
        0.1,
        ge=0,
        description="stop when the targets vary less than this over the tokens of an interval (mean over channels of "
        "the deviation; about 0: the model has collapsed); 0: never",
    )
    decoder: DecoderConfig = Field(default_factory=DecoderConfig, description="the convolutions that predict")

    @property
    def needs_layer_results(self) -> bool:
        """See `ObjectiveConfig.needs_layer_results`."""
        return True


class MatchingConfig(ObjectiveConfig):
    """Whether an image and a text belong together, with hard negatives, over joint sequences (`model.joint_from`)."""

    kind: Literal["matching"] = Field("matching", description="image–text matching with hard negatives")
    temperature: float = Field(
        0.07, ge=0.01, le=1, description="of the softmax of similarities that hard negatives are drawn from"
    )


class AttributesConfig(ObjectiveConfig):
    """Multi-label classification of a sample's known attributes (binary cross-entropy)."""

    kind: Literal["attributes"] = Field("attributes", description="classification of known attributes")
    modality: str = Field("image", description="whose pooled output is classified")
    classes: PositiveInt = Field(description="length of the label vector named by data.labels")
    prior: float = Field(0.5, gt=0, lt=1, description="probability every attribute starts with")


class ClassificationConfig(ObjectiveConfig):
    """Classification into one of several classes (cross-entropy): fine-tuning on labelled images or texts."""

    kind: Literal["classification"] = Field("classification", description="classification into one of several classes")
    modality: str = Field("image", description="whose pooled output is classified")
    classes: PositiveInt = Field(ge=2, description="classes; the label named by data.labels is 0 … classes − 1")
    label_smoothing: Fraction = Field(0.0, description="probability mass spread evenly over the classes")


AnyObjective = Annotated[
    CLSRegressionConfig
    | LayerResultsConfig
    | TokenRegressionConfig
    | ContrastiveConfig
    | SigLIPConfig
    | ContrastiveTargetConfig
    | MatchingConfig
    | Data2VecConfig
    | AttributesConfig
    | ClassificationConfig,
    Field(discriminator="kind"),
]
