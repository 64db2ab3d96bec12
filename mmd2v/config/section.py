"""What every section of a config shares."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Of what is dropped: all of it would leave nothing to learn from."""
Positive = Annotated[float, Field(gt=0.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Triple = tuple[float, float, float]

LONGEST_WAIT = 5400.0
"""Most seconds a config may let one rank wait for something; the others' collectives wait half an hour longer."""


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
