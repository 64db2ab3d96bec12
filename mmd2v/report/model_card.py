"""The README.md of an export: what the model is, what it was trained on, what was measured, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from mmd2v import __version__
from mmd2v.config.schema import Config, EncoderConfig, LayerConfig, ShardsConfig
from mmd2v.config.training import AUTO
from mmd2v.models.parameters import part
from mmd2v.report.recall_table import chance_row, recall_table


@dataclass(frozen=True)
class Training:
    """What is known of how the weights came to be."""

    step: int | None = None
    """Optimiser steps done."""
    samples: int | None = None
    """Images seen, counted with repetition."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Recall measured with these weights, as `mmd2v.evaluation.retrieval` names it."""


def model_card(config: Config, student: nn.Module, training: Training) -> str:
    """Return the card in Markdown. ``config`` is the export's, without machine paths."""
    sections = [
        f"# {config.name}",
        f"An encoder of {_and(sorted({e.input for e in config.model.encoders.values()}))}, distilled with mmd2v "
        f"{__version__}. Its embeddings have {_width(config)} numbers and length 1; their dot product is the cosine.",
        "## Use",
        _use(config),
        "## Architecture",
        _architecture(config, student),
        "## Training",
        _training(config, training),
        "## Measured",
        _measured(config, training.metrics),
        "## Limits and licences",
        _limits(config),
    ]
    return "\n\n".join(sections) + "\n"


def _use(config: Config) -> str:
    inputs = [encoder.input for encoder in config.model.encoders.values()]
    lines = ["import mmd2v", "", 'encoder = mmd2v.load("FOLDER")']
    if "image" in inputs:
        lines.append('images = encoder.encode_image(["photo.jpg"])')
    if "text" in inputs:
        lines.append('texts = encoder.encode_text(["a dog in the snow"])')
    code = "\n".join(lines)
    commands = (
        ""
        if not {"image", "text"} <= set(inputs)
        else '\n\nOr: `mmd2v search FOLDER --images PICTURES --text "a dog in the snow"`.'
    )
    return f"```python\n{code}\n```{commands}"


def _architecture(config: Config, student: nn.Module) -> str:
    model, image = config.model, config.data.image
    lines = [f"- Width {model.width}, {model.heads} attention heads"]
    lines += [f"- Modality `{name}`: {_encoder(encoder)}" for name, encoder in model.encoders.items()]
    lines += [f"- {group.count} × {_layer(group)}" for group in model.layers]
    pooling = ", ".join(f"{name}: {model.pooling.get(name, 'cls')}" for name in model.encoders)
    lines.append(f"- Pooling {pooling}; projection {model.projection.kind} to {_width(config)}")
    if any(encoder.input == "image" for encoder in model.encoders.values()):
        shape = "centre crop" if image.eval_resize == "center_crop" else "squashed"
        lines.append(f"- Images: RGB, {image.size} × {image.size} px, {shape}, {image.interpolation} antialiased")
    if config.data.tokenizer is not None:
        lines.append(
            f"- Texts: {config.data.tokenizer.kind} tokenizer, at most {config.data.tokenizer.max_length} tokens"
        )
    counts: dict[str, int] = {}
    for name, parameter in student.named_parameters():
        counts[part(name)] = counts.get(part(name), 0) + parameter.numel()
    table = ["| part | parameters |", "|---|---:|"]
    table += [f"| {name} | {count:,} |" for name, count in counts.items()]
    table.append(f"| total | {sum(counts.values()):,} |")
    return "\n".join(lines) + "\n\n" + "\n".join(table)


def _encoder(encoder: EncoderConfig) -> str:
    if encoder.kind == "patch":
        what = f"{encoder.patch_size} × {encoder.patch_size} px patches"
    elif encoder.kind == "timm":
        what = f"feature map {encoder.feature} of timm `{encoder.name}`"
    else:
        known = {"tokens": "token embeddings", "hf": "the embedding module of a Hugging Face encoder"}
        what = known.get(encoder.kind, f"`{encoder.kind}` of `{encoder.input}`")
    return what + (", frozen in training" if encoder.frozen else "")


def _layer(group: LayerConfig) -> str:
    only = f", for {_and(group.modalities)} alone" if group.modalities else ""
    return f"layer with {group.attention_owner} attention and {group.mlp_owner} MLP, {group.norm}-norm{only}"


def _training(config: Config, training: Training) -> str:
    sets = config.data.train.named_sets
    lines = [f"- Data: {name + ': ' if name else ''}{_data(one)}" for name, one in sets.items()]
    unit = "images" if config.uses_images else "texts"
    if training.step is not None:
        tokens, samples = config.data.batch_tokens, config.engine.batch_size
        size = f"at most {tokens:,} tokens" if tokens is not None else f"{samples:,} {unit}"
        lines.append(f"- {training.step:,} steps of {size}")
    if training.samples is not None:
        lines.append(f"- {training.samples:,} {unit} seen, counted with repetition")
    lines += [f"- Teacher `{name}`: `{t.name}` ({t.modality})" for name, t in config.teachers.items()]
    lines += [f"- Objective: {objective.kind}, weight {objective.weight:g}" for objective in config.objectives]
    inits = [init for group in config.model.layers for owner in group.init for init in group.inits_of(owner)]
    sources = sorted({config.model.sources.get(init.source, init.source) for init in inits})
    lines += [f"- Layers started from `{source}`" for source in sources]
    o = config.optimizer
    arithmetic = "" if config.engine.precision == AUTO else f", {config.engine.precision}"  # nothing was trained
    lines.append(f"- Learning rate {o.lr:g} ({o.schedule}), weight decay {o.weight_decay:g}{arithmetic}")
    lines.append("- The whole recipe is in `config.yaml`")
    return "\n".join(lines)


def _measured(config: Config, metrics: Mapping[str, float]) -> str:
    if not metrics or config.data.eval is None:
        return "Nothing was measured with these weights. `mmd2v eval retrieval FOLDER --shards …` does."
    counts = f"{metrics['images']:,.0f} images, {metrics['captions']:,.0f} captions" if "images" in metrics else ""
    table = recall_table({"chance": chance_row(metrics), config.name: metrics})
    return f"Retrieval on {_data(config.data.eval)} ({counts}), in percent:\n\n```\n{table}\n```"


def _limits(config: Config) -> str:
    lines = [
        "- These weights are derived from the training data and from the models named above, whose licences this card "
        "does not know. They may restrict what you do with the weights: look them up before you pass them on.",
        "- The model knows what its training data showed. It was not examined for bias or for safety-critical use.",
    ]
    if config.data.tokenizer is not None:
        lines.append(f"- Texts beyond {config.data.tokenizer.max_length} tokens are cut.")
    return "\n".join(lines)


def _data(shards: ShardsConfig) -> str:
    names = [shards.shards] if isinstance(shards.shards, str) else shards.shards
    first = f", first {shards.limit:,} images" if shards.limit else ""
    return ", ".join(f"`{Path(name).as_posix()}`" for name in names) + first


def _width(config: Config) -> int:
    return config.model.projection.dim or config.model.width


def _and(words: list[str]) -> str:
    return " and ".join(words)
