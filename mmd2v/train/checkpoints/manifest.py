"""What a checkpoint says about itself in ``mmd2v.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmd2v.config.schema import Config
from mmd2v.data.stream import TrainFacts
from mmd2v.data.token_batches import TokenOrder
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError
from mmd2v.train.engine import Engine
from mmd2v.train.optimizer import public_name

MANIFEST = "mmd2v.json"
_FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What ``mmd2v.json`` of a checkpoint says."""

    format: int
    step: int
    """Finished optimiser steps."""
    sample_index: int
    """Position in the endless stream of training samples; in batches of tokens, where ``step`` is the position, how
    many samples were seen."""
    batch_size: int | None
    world_size: int
    zero_stage: int
    precision: str
    optimizer: str
    model: dict[str, Any]
    """The config's model section."""
    objectives: list[dict[str, Any]]
    parameters: dict[str, list[Any]]
    """Name → [shape, index of the optimiser group; null when frozen]."""
    stream: dict[str, Any] | None = None
    """Key of the config → value, of all that decides which samples come when; None: of a version that wrote none."""
    permanent: bool = False
    """Whether it is kept for ever."""
    files: dict[str, list[Any]] | None = None
    """Name → [size in bytes, SHA-256] of every other file of the checkpoint; None: of a version that wrote none."""
    interval: dict[str, Any] | None = None
    """What `LossMeter.state` has summed of an interval between two reports that the checkpoint cuts; None: none."""


def describe(
    engine: Engine,
    config: Config,
    world: World,
    step: int,
    sample_index: int,
    facts: TrainFacts,
    tokens: TokenOrder | None = None,
) -> Manifest:
    """Describe the checkpoint the engine would write after ``step`` steps, at position ``sample_index`` of the stream.

    ``facts`` are of the training set, ``tokens`` the order of its texts in batches of tokens.
    """
    group_of = {name: i for i, group in enumerate(engine.groups) for name in group.names}
    parameters = {
        public_name(name): [list(getattr(parameter, "ds_shape", parameter.shape)), group_of.get(public_name(name))]
        for name, parameter in engine.module.named_parameters()
    }
    return Manifest(
        format=_FORMAT,
        step=step,
        sample_index=sample_index,
        batch_size=config.engine.batch_size,
        world_size=world.size,
        zero_stage=config.engine.zero_stage,
        precision=config.engine.precision,
        optimizer=engine.optimizer_name,
        model=config.model.model_dump(mode="json"),
        objectives=[objective.model_dump(mode="json") for objective in config.objectives],
        parameters=parameters,
        stream=_stream(config, facts) | _token_stream(tokens),
    )


def _token_stream(tokens: TokenOrder | None) -> dict[str, Any]:
    """What decides the order of batches of tokens besides: the length of every text enters it."""
    if tokens is None:
        return {}
    return {
        "data.tokenizer (fingerprint)": tokens.fingerprint,
        "data.train (texts)": tokens.texts,
        "data.train (tokens)": tokens.tokens,
    }


def _stream(config: Config, facts: TrainFacts) -> dict[str, Any]:
    tokenizer = config.data.tokenizer
    return {
        "seed": config.seed,
        "data.train (images)": facts.samples,
        "data.train (samples of each shard)": facts.layout,
        # With another order, a resumed epoch would repeat some samples and miss others.
        "data.shuffle_shards": config.data.shuffle_shards,
        "data.lanes": config.data.lanes,
        "data.last_batch": config.data.last_batch,
        "data.batch_tokens": config.data.batch_tokens,
        "data.train.mix": config.data.train.mix if config.data.train.sets else None,
        **{f"data.train.sets.{name}.weight": one.weight for name, one in config.data.train.sets.items()},
        "data.image.size": config.data.image.size,
        **{
            f"data.tokenizer.{key}": getattr(tokenizer, key) if tokenizer else None
            for key in ("kind", "max_length", "append_end")
        },
    }


def read_manifest(path: Path) -> Manifest:
    """Read a checkpoint's manifest. Raises UserError when it is damaged or of another format."""
    file = path / MANIFEST
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise UserError(f"{file}: found checkpoint format {found!r}; this version reads {_FORMAT}")
    try:
        return Manifest(**values)
    except TypeError as error:
        raise UserError(f"{file}: not a manifest of a checkpoint: {error}") from None
