"""Everything a run is made of besides its data: tokenizer, teachers, train module, engine."""

from __future__ import annotations

from dataclasses import dataclass

from mmd2v.config.schema import Config
from mmd2v.data.tokenizers import Tokenizer, load_tokenizer
from mmd2v.distributed.environment import World
from mmd2v.models.student import Student, build_student
from mmd2v.models.teachers import Teacher, build_teachers
from mmd2v.objectives import build_objectives
from mmd2v.train.engine import Engine, build_engine
from mmd2v.train.module import TrainModule


@dataclass(frozen=True)
class Parts:
    """The parts of a run on this rank."""

    tokenizer: Tokenizer | None
    teachers: dict[str, Teacher]
    module: TrainModule

    @property
    def student(self) -> Student:
        """The student, without the objectives."""
        return self.module.student

    def engine(self, config: Config, world: World) -> Engine:
        """Hand the train module to DeepSpeed (once: from then on its parameters belong to the engine)."""
        return build_engine(config, world, self.module)


def build_parts(config: Config, world: World) -> Parts:
    """Build tokenizer, student, frozen teachers and objectives. Raises UserError for whatever does not fit."""
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    student = build_student(config, tokenizer)
    teachers = build_teachers(config, world.device, tokenizer)
    objectives = build_objectives(config, student, teachers)
    autocast = config.engine.precision == "bf16_autocast"
    return Parts(tokenizer, teachers, TrainModule(student, objectives, autocast))
