"""What two parts of a config cannot both mean, where a run would go on in silence and do neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmd2v.config.model import HFTextEncoderConfig, PatchEncoderConfig, TimmEncoderConfig, TokenEncoderConfig
from mmd2v.config.objectives import Data2VecConfig, LayerResultsConfig

if TYPE_CHECKING:
    from mmd2v.config.schema import Config

_OWN_ENCODERS = (PatchEncoderConfig, TimmEncoderConfig, TokenEncoderConfig, HFTextEncoderConfig)
"""Of a registered encoder it is not known here whether it pads."""


def check_contradictions(config: Config) -> None:
    """Raise ValueError, beginning with the key, for the first contradiction. The modalities it names must exist."""
    _check_joint_experts(config)
    _check_pooling(config)
    _check_kept_tokens(config)
    _check_averaged_layers(config)


def _check_joint_experts(config: Config) -> None:
    """A layer that no pair passes as one sequence would never use its expert."""
    first, joint_from = 0, config.model.joint_from
    for i, group in enumerate(config.model.layers):
        where = f"model.layers.{i}.joint_expert: found true"
        if group.joint_expert and joint_from is None:
            raise ValueError(f"{where}, but model.joint_from is null: no pair is one sequence; set it, or false here")
        if group.joint_expert and joint_from is not None and first < joint_from:
            raise ValueError(
                f"{where} in a group that begins with layer {first}, before model.joint_from {joint_from}; expected "
                "it from that layer on (split the group if need be)"
            )
        first += group.count


def _check_pooling(config: Config) -> None:
    """Without a CLS the first patch would be taken for it; without rows of padding there is nothing to count."""
    for name, encoder in config.model.encoders.items():
        where, pooling = f"model.pooling.{name}", config.model.pooling.get(name, "cls")
        if pooling == "cls" and not _has_cls(config, name):
            default = "" if name in config.model.pooling else " (the default)"
            raise ValueError(f"{where}: found cls{default}, but model.encoders.{name}.cls is false; expected mean")
        padding = getattr(encoder, "padding", "none")
        if pooling == "mean_padded" and padding == "none" and isinstance(encoder, _OWN_ENCODERS):
            raise ValueError(
                f"{where}: found mean_padded, but model.encoders.{name} has no rows of padding; expected mean, or its "
                "padding: longest or max_length (of a `tokens` encoder)"
            )


def _check_kept_tokens(config: Config) -> None:
    """The share that `keep` takes is of the tokens behind the CLS."""
    for i, objective in enumerate(config.objectives):
        if (
            isinstance(objective, LayerResultsConfig)
            and objective.keep < 1
            and not _has_cls(config, objective.modality)
        ):
            raise ValueError(
                f"objectives.{i}.keep: found {objective.keep:g}, which takes the tokens that a CLS attends to, but "
                f"model.encoders.{objective.modality}.cls is false; expected 1"
            )


def _check_averaged_layers(config: Config) -> None:
    """An average of the student has as many layers as the modality passes there."""
    for i, objective in enumerate(config.objectives):
        if (
            not isinstance(objective, Data2VecConfig)
            or (teacher := config.teachers[objective.teacher]).averaged is None
        ):
            continue
        groups = [g for g in config.model.layers if not g.modalities or teacher.averaged in g.modalities]
        layers = sum(group.count for group in groups)
        if not layers:
            raise ValueError(
                f"objectives.{i}.teacher: '{objective.teacher}' has no layer: '{teacher.averaged}' passes none of "
                "model.layers"
            )
        if (objective.top_layers or 0) > layers:
            raise ValueError(
                f"objectives.{i}.top_layers: found {objective.top_layers}, but '{teacher.averaged}' passes {layers} "
                "layers; expected at most that, or null for all of them"
            )


def _has_cls(config: Config, modality: str) -> bool:
    """Whether its first token is a CLS: a text has its tokenizer's, whatever `cls` says."""
    encoder = config.model.encoders[modality]
    return encoder.input == "text" or encoder.cls
