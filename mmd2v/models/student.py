"""The student: modality encoders, layers of any ownership, pooling and projection.

Shapes: T rows of all sequences ordered by modality, S sequences of one modality, D width, E width of the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from mmd2v.config.schema import Config, ModelConfig, ProjectionConfig
from mmd2v.data.batch import Batch
from mmd2v.data.tokenizers import Tokenizer, check_ids
from mmd2v.models.encoders import ENCODERS, LIBRARY_PARTS, EncoderContext
from mmd2v.models.initialisation import init_from_sources, init_random
from mmd2v.models.layers import Layer
from mmd2v.models.packed import Layout, Packed
from mmd2v.models.parameters import freeze


@dataclass(frozen=True)
class StudentOutput:
    """What the objectives see, a modality each."""

    pooled: dict[str, torch.Tensor] = field(default_factory=dict)
    """[S, D], CLS or mean of the last layer after the final norm."""
    embedding: dict[str, torch.Tensor] = field(default_factory=dict)
    """[S, E], fp32, L2-normalised."""
    tokens: Packed | None = None
    """All rows after the last layer, before the final norm."""
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    """[S, C], fp32, the pooled feature of each frozen backbone."""


class Student(nn.Module):
    """One encoder for all modalities of ``config``."""

    def __init__(self, config: ModelConfig, context: EncoderContext) -> None:
        super().__init__()
        self.config = config
        names = tuple(config.encoders)
        self.encoders = nn.ModuleDict(
            {
                name: ENCODERS[encoder.kind](encoder, replace(context, where=f"model.encoders.{name}"))
                for name, encoder in config.encoders.items()
            }
        )
        self.inputs = {name: encoder.input for name, encoder in config.encoders.items()}
        self.layers = nn.ModuleList(
            Layer(group, config.width, config.heads, tuple(n for n in names if n in (group.modalities or names)))
            for group in config.layers
            for _ in range(group.count)
        )
        self.norm = nn.LayerNorm(config.width) if config.final_norm else nn.Identity()
        self.projection = Projection(config.projection, config.width, names)

    @property
    def embedding_width(self) -> int:
        """E"""
        return self.config.projection.dim or self.config.width

    def forward(self, batch: Batch, modalities: tuple[str, ...] | None = None) -> StudentOutput:
        """Encode the batch; ``modalities`` restricts it to some of them."""
        tokens, features = self._encode_tokens(batch, modalities or tuple(self.encoders))
        pooled = {name: self._pool(tokens, name) for name in tokens.layout.modalities}
        embedding = {
            name: F.normalize(self.projection(pooled_SD, name).float(), dim=-1) for name, pooled_SD in pooled.items()
        }
        return StudentOutput(pooled=pooled, embedding=embedding, tokens=tokens, features=features)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [B, E] of uint8 images [B, 3, H, W]."""
        nothing = torch.zeros(0, dtype=torch.int64, device=images.device)
        batch = Batch(images, nothing.int(), torch.zeros(0, dtype=torch.int32), nothing)
        return self._encode(batch, "image")

    def encode_text(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [N, E] of packed token ids [S] whose caption lengths [N] are on the host.

        Raises UserError for an id outside the vocabulary.
        """
        if ids.device.type == "cpu":  # on a GPU the check would wait for the device
            check_ids(ids.numpy(), self._encoder("text").vocab_size, "ids")
        images = torch.zeros(0, 3, 1, 1, dtype=torch.uint8, device=ids.device)
        batch = Batch(images, ids, lengths, torch.zeros(len(lengths), dtype=torch.int64, device=ids.device))
        return self._encode(batch, "text")

    def _encode_tokens(self, batch: Batch, modalities: tuple[str, ...]) -> tuple[Packed, dict[str, torch.Tensor]]:
        """Return the rows of the chosen modalities after the last layer, and their backbones' pooled features."""
        device = batch.images.device
        layout = Layout.build({name: self.encoders[name].lengths(batch) for name in modalities}, device)
        encoded = {name: self.encoders[name](batch, layout, name) for name in modalities}
        rows = _Rows({name: one.rows for name, one in encoded.items()})
        for layer in self.layers:
            inner = layout.select(layer.modalities)
            if inner.modalities:
                rows.put(inner, layer(rows.take(inner), inner))
        features = {name: one.feature for name, one in encoded.items() if one.feature is not None}
        return Packed(rows.take(layout), layout), features

    def _encode(self, batch: Batch, kind: str) -> torch.Tensor:
        name = self._name(kind)
        return self(batch, (name,)).embedding[name]

    def _encoder(self, kind: str) -> nn.Module:
        return self.encoders[self._name(kind)]

    def _name(self, kind: str) -> str:
        return next(name for name, encoder_input in self.inputs.items() if encoder_input == kind)

    def _pool(self, tokens: Packed, modality: str) -> torch.Tensor:
        rows_RD, layout = tokens[modality], tokens.layout
        if self.config.pooling.get(modality, "cls") == "cls":
            return self.norm(rows_RD[layout.first_rows(modality)])
        rows_RD = self.norm(rows_RD)
        lengths = layout.lengths[modality]
        if layout.is_rectangular(modality):
            return rows_RD.unflatten(0, (len(lengths), -1)).mean(dim=1)
        total_SD = torch.zeros(len(lengths), rows_RD.shape[1], dtype=rows_RD.dtype, device=rows_RD.device)
        total_SD = total_SD.index_add(0, layout.sequence_of_row(modality), rows_RD)
        return total_SD / layout.lengths_on_device(modality).to(rows_RD.dtype)[:, None]


class Projection(nn.Module):
    """From the pooled vector to the embedding that is compared by cosine."""

    def __init__(self, config: ProjectionConfig, width: int, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.shared = config.shared
        owners = ("shared",) if config.shared else modalities
        self.maps = nn.ModuleDict({owner: _projection(config, width) for owner in owners})

    def forward(self, pooled_SD: torch.Tensor, modality: str) -> torch.Tensor:
        """Return [S, E]."""
        return self.maps["shared" if self.shared else modality](pooled_SD)


def _projection(config: ProjectionConfig, width: int) -> nn.Module:
    dim = config.dim or width
    if config.kind == "none":
        return nn.Identity() if dim == width else nn.Linear(width, dim, bias=False)
    if config.kind == "linear":
        return nn.Sequential(nn.Dropout(config.dropout), nn.Linear(width, dim, bias=False))
    return nn.Sequential(
        nn.Linear(width, width), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(width, dim, bias=False)
    )


class _Rows:
    """Rows of each modality between layers, joined only where a layer needs several and kept joined while it can.

    A modality that passes through frozen layers alone stays out of the others' gradient graph in this way: joined to
    trainable rows, its frozen layers would be differentiated for nothing.
    """

    def __init__(self, parts: dict[str, torch.Tensor]) -> None:
        self._parts = parts
        self._joint: tuple[tuple[str, ...], torch.Tensor] | None = None

    def take(self, layout: Layout) -> torch.Tensor:
        """Return the rows of the layout's modalities, [T, D]."""
        if self._joint is not None and self._joint[0] == layout.modalities:
            return self._joint[1]
        parts = [self._parts[name] for name in layout.modalities]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def put(self, layout: Layout, x_TD: torch.Tensor) -> None:
        """Replace the rows of the layout's modalities."""
        self._joint = (layout.modalities, x_TD)
        self._parts.update(layout.split(x_TD))


def build_student(config: Config, tokenizer: Tokenizer | None, pretrained: bool = True) -> Student:
    """Build the student of a run and give it its starting weights.

    Random parts depend on ``config.seed`` alone. ``pretrained=False`` skips every source of weights, because a
    checkpoint is about to be loaded. Raises UserError for names, widths or weights that do not fit.
    """
    context = EncoderContext(
        width=config.model.width,
        image_size=config.data.image.size,
        image_mean=config.data.image.mean,
        image_std=config.data.image.std,
        vocab_size=None if tokenizer is None else tokenizer.vocab_size,
        max_length=None if tokenizer is None else tokenizer.max_length,
        pretrained=pretrained,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        student = Student(config.model, context)
        with torch.no_grad():
            _init_new_parts(student, config.seed, config.model.init_deviation)
            if pretrained:
                init_from_sources(student.layers, config.model)
    freeze(student, config.model.freeze, "model.freeze")
    return student


def _init_new_parts(student: Student, seed: int, deviation: float) -> None:
    """Draw everything that is ours at random; a backbone brings its own weights or its library's initialisation."""
    init_random(student.layers, seed, "layers", deviation)
    init_random(student.projection, seed, "projection", deviation)
    for modality, encoder in student.encoders.items():
        for name, child in encoder.named_children():
            if name not in LIBRARY_PARTS:
                init_random(child, seed, f"encoders.{modality}.{name}", deviation)
