"""Parts of the config that only data2vec's own pre-training has: masks, a teacher that follows the student, a decoder.

The defaults are those of data2vec 2.0 (Baevski et al. 2022) and its published recipes.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from mmd2v.config.section import Fraction, NonNegativeInt, PositiveInt, Rate, Section


class MaskingConfig(Section):
    """Each sample enters the layers several times in training, with other tokens hidden; the CLS never is."""

    masks: PositiveInt = Field(8, description="copies of each sample, each with a mask of its own")
    ratio: float = Field(0.8, gt=0, lt=1, description="share of a sample's tokens that a copy does not see")
    block: PositiveInt = Field(
        1, description="side of the square blocks of patches that stay visible (data2vec 2.0: 3); 1: single tokens"
    )
    adjust: Fraction = Field(
        0.07,
        description="share of the tokens by which more blocks are drawn, as they overlap; the number of visible tokens "
        "stays exact",
    )
    noise: float = Field(0.01, ge=0, description="deviation of the noise that stands for a hidden token in the decoder")


class EMAConfig(Section):
    """How an `ema:MODALITY` teacher follows the student: after each step, own ← decay · own + (1 - decay) · student."""

    decay: Fraction = Field(0.9998, description="share of its own weights that it keeps in a step, at the start")
    decay_end: Fraction = Field(0.99999, description="that share from `anneal_steps` on; linear in between")
    anneal_steps: NonNegativeInt | None = Field(
        None, description="steps until `decay_end`; 0: from the start; none: all steps of the run"
    )
    encoder: bool = Field(
        True,
        description="average the modality encoder too (data2vec 2.0's images); false: it is the student's own after "
        "each step (its text)",
    )

    @model_validator(mode="after")
    def _rising(self) -> EMAConfig:
        if self.decay > self.decay_end:
            raise ValueError(f"decay: found {self.decay:g}, expected no more than decay_end {self.decay_end:g}")
        return self

    def decay_at(self, step: int, steps: int) -> float:
        """Return the decay of the update that ends step ``step`` (counted from 1) of a run of ``steps``."""
        anneal = steps if self.anneal_steps is None else self.anneal_steps
        if step >= anneal:
            return self.decay_end
        return self.decay + (self.decay_end - self.decay) * step / anneal


class DecoderConfig(Section):
    """Convolutions that predict the hidden tokens; what is not given is data2vec 2.0's for the modality."""

    dim: PositiveInt | None = Field(None, description="channels; none: the model's width")
    layers: PositiveInt | None = Field(None, description="convolutions; none: 6 for images, 5 for text")
    kernel: PositiveInt | None = Field(None, description="odd side of a kernel; none: 3 for images, 9 for text")
    groups: PositiveInt | None = Field(None, description="groups of channels; none: 16 for images, 1 for text")
    residual: bool | None = Field(None, description="add a convolution's input; none: for images, not for text")
    projection_layers: PositiveInt | None = Field(
        None, description="linear maps after the convolutions; none: 1 for images, 2 for text"
    )
    projection_ratio: float = Field(2.0, gt=0, description="hidden width between those maps, as a multiple of `dim`")
    input_dropout: Rate | None = Field(
        None, description="dropout probability on the decoder's input; none: 0 for images, 0.1 for text"
    )

    def filled(self, kind: str, width: int) -> DecoderConfig:
        """Return the decoder of a modality that is ``image`` or ``text`` with every field given."""
        image = kind == "image"
        published = {
            "dim": width,
            "layers": 6 if image else 5,
            "kernel": 3 if image else 9,
            "groups": 16 if image else 1,
            "residual": image,
            "projection_layers": 1 if image else 2,
            "input_dropout": 0.0 if image else 0.1,
        }
        return self.model_copy(update={k: v for k, v in published.items() if getattr(self, k) is None})
