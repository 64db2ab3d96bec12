"""The one description of a run. Every key a YAML file may hold is a field here or in a section's file beside it."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from mmd2v.config.contradictions import check_contradictions
from mmd2v.config.data import (
    ArrayConfig,
    DamageConfig,
    DataConfig,
    ImageTransformConfig,
    MixedSetConfig,
    ShardsConfig,
    SourceConfig,
    TokenizerConfig,
    TrainSetConfig,
)
from mmd2v.config.data2vec import DecoderConfig, EMAConfig, MaskingConfig
from mmd2v.config.model import (
    AnyEncoder,
    EncoderConfig,
    HFTextEncoderConfig,
    InitConfig,
    LayerConfig,
    ModelConfig,
    PatchEncoderConfig,
    ProjectionConfig,
    TimmEncoderConfig,
    TokenEncoderConfig,
)
from mmd2v.config.objectives import (
    AnyObjective,
    AttributesConfig,
    ClassificationConfig,
    CLSRegressionConfig,
    ContrastiveConfig,
    ContrastiveTargetConfig,
    Data2VecConfig,
    LayerResultsConfig,
    MatchingConfig,
    ObjectiveConfig,
    SigLIPConfig,
    TeacherConfig,
    TokenRegressionConfig,
)
from mmd2v.config.section import (
    Fraction,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Rate,
    Section,
    Triple,
)
from mmd2v.config.training import (
    BestConfig,
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    KnnEvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    PairsEvaluationConfig,
    ParameterGroupConfig,
    Precision,
    StabilityConfig,
)
from mmd2v.errors import nearest

__all__ = [
    "AnyEncoder",
    "AnyObjective",
    "ArrayConfig",
    "AttributesConfig",
    "BestConfig",
    "CLSRegressionConfig",
    "CheckpointConfig",
    "ClassificationConfig",
    "Config",
    "ContrastiveConfig",
    "ContrastiveTargetConfig",
    "DamageConfig",
    "Data2VecConfig",
    "DataConfig",
    "DecoderConfig",
    "EMAConfig",
    "EncoderConfig",
    "EngineConfig",
    "EvaluationConfig",
    "Fraction",
    "HFTextEncoderConfig",
    "ImageTransformConfig",
    "InitConfig",
    "KnnEvaluationConfig",
    "LayerConfig",
    "LayerResultsConfig",
    "LoggingConfig",
    "MaskingConfig",
    "MatchingConfig",
    "MixedSetConfig",
    "ModelConfig",
    "NonNegativeInt",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PairsEvaluationConfig",
    "ParameterGroupConfig",
    "PatchEncoderConfig",
    "Positive",
    "PositiveInt",
    "Precision",
    "ProjectionConfig",
    "Rate",
    "Section",
    "ShardsConfig",
    "SigLIPConfig",
    "SourceConfig",
    "StabilityConfig",
    "TeacherConfig",
    "TimmEncoderConfig",
    "TokenEncoderConfig",
    "TokenRegressionConfig",
    "TokenizerConfig",
    "TrainSetConfig",
    "Triple",
]


class Config(Section):
    """One run."""

    name: str = Field(description="name of the run")
    run_dir: str = Field(description="folder that receives config, metrics and checkpoints")
    seed: int = Field(0, ge=0, description="seed of initialisation, data order, augmentation and dropout")
    steps: NonNegativeInt | None = Field(
        None, description="optimiser steps; give this or `epochs`. 0 measures and keeps the model as it starts"
    )
    epochs: float | None = Field(None, gt=0, description="passes over data.train; give this or `steps`")
    data: DataConfig = Field(description="where samples come from")
    model: ModelConfig = Field(description="the student")
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict, description="name → frozen teacher")
    objectives: list[AnyObjective] = Field(min_length=1, description="terms of the loss, summed with their weights")
    optimizer: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="optimiser and learning-rate schedule"
    )
    engine: EngineConfig = Field(default_factory=EngineConfig, description="how a step is computed on the ranks")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="what is kept of the run")
    stability: StabilityConfig = Field(
        default_factory=StabilityConfig, description="what is done when the loss is no number or jumps"
    )
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="what is measured during training"
    )
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="what a person sees")

    @model_validator(mode="before")
    @classmethod
    def _tokens_replace_samples(cls, values: Any) -> Any:
        """Under data.batch_tokens the default of engine.batch_size does not count; a number that was written does."""
        if not isinstance(values, dict):
            return values
        data, engine = values.get("data"), values.get("engine", {})
        if isinstance(data, dict) and data.get("batch_tokens") is not None and isinstance(engine, dict):
            return {**values, "engine": {"batch_size": None, **engine}}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        modalities = set(self.model.encoders)
        for where, names in self._modality_references():
            for name in names:
                if name not in modalities:
                    raise ValueError(f"{where}: '{name}' is no modality; model.encoders has {sorted(modalities)}")
        for i, objective in enumerate(self.objectives):
            if (teacher := getattr(objective, "teacher", None)) is not None:
                # The student's own encoder has a pooled feature, and nothing else that could be learned.
                encoder_too = isinstance(objective, CLSRegressionConfig)
                self._check_teacher(teacher, f"objectives.{i}.teacher", encoder_too)
            if isinstance(objective, MatchingConfig) and self.model.joint_from is None:
                raise ValueError(
                    f"objectives.{i}: matching needs model.joint_from, the first layer that an image and its text "
                    "pass as one sequence; it is null"
                )
            if isinstance(objective, AttributesConfig | ClassificationConfig):
                if self.data.labels is None:
                    raise ValueError(f"objectives.{i}: the {objective.kind} objective needs data.labels")
                if objective.classes != self.label_classes:
                    raise ValueError(
                        f"objectives.{i}.classes: found {objective.classes}, but another objective reads the same "
                        f"labels as {self.label_classes} classes"
                    )
        inputs = ["image", "text", *self.data.arrays]
        for name, encoder in self.model.encoders.items():
            if encoder.input not in inputs:
                raise ValueError(
                    f"model.encoders.{name}.input: found '{encoder.input}'; expected image, text or a name in "
                    f"data.arrays ({', '.join(self.data.arrays) or 'which is empty'})."
                    f"{nearest(encoder.input, inputs)}"
                )
        needs_text = any(encoder.input == "text" for encoder in self.model.encoders.values())
        if needs_text and self.data.tokenizer is None:
            raise ValueError("data.tokenizer: missing, but model.encoders has a text modality")
        self._check_batch_unit()
        self._check_masking()
        check_contradictions(self)
        return self

    def _check_masking(self) -> None:
        """Clones with hidden tokens take a modality's place in training: only the objective made for them sees it."""
        masked = self.model.masking
        for i, objective in enumerate(self.objectives):
            if isinstance(objective, Data2VecConfig):
                if objective.modality not in masked:
                    raise ValueError(
                        f"objectives.{i}.modality: '{objective.modality}' has no hidden tokens to predict; set "
                        f"model.masking.{objective.modality}"
                    )
                continue
            own = getattr(objective, "modality", None)
            several = getattr(objective, "modalities", None) or getattr(objective, "between", None)
            seen = [own] if own else list(several or self.model.encoders)
            for name in set(seen) & set(masked):
                raise ValueError(
                    f"objectives.{i}: {objective.kind} sees '{name}', whose tokens model.masking hides; expected "
                    "data2vec, or other modalities"
                )
        for name, teacher in self.teachers.items():
            modality = teacher.averaged
            if modality is None:
                continue
            if modality not in self.model.encoders:
                raise ValueError(
                    f"teachers.{name}.name: '{teacher.name}' averages no modality; model.encoders has "
                    f"{sorted(self.model.encoders)}"
                )
            if teacher.modality != self.model.encoders[modality].input:
                raise ValueError(
                    f"teachers.{name}.modality: found {teacher.modality}, but '{modality}' sees "
                    f"{self.model.encoders[modality].input}"
                )

    def _check_batch_unit(self) -> None:
        """A step is counted in samples or in tokens."""
        engine, tokens = self.engine, self.data.batch_tokens
        if tokens is None:
            if engine.batch_size is None:
                raise ValueError("engine.batch_size: missing; expected a number of samples, or data.batch_tokens")
            return
        for name in ("batch_size", "micro_batch_size"):
            if getattr(engine, name) is not None:
                instead = "data.batch_tokens" if name == "batch_size" else "data.micro_batch_tokens"
                raise ValueError(
                    f"engine.{name}: found {getattr(engine, name)} beside data.batch_tokens {tokens}; a step is "
                    f"counted in samples or in tokens: set engine.{name} to null ({instead} says it), or "
                    "data.batch_tokens"
                )
        if self.uses_images:
            raise ValueError(
                "data.batch_tokens: this run uses images (model.encoders, or a teacher without `modality: text`), "
                "expected text alone; give engine.batch_size instead"
            )
        if self.array_inputs:
            raise ValueError(
                f"data.batch_tokens: model.encoders sees arrays ({', '.join(self.array_inputs)}), expected text "
                "alone; give engine.batch_size instead"
            )
        if self.data.tokenizer is None:
            raise ValueError("data.tokenizer: missing, but data.batch_tokens counts its tokens")
        for objective in self.objectives:
            if isinstance(objective, ContrastiveConfig | SigLIPConfig | ContrastiveTargetConfig):
                raise ValueError(
                    f"data.batch_tokens: the {objective.kind} objective needs batches of a fixed number of samples"
                )

    @property
    def label_classes(self) -> int | None:
        """Length of the label vectors that objectives read, attributes or classification; None without one."""
        kinds = AttributesConfig | ClassificationConfig
        return next((o.classes for o in self.objectives if isinstance(o, kinds)), None)

    @property
    def array_inputs(self) -> dict[str, ArrayConfig]:
        """Name → array that an encoder sees."""
        inputs = {encoder.input for encoder in self.model.encoders.values()}
        return {name: array for name, array in self.data.arrays.items() if name in inputs}

    @property
    def uses_images(self) -> bool:
        """Whether the student or a teacher sees images."""
        inputs = [encoder.input for encoder in self.model.encoders.values()]
        return "image" in inputs or any(teacher.modality == "image" for teacher in self.teachers.values())

    def _check_teacher(self, name: str, where: str, encoder_too: bool) -> None:
        kind, _, modality = name.partition(":")
        if name not in self.teachers and not (kind == "encoder" and encoder_too):
            nor = ", nor encoder:MODALITY" if encoder_too else ""
            raise ValueError(f"{where}: '{name}' is not among teachers {sorted(self.teachers)}{nor}")
        if name not in self.teachers:
            encoder = self.model.encoders.get(modality)
            if not (isinstance(encoder, TimmEncoderConfig) and encoder.frozen and encoder.feature == -1):
                raise ValueError(
                    f"{where}: '{name}' needs a frozen timm encoder with feature -1 under model.encoders.{modality}"
                )

    def _modality_references(self) -> list[tuple[str, list[str]]]:
        found = [(f"model.layers.{i}.modalities", layer.modalities or []) for i, layer in enumerate(self.model.layers)]
        found.append(("model.pooling", list(self.model.pooling)))
        found.append(("model.masking", list(self.model.masking)))
        for i, layer in enumerate(self.model.layers):
            owners = ("shared", "joint")  # of weights that no modality owns alone
            found.append((f"model.layers.{i}.init", [m for m in layer.init if m not in owners]))
            if isinstance(layer.eps, dict):
                found.append((f"model.layers.{i}.eps", [m for m in layer.eps if m not in owners]))
        for name, teacher in self.teachers.items():
            found.append(
                (f"teachers.{name}.shared_encoder", [teacher.shared_encoder] if teacher.shared_encoder else [])
            )
        for i, objective in enumerate(self.objectives):
            found.append((f"objectives.{i}.modalities", getattr(objective, "modalities", [])))
            if hasattr(objective, "modality"):
                found.append((f"objectives.{i}.modality", [objective.modality]))
            found.append((f"objectives.{i}.between", list(getattr(objective, "between", None) or ())))
        return found
