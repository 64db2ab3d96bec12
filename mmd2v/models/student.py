"""The student: modality encoders, layers of any ownership, pooling and projection.

Shapes: T rows of all sequences ordered by modality, S sequences of one modality, D width, E width of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmd2v.config.schema import Config, ModelConfig
from mmd2v.data.batch import Batch
from mmd2v.data.tokenizers import Tokenizer, check_ids
from mmd2v.errors import UserError
from mmd2v.models.encoders import ENCODERS, LIBRARY_PARTS, Encoded, EncoderContext
from mmd2v.models.heads import Projection, TokenTypes
from mmd2v.models.initialisation import init_encoders, init_everything, init_from_sources, init_random
from mmd2v.models.layer_drop import dropped_layers
from mmd2v.models.layers import SHARED, Layer
from mmd2v.models.masking import Mask, build_maskings, gather_visible
from mmd2v.models.packed import Layout, Packed
from mmd2v.models.parameters import freeze
from mmd2v.models.passage import Rows, Trace
from mmd2v.models.student_output import NOTHING_MORE, StudentOutput, Wanted


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
        self.maskings = build_maskings(config, self.encoders)
        self.token_types: TokenTypes | None = None
        if config.token_types != "none":
            self.token_types = TokenTypes(names, config.width)
        self.layers = nn.ModuleList(
            Layer(
                group,
                config.width,
                config.heads,
                tuple(n for n in names if n in (group.modalities or names)),
                recompute=config.activation_checkpointing,
            )
            for group in config.layers
            for _ in range(group.count)
        )
        self.layer_drop = [group.layer_drop for group in config.layers for _ in range(group.count)]
        self.typed_layer = self._typed_layer()
        if config.joint_from is not None and config.joint_from >= len(self.layers):
            raise UserError(
                f"model.joint_from: found {config.joint_from}, expected a layer's index below {len(self.layers)}"
            )
        self.norm = nn.LayerNorm(config.width) if config.final_norm else nn.Identity()
        self.projection = Projection(config.projection, config.width, names)

    @property
    def embedding_width(self) -> int:
        """E"""
        return self.config.projection.dim or self.config.width

    def forward(
        self,
        batch: Batch,
        modalities: tuple[str, ...] | None = None,
        *,
        encoded: Mapping[str, Encoded] | None = None,
        wanted: Wanted = NOTHING_MORE,
    ) -> StudentOutput:
        """Encode the batch; ``modalities`` restricts it to some of them.

        ``encoded`` is the output of the modalities whose frozen encoder has run already; ``wanted`` says what to keep
        besides the last layer's output.

        Every encoder, layer and projection is called whatever the batch holds, of a modality that it lacks with no
        rows: under ZeRO all ranks must call the same modules, and all parameters have a gradient.
        """
        names = modalities or tuple(self.encoders)
        dropped = self._draw_dropped(batch, wanted)
        layout, entered = self._encode_inputs(batch, names, encoded or {})
        layout, entered, masks = self._mask(batch, layout, entered)
        trace = Trace(wanted)
        rows = {name: one.rows for name, one in entered.items()}
        tokens = Packed(self._run_layers(layout, rows, trace, dropped), layout)
        pooled = {name: self._pool(tokens, name) for name in tokens.layout.modalities}
        embedding = {
            name: F.normalize(self.projection(pooled_SD, name).float(), dim=-1) for name, pooled_SD in pooled.items()
        }
        return StudentOutput(
            pooled=pooled,
            embedding=embedding,
            tokens=tokens,
            features={name: one.feature for name, one in entered.items() if one.feature is not None},
            encoded={name: one.rows for name, one in entered.items()},
            results=trace.results,
            layer_cls=trace.layer_cls,
            masks=masks,
            visible={name: self.norm(tokens[name]) for name in masks},
            cls_attention=trace.cls_attention,
            pair=None if trace.before_joint is None else partial(self._pair, trace.before_joint, layout, dropped),
        )

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

    def encode_array(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [B, E] of float32 arrays [B, …] of the modality that sees ``data.arrays.NAME``."""
        nothing = torch.zeros(0, dtype=torch.int64, device=values.device)
        images = torch.zeros(len(values), 3, 0, 0, dtype=torch.uint8, device=values.device)
        batch = Batch(images, nothing.int(), torch.zeros(0, dtype=torch.int32), nothing, arrays={name: values})
        return self._encode(batch, name)

    def _encode_inputs(
        self, batch: Batch, names: tuple[str, ...], given: Mapping[str, Encoded]
    ) -> tuple[Layout, dict[str, Encoded]]:
        """Return the rows that enter the layers, from each modality's encoder or as given."""
        keys = {name: self.encoders[name].keys(batch) for name in names}
        layout = Layout.build(
            {name: self.encoders[name].lengths(batch) for name in names},
            batch.images.device,
            {name: real for name, real in keys.items() if real is not None},
        )
        dtype = next(self.parameters()).dtype
        encoded = {}
        for name in names:
            one = given[name] if name in given else self.encoders[name](batch, layout, name)
            encoded[name] = one._replace(rows=one.rows.to(dtype)) if name in given else one
        return layout, encoded

    def _mask(
        self, batch: Batch, layout: Layout, entered: dict[str, Encoded]
    ) -> tuple[Layout, dict[str, Encoded], dict[str, Mask]]:
        """Put clones with hidden tokens in place of the samples of masked modalities; in training alone."""
        masks = {n: m(batch, layout, n) for n, m in self.maskings.items() if self.training and n in entered}
        if not masks:
            return layout, entered, {}
        entered = dict(entered)
        lengths = dict(layout.lengths)
        for name, mask in masks.items():
            entered[name] = entered[name]._replace(rows=gather_visible(entered[name].rows, layout, name, mask))
            lengths[name] = mask.visible_lengths
        return Layout(lengths, layout.device, layout.keys), entered, masks

    def _draw_dropped(self, batch: Batch, wanted: Wanted) -> frozenset[int]:
        """Return the layers that this step skips; a modality whose layer results are wanted keeps one of its own."""
        if not self.training:
            return frozenset()
        own = [[i for i, layer in enumerate(self.layers) if name in layer.modalities] for name in wanted.results]
        return dropped_layers(batch.draw_seed, self.layer_drop, own)

    def _run_layers(
        self,
        layout: Layout,
        entered: dict[str, torch.Tensor],
        trace: Trace,
        dropped: frozenset[int],
        first: int = 0,
    ) -> torch.Tensor:
        """Return the rows of all modalities after the last layer, [T, D]; ``first`` is the first layer they pass."""
        rows = Rows(dict(entered))
        last = {name: i for i, layer in enumerate(self.layers) for name in layer.modalities}
        for i, layer in enumerate(self.layers):
            if i == self.config.joint_from and not layout.joint:
                trace.before_joint = rows.parts(layout)
            if i < first:
                continue
            if i == self.typed_layer and self.token_types is not None:
                rows.put(layout, self.token_types(rows.take(layout), layout))
            inner = layout.select(layer.modalities)
            if not inner.modalities:
                continue
            x_TD = rows.take(inner)
            trace.see_attention(layer, x_TD, inner, [name for name in inner.modalities if last[name] == i])
            with_result = not trace.wanted.results.isdisjoint(inner.modalities)
            if i in dropped:
                # Called without rows, not left out: its weights get a gradient, of zeros, and ZeRO-3 meets the modules
                # of every step in the same order.
                nothing = layer(x_TD[:0], inner.without_rows(), with_result)
                rows.put(inner, torch.cat([x_TD, *(nothing if with_result else [nothing])]))
            elif with_result:
                after_TD, result_TD = layer(x_TD, inner, with_result=True)
                rows.put(inner, after_TD)
                trace.see_result(result_TD, inner)
            else:
                rows.put(inner, layer(x_TD, inner))
            trace.see_cls(i, rows, layout)
        return rows.take(layout)

    def _pair(
        self,
        before: dict[str, torch.Tensor],
        layout: Layout,
        dropped: frozenset[int],
        image_P: torch.Tensor,
        text_P: torch.Tensor,
    ) -> torch.Tensor:
        """Run the layers from `joint_from` on over pairs of an image and a text; see `StudentOutput.pair`."""
        image, text = self._name("image"), self._name("text")
        sequences = len(image_P)
        image_PLD = before[image].unflatten(0, (len(layout.lengths[image]), -1))[image_P]
        # Which texts are paired may be known on the device alone: all are padded to the longest of the batch.
        padding = layout.padding(text)
        is_key_SL = layout.is_key(text)
        is_token_PL = (padding.is_token if is_key_SL is None else is_key_SL)[text_P]
        text_PLD = before[text][padding.row_of_slot[text_P]]
        lengths = {image: image_PLD.shape[1], text: text_PLD.shape[1]}
        pairs = Layout(
            {name: np.full(sequences, lengths[name], np.int64) for name in layout.modalities if name in lengths},
            layout.device,
            key_masks={text: is_token_PL},
            joint=True,
        )
        assert self.config.joint_from is not None
        entered = {image: image_PLD.flatten(0, 1), text: text_PLD.flatten(0, 1)}
        x_TD = self._run_layers(pairs, entered, Trace(NOTHING_MORE), dropped, self.config.joint_from)
        return self.norm(pairs.split(x_TD)[text][pairs.first_rows(text)])

    def _typed_layer(self) -> int:
        """Return the index of the layer that the token types come before."""
        if self.config.token_types == "input":
            return 0
        is_shared = [SHARED in layer.attention or SHARED in layer.mlp for layer in self.layers]
        if self.config.token_types == "shared" and True not in is_shared:
            raise UserError("model.token_types: found 'shared', but no layer shares weights; expected input or none")
        return is_shared.index(True) if True in is_shared else 0

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
        is_key_SL = layout.is_key(modality)
        if len(lengths) == 0:
            return rows_RD
        if is_key_SL is not None and self.config.pooling[modality] == "mean":
            real_SL1 = is_key_SL[..., None].to(rows_RD.dtype)
            return (layout.unflatten(rows_RD, modality) * real_SL1).sum(dim=1) / real_SL1.sum(dim=1)
        if layout.is_rectangular(modality):
            return layout.unflatten(rows_RD, modality).mean(dim=1)
        total_SD = torch.zeros(len(lengths), rows_RD.shape[1], dtype=rows_RD.dtype, device=rows_RD.device)
        total_SD = total_SD.index_add(0, layout.sequence_of_row(modality), rows_RD)
        return total_SD / layout.lengths_on_device(modality).to(rows_RD.dtype)[:, None]


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
        pretrained=pretrained and config.model.init is None,
        arrays={name: array.shape for name, array in config.data.arrays.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        student = Student(config.model, context)
        with torch.no_grad():
            _init_new_parts(student, config.seed, config.model.init_deviation)
            # An export brings all of it: other sources would be overwritten, and need not be there.
            if pretrained and config.model.init is not None:
                init_everything(student, config.model)
            elif pretrained:
                init_from_sources(student.layers, config.model)
                init_encoders(student.encoders, config.model)
    freeze(student, config.model.freeze, "model.freeze")
    return student


def _init_new_parts(student: Student, seed: int, deviation: float) -> None:
    """Draw everything that is ours at random; a backbone brings its own weights or its library's initialisation."""
    init_random(student.layers, seed, "layers", deviation)
    init_random(student.projection, seed, "projection", deviation)
    if student.token_types is not None:
        init_random(student.token_types, seed, "token_types", deviation)
    for modality, encoder in student.encoders.items():
        for name, child in encoder.named_children():
            if name not in LIBRARY_PARTS:
                init_random(child, seed, f"encoders.{modality}.{name}", deviation)
