"""A third modality as a user would add it: a config class, an encoder class, one call."""

from typing import Literal

from pydantic import Field
from torch import nn

from mmd2v.config.schema import EncoderConfig
from mmd2v.models.encoders import ArrayEncoder, FixedGrid, register_encoder


class SpectrogramEncoderConfig(EncoderConfig):
    """Patches of a spectrogram, one row each."""

    kind: Literal["spectrogram"] = Field("spectrogram", description="patches of a spectrogram")


class SpectrogramEncoder(ArrayEncoder):
    """One linear map, then CLS and positions."""

    def __init__(self, config, context):
        super().__init__(config, context)
        patches, values = self.shape
        self.proj = nn.Linear(values, context.width)
        self.grid = FixedGrid(config, context.width, (patches, 1), context.width)

    def encode(self, x_BPC):
        return self.grid(self.proj(x_BPC))


register_encoder(SpectrogramEncoderConfig, SpectrogramEncoder)
