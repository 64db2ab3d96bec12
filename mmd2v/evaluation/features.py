"""What an exported encoder says of images and texts: its embedding, or vectors before the projection.

Shapes: B images, N texts, E width of an embedding, D width of the student, R rows of all texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from mmd2v.data.batch import Batch
from mmd2v.errors import UserError, unknown_name
from mmd2v.inference import Encoder, ImageInput
from mmd2v.models.student import StudentOutput

ImageFeature = Literal["embedding", "pooled"]
"""embedding: what retrieval compares; pooled: the vector before the projection."""

TextPooling = Literal["embedding", "cls", "mean"]
"""embedding: what retrieval compares; cls, mean: of the last layer, after the final norm, over real tokens."""


def modality_of(encoder: Encoder, kind: str, what: str) -> str:
    """Return the encoder's modality with ``kind`` of input. Raises UserError, naming ``what`` needs it, for none."""
    for name, of_kind in encoder.student.inputs.items():
        if of_kind == kind:
            return name
    raise UserError(f"{what} needs {kind} input, but this encoder has {', '.join(encoder.student.inputs)} alone")


def image_features(
    encoder: Encoder, images: Sequence[ImageInput], feature: ImageFeature = "embedding", batch_size: int = 64
) -> torch.Tensor:
    """Return fp32 [B, E or D] of images, L2-normalised; they are resized as evaluation does it."""
    if feature not in get_args(ImageFeature):
        raise unknown_name("features", feature, get_args(ImageFeature))
    if feature == "embedding":
        return encoder.encode_image(images, batch_size)
    name = modality_of(encoder, "image", "features of images")
    nothing = torch.zeros(0, dtype=torch.int64, device=encoder.device)
    parts = [torch.zeros(0, encoder.config.model.width, device=encoder.device)]
    with ThreadPoolExecutor() as threads:
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size]
            pixels = torch.stack(list(threads.map(encoder.preprocess, chunk, range(start, start + len(chunk)))))
            batch = Batch(pixels.to(encoder.device), nothing.int(), torch.zeros(0, dtype=torch.int32), nothing)
            parts.append(F.normalize(_outputs(encoder, batch, name).pooled[name].float(), dim=-1))
    return torch.cat(parts)


def text_features(
    encoder: Encoder, texts: Sequence[str], pooling: TextPooling = "embedding", batch_size: int = 256
) -> torch.Tensor:
    """Return fp32 [N, E or D] of texts, L2-normalised."""
    if pooling not in get_args(TextPooling):
        raise unknown_name("pooling", pooling, get_args(TextPooling))
    if pooling == "embedding":
        return encoder.encode_text(texts, batch_size)
    name = modality_of(encoder, "text", "features of texts")
    assert encoder.tokenizer is not None  # an encoder of texts has one
    images = torch.zeros(0, 3, 1, 1, dtype=torch.uint8, device=encoder.device)
    parts = [torch.zeros(0, encoder.config.model.width, device=encoder.device)]
    for start in range(0, len(texts), batch_size):
        ids_R, lengths_N = encoder.tokenizer.encode_batch(texts[start : start + batch_size])
        owner_N = torch.zeros(len(lengths_N), dtype=torch.int64, device=encoder.device)
        ids = torch.from_numpy(ids_R).to(encoder.device)
        output = _outputs(encoder, Batch(images, ids, torch.from_numpy(lengths_N), owner_N), name)
        parts.append(F.normalize(_pool(encoder, output, name, pooling), dim=-1))
    return torch.cat(parts)


def _outputs(encoder: Encoder, batch: Batch, modality: str) -> StudentOutput:
    with torch.no_grad(), encoder.autocast():
        return encoder.student(batch, (modality,))


def _pool(encoder: Encoder, output: StudentOutput, modality: str, pooling: str) -> torch.Tensor:
    """Return fp32 [N, D] of the last layer's rows."""
    if output.tokens is None:
        raise UserError(f"pooling '{pooling}' needs the rows of the last layer, which this encoder does not give")
    rows_RD, layout = output.tokens[modality], output.tokens.layout
    with torch.no_grad():
        if pooling == "cls":
            return encoder.student.norm(rows_RD[layout.first_rows(modality)].float())
        rows_RD = encoder.student.norm(rows_RD.float())
    lengths_N = layout.lengths_on_device(modality)
    total_ND = rows_RD.new_zeros(len(lengths_N), rows_RD.shape[1])
    return total_ND.index_add(0, layout.sequence_of_row(modality), rows_RD) / lengths_N[:, None]
