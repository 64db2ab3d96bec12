"""What a model says of images and texts: its embedding, or of our exports vectors before the projection.

Shapes: B images, N texts, E width of an embedding, D width of the student, R rows of all texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F

from mmd2v.data.batch import Batch
from mmd2v.errors import UserError, unknown_name
from mmd2v.evaluation.models.base import RetrievalModel
from mmd2v.evaluation.text_models import HFTextModel
from mmd2v.inference import Encoder, ImageInput
from mmd2v.models.packed import Packed
from mmd2v.models.student import StudentOutput

ImageFeature = Literal["embedding", "pooled"]
"""embedding: what retrieval compares; pooled: the vector before the projection."""

TextPooling = Literal["embedding", "cls", "mean", "mean_padded"]
"""embedding: what retrieval compares; cls, mean: of the last layer, after the final norm, over real tokens;
mean_padded: over the rows of padding too, where the encoder computes any."""


def require(model: RetrievalModel, kind: str, what: str) -> None:
    """Raise UserError, naming ``what`` needs it, for an export without this ``kind`` of input; others tell it later."""
    if isinstance(model, Encoder):
        modality_of(model, kind, what)


def modality_of(encoder: Encoder, kind: str, what: str) -> str:
    """Return the encoder's modality with ``kind`` of input. Raises UserError, naming ``what`` needs it, for none."""
    for name, of_kind in encoder.student.inputs.items():
        if of_kind == kind:
            return name
    raise UserError(f"{what} needs {kind} input, but this encoder has {', '.join(encoder.student.inputs)} alone")


def image_features(
    encoder: RetrievalModel, images: Sequence[ImageInput], feature: ImageFeature = "embedding", batch_size: int = 64
) -> torch.Tensor:
    """Return fp32 [B, E or D] of images, L2-normalised; they are resized as evaluation does it.

    Raises UserError for another feature, or one but the embedding of a model that is no export of ours.
    """
    if feature not in get_args(ImageFeature):
        raise unknown_name("features", feature, get_args(ImageFeature))
    if feature == "embedding":
        return encoder.encode_image(images, batch_size)
    if not isinstance(encoder, Encoder):
        raise UserError(f"features '{feature}': only exports of `mmd2v export` have them, use embedding")
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
    encoder: RetrievalModel, texts: Sequence[str], pooling: TextPooling = "embedding", batch_size: int = 256
) -> torch.Tensor:
    """Return fp32 [N, E or D] of texts, L2-normalised.

    Raises UserError for another pooling, or one that the model does not offer.
    """
    if pooling not in get_args(TextPooling):
        raise unknown_name("pooling", pooling, get_args(TextPooling))
    if isinstance(encoder, HFTextModel):
        return encoder.features(texts, pooling, batch_size)
    if pooling == "embedding":
        return encoder.encode_text(texts, batch_size)
    if not isinstance(encoder, Encoder):
        raise UserError(f"pooling '{pooling}': exports and hf-text models have it, others the embedding alone")
    name = modality_of(encoder, "text", "features of texts")
    assert encoder.tokenizer is not None  # an encoder of texts has one
    images = torch.zeros(0, 3, 1, 1, dtype=torch.uint8, device=encoder.device)
    parts = [torch.zeros(0, encoder.config.model.width, device=encoder.device)]
    for start in range(0, len(texts), batch_size):
        ids_R, lengths_N = encoder.tokenizer.encode_batch(texts[start : start + batch_size])
        owner_N = torch.zeros(len(lengths_N), dtype=torch.int64, device=encoder.device)
        ids = torch.from_numpy(ids_R).to(encoder.device)
        output = _outputs(encoder, Batch(images, ids, torch.from_numpy(lengths_N), owner_N), name)
        if output.tokens is None:
            raise UserError(f"pooling '{pooling}' needs the rows of the last layer, which this encoder does not give")
        with torch.no_grad():
            normed = Packed(encoder.student.norm(output.tokens.x_TD.float()), output.tokens.layout)
            parts.append(F.normalize(pool_rows(normed, name, lengths_N, pooling), dim=-1))
    return torch.cat(parts)


def pool_rows(tokens: Packed, modality: str, real_N: np.ndarray, pooling: TextPooling) -> torch.Tensor:
    """Return [N, D] of the rows of a modality, of whose texts the first ``real_N`` [N] rows are no padding."""
    rows_RD, layout = tokens[modality], tokens.layout
    if pooling == "cls":
        return rows_RD[layout.first_rows(modality)]
    counted_N = layout.lengths[modality]
    owner_R = layout.sequence_of_row(modality)
    if pooling == "mean_padded":
        if len(counted_N) > 1 and counted_N.min() < counted_N.max():
            raise UserError(
                "pooling 'mean_padded' needs rows of padding, which this encoder does not compute; expected an export "
                "whose text encoder pads its texts, or pooling cls, mean or embedding"
            )
    else:
        is_real_R = layout.position_of_row(modality) < torch.from_numpy(real_N).to(owner_R)[owner_R]
        rows_RD, owner_R, counted_N = rows_RD[is_real_R], owner_R[is_real_R], real_N
    total_ND = rows_RD.new_zeros(len(counted_N), rows_RD.shape[1]).index_add(0, owner_R, rows_RD)
    return total_ND / torch.from_numpy(counted_N).to(total_ND)[:, None]


def _outputs(encoder: Encoder, batch: Batch, modality: str) -> StudentOutput:
    with torch.no_grad(), encoder.autocast():
        return encoder.student(batch, (modality,))
