"""A pipeline file: stages that are trained one after another, each from the exports of those before it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from mmd2v.config.load import dump_config, load_config, read_yaml_file
from mmd2v.config.schema import Config
from mmd2v.config.section import Section
from mmd2v.config.variables import expand_variables
from mmd2v.errors import UserError, nearest

STAGES_KEY = "stages"
EXPORT_FOLDER = "export"
RUN_DIR_KEY = "run_dir"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class StageConfig(Section):
    """One stage."""

    config: str = Field(description="its run's YAML file, relative to the pipeline's")
    scale: str | None = Field(None, description="one of that config's `scales`")
    set: dict[str, Any] = Field(
        default_factory=dict,
        description="dotted key → value, over the config. `${STAGE_NAME}` in the file and here stands for the export "
        "of an earlier stage NAME, in capitals",
    )


class PipelineConfig(Section):
    """A pipeline."""

    run_dir: str = Field(description="folder of the stages: STAGE holds a stage's run, STAGE/export what it exports")
    stages: dict[str, StageConfig] = Field(min_length=1, description="name → stage, in the order they are trained")


class Stage:
    """A stage that can be loaded once the exports of those before it are there."""

    def __init__(
        self, name: str, run_dir: Path, pipeline: Path, config: StageConfig, overrides: Sequence[str], scale: str | None
    ) -> None:
        """``scale`` was asked of every stage, and counts before the stage's own."""
        self.name = name
        self.run_dir = run_dir / name
        self.export = self.run_dir / EXPORT_FOLDER
        self._pipeline = pipeline
        self._config = config
        self._overrides = overrides
        self._scale = scale

    def load(self, exports: dict[str, str]) -> Config:
        """Return the stage's run; ``exports`` is variable → folder of the earlier stages. Raises UserError."""
        where = f"{self._pipeline}: {STAGES_KEY}.{self.name}"
        # A folder is text as it stands: neither YAML nor, a second time, something with variables.
        run_dir = str(self.run_dir).replace("${", "$${")
        return load_config(
            self._pipeline.parent / self._config.config,
            self._overrides,
            self._scale or self._config.scale,
            settings={**self._config.set, RUN_DIR_KEY: run_dir},
            variables=exports,
            scale_key="--scale" if self._scale else f"{where}.scale",
            settings_key=f"{where}.set",
        )

    @property
    def variable(self) -> str:
        """The variable that stands for this stage's export in later ones."""
        return _variable(self.name)


def is_pipeline(path: str | Path) -> bool:
    """Tell whether the YAML file describes stages rather than one run. Raises UserError when it cannot be read."""
    return STAGES_KEY in read_yaml_file(Path(path), "command line")


def load_pipeline(path: str | Path, overrides: Sequence[str] = (), scale: str | None = None) -> list[Stage]:
    """Read a pipeline.

    ``overrides`` are ``--STAGE.a.b value`` for a stage, and ``--run_dir FOLDER``; ``scale`` is asked of every stage.
    Raises UserError for keys, stages and files that are not there.
    """
    path = Path(path)
    data = read_yaml_file(path, "command line")
    try:
        pipeline = PipelineConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        hint = nearest(str(first["loc"][-1]), [*PipelineConfig.model_fields, *StageConfig.model_fields])
        raise UserError(f"{path}: {at}: {first['msg']}.{hint}") from None
    run_dir, of_stage = _split(overrides, list(pipeline.stages))
    folder = Path(run_dir or expand_variables(pipeline.run_dir, f"{path}: {RUN_DIR_KEY}"))
    _check_names(list(pipeline.stages), path)
    for name, stage in pipeline.stages.items():
        if RUN_DIR_KEY in stage.set:
            raise UserError(
                f"{path}: {STAGES_KEY}.{name}.set: found {RUN_DIR_KEY}; a stage's folder is {folder / name}, expected "
                f"the pipeline's own {RUN_DIR_KEY} alone"
            )
    return [Stage(name, folder, path, stage, of_stage[name], scale) for name, stage in pipeline.stages.items()]


def config_digest(config: Config) -> str:
    """SHA-256 of what a config says, its folders included."""
    return hashlib.sha256(dump_config(config).encode()).hexdigest()


def _variable(name: str) -> str:
    return f"STAGE_{name.upper()}"


def _check_names(names: Sequence[str], path: Path) -> None:
    """Raise a UserError where no variable, or not one of its own, can stand for a stage."""
    seen: dict[str, str] = {}
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{path}: {STAGES_KEY}: found the name '{name}'; expected letters from a to z, digits and underscores, "
                "no digit first"
            )
        other = seen.setdefault(_variable(name), name)
        if other != name:
            raise UserError(
                f"{path}: {STAGES_KEY}: '{other}' and '{name}' would both be ${{{_variable(name)}}}; expected names "
                "that differ in more than capitals"
            )


def _split(overrides: Sequence[str], stages: Sequence[str]) -> tuple[str | None, dict[str, list[str]]]:
    run_dir: str | None = None
    of_stage: dict[str, list[str]] = {name: [] for name in stages}
    rest = list(overrides)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not equals:
            if not rest:
                raise UserError(f"{flag}: a value is missing; write {flag} VALUE")
            value = rest.pop(0)
        name, _, key = flag.removeprefix("--").partition(".")
        if flag == f"--{RUN_DIR_KEY}":
            run_dir = value
        elif key == RUN_DIR_KEY and name in of_stage:
            raise UserError(f"{flag}: a stage's folder lies in the pipeline's; write --{RUN_DIR_KEY} FOLDER")
        elif name in of_stage and key:
            of_stage[name].append(f"--{key}={value}")
        else:
            raise UserError(
                f"{flag}: in a pipeline an override names its stage, --STAGE.{name} VALUE; stages: {', '.join(stages)}."
                f"{nearest(name, stages)}"
            )
    return run_dir, of_stage
