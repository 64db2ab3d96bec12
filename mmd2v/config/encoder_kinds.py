"""Which encoders a config may name: those of `mmd2v.config.model`, and what is registered besides."""

from __future__ import annotations

import typing
from collections.abc import Iterable
from functools import reduce
from operator import or_
from typing import Annotated

from pydantic import Field

from mmd2v.config import model, schema


def encoder_kinds() -> dict[str, type[model.EncoderConfig]]:
    """Kind → config class."""
    _, annotated = typing.get_args(model.ModelConfig.model_fields["encoders"].annotation)
    return {_kind(config): config for config in typing.get_args(typing.get_args(annotated)[0])}


def add_encoder_kind(config: type[model.EncoderConfig]) -> str:
    """Let ``model.encoders`` name the encoders that ``config`` describes; return their kind.

    Raises:
        TypeError: it is no `EncoderConfig`, or has no ``kind: Literal["NAME"]`` of its own with that default.
        ValueError: another class has this kind.
    """
    kind = _kind(config)
    known = encoder_kinds()
    if known.get(kind, config) is not config:
        raise ValueError(f"encoder kind '{kind}': {known[kind].__qualname__} has it already")
    if kind not in known:
        set_encoder_kinds([*known.values(), config])
    return kind


def set_encoder_kinds(configs: Iterable[type[model.EncoderConfig]]) -> None:
    """Let ``model.encoders`` name exactly these; `Config` itself is the same class as before."""
    union = Annotated[reduce(or_, configs), Field(discriminator="kind")]  # type: ignore[arg-type]
    model.ModelConfig.model_fields["encoders"].annotation = dict[str, union]  # type: ignore[valid-type]
    # A schema holds those of its sections: inner before outer.
    for section in (model.ModelConfig, schema.Config):
        section.model_rebuild(force=True)


def _kind(config: type[model.EncoderConfig]) -> str:
    if not (isinstance(config, type) and issubclass(config, model.EncoderConfig)):
        raise TypeError(f"found {config!r}, expected a subclass of EncoderConfig")
    kind = config.model_fields["kind"]
    tags = typing.get_args(kind.annotation) if typing.get_origin(kind.annotation) is typing.Literal else ()
    if len(tags) != 1 or kind.default != tags[0]:
        raise TypeError(f'{config.__qualname__}.kind: expected kind: Literal["NAME"] = Field("NAME", …)')
    return tags[0]
