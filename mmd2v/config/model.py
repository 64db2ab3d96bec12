"""The config's `model` section: the student."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmd2v.config.data2vec import MaskingConfig
from mmd2v.config.section import NonNegativeInt, Positive, PositiveInt, Rate, Section, Triple


class EncoderConfig(Section):
    """Fields every modality encoder shares. Its output tokens are bridged linearly to the model's width if need be.

    A kind of encoder is a subclass with a `kind` of its own; `mmd2v.models.encoders.register_encoder` makes it known.
    """

    kind: str = Field(description="which encoder it is")
    input: str = Field(description="the part of a sample it sees: image, text, or the name of an array in data.arrays")
    frozen: bool = Field(
        False,
        description="keep the encoder's own weights fixed, a backbone also in eval mode; what is added to a backbone "
        "(bridge, CLS, positions, norm) stays trainable",
    )
    cls: bool = Field(True, description="put a learned CLS token in front (text encoders use the tokenizer's own)")
    positions: Literal["learned", "sincos", "none"] = Field(
        "learned", description="position embedding added after the bridge (not for the CLS under sincos)"
    )
    init: str | None = Field(
        None, description="`mmd2v:EXPORT` whose encoder of this input it starts from, all parts; none: see `weights`"
    )
    norm: bool = Field(False, description="LayerNorm on the encoder's tokens before they enter the layers")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of that LayerNorm")
    dropout: Rate = Field(0.0, description="dropout probability on the tokens that enter the layers")
    token_drop: Rate = Field(
        0.0, description="fraction of an image's tokens left out at random in training (never the CLS); images only"
    )


def _check_one_source(init: str | None, weights: str | None) -> None:
    """Either replaces what the other has set."""
    if init is not None and weights is not None:
        raise ValueError(f"init: found '{init}' beside weights '{weights}'; expected one of the two")


class PatchEncoderConfig(EncoderConfig):
    """Image → non-overlapping patches through one strided convolution (ViT)."""

    kind: Literal["patch"] = Field("patch", description="patches of the pixels")
    input: Literal["image"] = Field("image", description="the part of a sample it sees")
    patch_size: PositiveInt = Field(16, description="side of a patch, in pixels")
    weights: str | None = Field(
        None, description="`data2vec2-image:FOLDER` or `mmd2v:EXPORT` whose patch encoder it starts from; none: random"
    )

    @model_validator(mode="after")
    def _one_source(self) -> PatchEncoderConfig:
        _check_one_source(self.init, self.weights)
        return self


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
    """Token ids → an embedding table and learned positions."""

    kind: Literal["tokens"] = Field("tokens", description="an embedding table and learned positions")
    input: Literal["text"] = Field("text", description="the part of a sample it sees")
    weights: str | None = Field(
        None, description="`data2vec2-text:FOLDER` or `mmd2v:EXPORT` whose tables it starts from; none: random"
    )
    first_position: NonNegativeInt = Field(
        0, description="row of the position table that the first token takes; fairseq's models count from 2"
    )
    position_rows: PositiveInt | None = Field(
        None, description="rows of the position table; none: data.tokenizer.max_length + first_position"
    )
    padding: Literal["none", "longest", "max_length"] = Field(
        "none",
        description="rows of padding up to the batch's longest text or to data.tokenizer.max_length, which attention "
        "does not see: only to reproduce losses and means that count padding",
    )

    @model_validator(mode="after")
    def _one_source(self) -> TokenEncoderConfig:
        _check_one_source(self.init, self.weights)
        return self


class HFTextEncoderConfig(EncoderConfig):
    """Token ids → the embedding module (words, positions, norm) of a Hugging Face encoder."""

    kind: Literal["hf"] = Field("hf", description="the embeddings of a Hugging Face encoder")
    input: Literal["text"] = Field("text", description="the part of a sample it sees")
    name: str = Field(description="folder or hub name of the encoder")
    positions: Literal["none"] = Field("none", description="the embedding module brings its own")
    first_position: NonNegativeInt | None = Field(
        None, description="row of the position table that the first token takes; none: the one it was trained with"
    )


AnyEncoder = Annotated[
    PatchEncoderConfig | TimmEncoderConfig | TokenEncoderConfig | HFTextEncoderConfig, Field(discriminator="kind")
]


class InitConfig(Section):
    """Pretrained blocks a group of layers starts from."""

    source: str = Field(
        description="where the blocks come from: `hf:FOLDER-or-name`, `mmd2v:EXPORT`, `data2vec2-image:FOLDER`, "
        "`data2vec2-text:FOLDER`, `beit2:FOLDER`, or a name in model.sources"
    )
    first: NonNegativeInt = Field(0, description="index of the source block that the group's first layer takes")
    step: PositiveInt = Field(1, description="source blocks from one layer to the next; 2 takes every second block")
    modality: str | None = Field(None, description="which modality's blocks of an mmd2v export; none: the same one")
    parts: Literal["both", "attention", "mlp"] = Field(
        "both", description="the halves of a block (each with its norm) that are taken over"
    )


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
    eps: Positive | dict[str, Positive] = Field(
        1e-6, description="epsilon of the LayerNorms, or owner → epsilon (owners not named: 1e-6)"
    )
    sub_norm: bool = Field(
        False, description="further LayerNorms before the output maps of attention and MLP (BEiT-3's sub-LN)"
    )
    joint_expert: bool = Field(
        False,
        description="a further MLP for all rows where image and text are one sequence (VLMo's third expert)",
    )
    heads: PositiveInt | None = Field(None, description="attention heads; none: model.heads")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP as a multiple of the width")
    layer_scale: float | None = Field(None, description="initial value of the residual branches' learned scale")
    drop_path: Rate = Field(0.0, description="probability that a sequence skips a residual branch in training")
    layer_drop: Rate = Field(
        0.0,
        description="probability that a step of training skips a layer of the group, for all samples on all ranks",
    )
    dropout: Rate = Field(0.0, description="dropout probability on each branch's output in training")
    init: dict[str, InitConfig | list[InitConfig]] = Field(
        default_factory=dict,
        description="modality → pretrained blocks; `shared` names the shared parts, `joint` the joint expert. A list "
        "takes them in turn: attention from one source and MLP from another, say",
    )

    @model_validator(mode="after")
    def _ownership(self) -> LayerConfig:
        if self.kind is None and (self.attention is None or self.mlp is None):
            raise ValueError("give `kind` (separate, mome, shared) or both `attention` and `mlp` (separate, shared)")
        if self.kind is not None and (self.attention is not None or self.mlp is not None):
            raise ValueError("give either `kind` or `attention` and `mlp`, not both")
        return self

    def eps_of(self, owner: str) -> float:
        """Return the LayerNorms' epsilon of an owner's weights."""
        return self.eps.get(owner, 1e-6) if isinstance(self.eps, dict) else self.eps

    def inits_of(self, owner: str) -> list[InitConfig]:
        """Return the sources of an owner's weights, in turn."""
        found = self.init.get(owner, [])
        return found if isinstance(found, list) else [found]

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
    sources: dict[str, str] = Field(
        default_factory=dict,
        description="name → source of blocks that `init` may name, changed in one place",
    )
    init: str | None = Field(
        None,
        description="`mmd2v:EXPORT` of the same architecture that everything starts from, for fine-tuning; a "
        "projection of another form stays random",
    )
    token_types: Literal["none", "input", "shared"] = Field(
        "none",
        description="a learned vector a modality, added to its rows before the first layer or before the first one "
        "with shared weights",
    )
    joint_from: NonNegativeInt | None = Field(
        None,
        description="index of the first layer (counting each of a group) that a pair's image and text pass as one "
        "sequence, for objectives that ask for pairs; the layers before it are run once",
    )
    final_norm: bool = Field(True, description="LayerNorm after the last layer")
    masking: dict[str, MaskingConfig] = Field(
        default_factory=dict,
        description="modality → which of its tokens are hidden in training, for the data2vec objective",
    )
    pooling: dict[str, Literal["cls", "mean", "mean_padded"]] = Field(
        default_factory=dict,
        description="modality → cls, mean over its real tokens, or mean over rows of padding too; default cls",
    )
    projection: ProjectionConfig = Field(
        default_factory=ProjectionConfig, description="from the pooled sequence to the embedding"
    )
    init_deviation: float = Field(
        0.02, gt=0, description="standard deviation of new weights (BERT's 0.02 suits D = 768; narrow models want more)"
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep of each layer its input alone and compute the rest again in the backward pass: less memory "
        "for about a third more time",
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
