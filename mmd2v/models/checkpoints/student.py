"""A converted data2vec 2.0 checkpoint as a model of our own architecture."""

from __future__ import annotations

from mmd2v.config.schema import (
    ImageTransformConfig,
    LayerConfig,
    ModelConfig,
    PatchEncoderConfig,
    ProjectionConfig,
    TokenEncoderConfig,
)
from mmd2v.models.checkpoints.converted import Architecture, load_state, read_architecture
from mmd2v.models.encoders import EncoderContext
from mmd2v.models.student import Student
from mmd2v.models.timm_backbone import load_exactly

FAIRSEQ_FIRST_POSITION = 2
"""fairseq counts positions from its padding index + 1."""

_Triple = tuple[float, float, float] | None


def converted_student(
    family: str, folder: str, where: str, mean: _Triple = None, std: _Triple = None
) -> tuple[Student, Architecture]:
    """Return the model of a converted folder, in eval mode, and its architecture.

    ``mean`` and ``std`` replace ImageNet's. Raises UserError, beginning with ``where``, for a folder that is none.
    """
    architecture = read_architecture(folder, family, where)
    student = student_of(family, architecture, where, mean, std)
    load_exactly(student, load_state(folder, family, where), f"{where}: the weights in {folder} do not fit its config")
    return student.eval(), architecture


def student_of(
    family: str, architecture: Architecture, where: str, mean: _Triple = None, std: _Triple = None
) -> Student:
    """Return the model of a data2vec 2.0 architecture with random weights."""
    usual = ImageTransformConfig()
    context = EncoderContext(
        width=architecture.width,
        image_size=architecture.image_size or usual.size,
        image_mean=mean or usual.mean,
        image_std=std or usual.std,
        vocab_size=architecture.vocab_size,
        max_length=None if architecture.positions is None else architecture.positions - FAIRSEQ_FIRST_POSITION,
        pretrained=False,
        where=where,
    )
    return Student(_model_config(architecture, family.rpartition("-")[2]), context)


def _model_config(architecture: Architecture, modality: str) -> ModelConfig:
    encoder: PatchEncoderConfig | TokenEncoderConfig
    if modality == "image":
        assert architecture.patch_size is not None
        encoder = PatchEncoderConfig(
            patch_size=architecture.patch_size, positions="sincos", norm=True, norm_eps=architecture.eps
        )
    else:
        encoder = TokenEncoderConfig(norm=True, norm_eps=architecture.eps, first_position=FAIRSEQ_FIRST_POSITION)
    return ModelConfig(
        width=architecture.width,
        heads=architecture.heads,
        encoders={modality: encoder},
        layers=[
            LayerConfig(
                kind="separate",
                count=architecture.depth,
                norm="post",
                eps=architecture.eps,
                mlp_ratio=architecture.mlp_ratio,
            )
        ],
        final_norm=False,
        projection=ProjectionConfig(kind="none"),
    )
