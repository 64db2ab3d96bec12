"""What of the config's `model` section makes the architecture: where a checkpoint or an export must be as the run is.

Shapes alone would let other heads, norms or poolings pass: the weights fit, and compute something else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mmd2v.config.model import LayerConfig, ModelConfig

NOT_STRUCTURE = frozenset(
    {
        *("dropout", "drop_path", "layer_drop", "token_drop", "masking"),
        *("init", "weights", "sources"),
        "activation_checkpointing",
    }
)
"""Keys of the model section that may change on the way: they make noise, name where first weights came from, or trade
time for memory."""

_CHOSEN_ANEW = {"projection", "freeze", "init_deviation", "joint_from"}
"""Keys of the model section that another run may set as it likes: what it trains, its projection, which layers a pair
passes as one."""


def structure(section: Any, skipped: frozenset[str] = NOT_STRUCTURE) -> Any:
    """Return the model section as plain values, or a part of it, without the ``skipped`` keys."""
    if isinstance(section, Mapping):
        left_out = skipped | ({"name"} if section.get("kind") == "hf" else set())  # the folder of the encoder
        return {key: structure(value, skipped) for key, value in section.items() if key not in left_out}
    return [structure(item, skipped) for item in section] if isinstance(section, list) else section


def function(model: ModelConfig) -> dict[str, Any]:
    """Return what decides on the function that a model's weights compute, whichever way the config says it.

    Groups of layers are written out and defaults filled in; each layer says its owners' epsilons.
    """
    names = list(model.encoders)
    values = model.model_dump(mode="json", exclude=_CHOSEN_ANEW | {"layers", "heads"})
    # The rows of a table show in its shape.
    found = structure(values, NOT_STRUCTURE | {"frozen", "position_rows"})
    found["pooling"] = {name: model.pooling.get(name, "cls") for name in names}
    if model.token_types != "none":
        found["token_types"] = [model.token_types, *names]  # a type is known by its modality's place among them
    found["layers"] = {str(i): _layer(layer, model) for i, layer in enumerate(each_layer(model))}
    return found


def each_layer(model: ModelConfig) -> list[LayerConfig]:
    """Return every layer's config, groups written out."""
    return [group for group in model.layers for _ in range(group.count)]


def _layer(layer: LayerConfig, model: ModelConfig) -> dict[str, Any]:
    modalities = [name for name in model.encoders if name in (layer.modalities or model.encoders)]
    ownership = {"attention": layer.attention_owner, "mlp": layer.mlp_owner}
    owners = [*(modalities if "separate" in ownership.values() else []), *{"shared"}.intersection(ownership.values())]
    return {
        **ownership,
        "modalities": modalities,
        "joint_expert": layer.joint_expert,
        "norm": layer.norm,
        "sub_norm": layer.sub_norm,
        "heads": layer.heads or model.heads,
        "eps": {owner: layer.eps_of(owner) for owner in [*owners, *(["joint"] if layer.joint_expert else [])]},
    }


def differences(at: str, found: Any, expected: Any, whose: str = "checkpoint") -> list[str]:
    """Return a line for each key below ``at`` in which ``found``, which is ``whose``, and this run's differ."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        keys = [*found, *(key for key in expected if key not in found)]
        return [d for key in keys for d in differences(f"{at}.{key}", found.get(key), expected.get(key), whose)]
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = zip(found, expected, strict=True)
        return [d for i, (old, new) in enumerate(pairs) for d in differences(f"{at}.{i}", old, new, whose)]
    return [] if found == expected else [f"{at}: {whose} {_short(found)}, this run {_short(expected)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
