"""Everything a run is made of besides its data: tokenizer, teachers, train module, engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmd2v.config.schema import Config
from mmd2v.data.stored_outputs import StoredOutputs
from mmd2v.data.tokenizers import Tokenizer, load_tokenizer
from mmd2v.distributed.environment import World
from mmd2v.errors import UserError
from mmd2v.models.checkpoints.student import FAIRSEQ_FIRST_POSITION
from mmd2v.models.student import Student, build_student
from mmd2v.models.teachers import Teacher, build_teachers
from mmd2v.objectives import build_objectives
from mmd2v.train.engine import Engine, build_engine
from mmd2v.train.module import TrainModule
from mmd2v.train.replay import Source

_PADDED_VOCABULARY = 1.1
"""Rows a tokenizer's id beyond which a table belongs to another one; models round their tables up to even sizes."""


@dataclass(frozen=True)
class Parts:
    """The parts of a run on this rank."""

    tokenizer: Tokenizer | None
    teachers: dict[str, Teacher]
    module: TrainModule
    outputs: tuple[StoredOutputs, ...] = ()
    """What the loader reads for the teachers that are replayed."""

    @property
    def student(self) -> Student:
        """The student, without the objectives."""
        return self.module.student

    @property
    def uses_images(self) -> bool:
        """Whether the student or a teacher that runs sees images."""
        replayed = {stored.teacher for stored in self.outputs}
        live = [teacher for name, teacher in self.teachers.items() if name not in replayed]
        return "image" in self.student.inputs.values() or any(teacher.modality == "image" for teacher in live)

    def doubts(self, config: Config) -> list[str]:
        """What is allowed and most likely a mistake, and would ruin the model without an error."""
        return [*self._doubtful_ids(), *_doubtful_positions(config)]

    def _doubtful_ids(self) -> list[str]:
        if self.tokenizer is None:
            return []
        tables = {f"model.encoders.{name}": encoder for name, encoder in self.student.encoders.items()}
        tables |= {f"teachers.{name}": teacher for name, teacher in self.teachers.items()}
        found = []
        for where, part in tables.items():
            rows, ids = getattr(part, "vocab_size", None), self.tokenizer.vocab_size
            if rows is not None and rows > _PADDED_VOCABULARY * ids:
                found.append(
                    f"data.tokenizer has {ids:,} ids, the embedding table of {where} {rows:,} rows: expected the "
                    "tokenizer that it was trained with"
                )
        return found

    def engine(self, config: Config, world: World) -> Engine:
        """Hand the train module to DeepSpeed (once: from then on its parameters belong to the engine)."""
        return build_engine(config, world, self.module)


def build_parts(config: Config, world: World, sources: Mapping[str, Source] | None = None) -> Parts:
    """Build tokenizer, student, frozen teachers and objectives.

    ``sources`` says which teachers are replayed, see `choose_sources`; none is without it. Raises UserError for
    whatever does not fit.
    """
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    student = build_student(config, tokenizer)
    outputs = tuple(source.stored for source in (sources or {}).values() if source.stored is not None)
    replayed = {stored.teacher: stored.annotation for stored in outputs}
    teachers = build_teachers(config, world.device, tokenizer, replayed, student)
    objectives = build_objectives(config, student, teachers)
    for name, needs in objectives.needs.items():
        teachers[name].prepare(needs, f"teachers.{name}.name")
    encoded_by = _share_encoders(config, student, teachers)
    autocast = config.engine.precision == "bf16_autocast"
    return Parts(tokenizer, teachers, TrainModule(student, objectives, autocast, encoded_by), outputs)


def _doubtful_positions(config: Config) -> list[str]:
    """Positions that a text model was not trained with."""
    found = []
    for name, encoder in config.model.encoders.items():
        source = config.model.sources.get(str(getattr(encoder, "weights", "")), getattr(encoder, "weights", None))
        first = getattr(encoder, "first_position", None)
        if str(source).startswith("data2vec2-text:") and first != FAIRSEQ_FIRST_POSITION:
            found.append(
                f"model.encoders.{name}.first_position is {first}, data2vec 2.0 counts positions from "
                f"{FAIRSEQ_FIRST_POSITION}"
            )
    return found


def _share_encoders(config: Config, student: Student, teachers: Mapping[str, Teacher]) -> dict[str, str]:
    """Let teachers run a copy of the student's frozen encoder; return modality → teacher."""
    encoded_by: dict[str, str] = {}
    for name, teacher_config in config.teachers.items():
        modality, where = teacher_config.shared_encoder, f"teachers.{name}.shared_encoder"
        if modality is None:
            continue
        if modality in encoded_by:
            raise UserError(f"{where}: '{modality}' is shared with the teacher '{encoded_by[modality]}' already")
        encoder = config.model.encoders[modality]
        trained = [name for name, p in student.encoders[modality].named_parameters() if p.requires_grad]
        if trained:
            raise UserError(
                f"{where}: model.encoders.{modality} is trained ({', '.join(trained[:3])}); set its frozen: true, and "
                f'model.freeze: ["encoders.{modality}.*"] for what is added to a backbone'
            )
        for noise in ("dropout", "token_drop"):
            if getattr(encoder, noise):
                raise UserError(
                    f"{where}: model.encoders.{modality}.{noise} is {getattr(encoder, noise)}, but the teacher sees "
                    "what the student sees; set it to 0"
                )
        teachers[name].share_encoder(student.encoders[modality], where)
        encoded_by[modality] = name
    return encoded_by
