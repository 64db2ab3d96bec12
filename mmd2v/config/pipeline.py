"""A pipeline file: stages that are trained one after another, each from the exports of those before it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from mmd2v.config.load import dump_config, expand_variables, load_config, read_yaml_file
from mmd2v.config.schema import Config
from mmd2v.config.section import Section
from mmd2v.errors import UserError, nearest

STAGES_KEY = "stages"
EXPORT_FOLDER = "export"


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

    def __init__(self, name: str, run_dir: Path, file: Path, config: StageConfig, overrides: Sequence[str]) -> None:
        self.name = name
        self.run_dir = run_dir / name
        self.export = self.run_dir / EXPORT_FOLDER
        self._file = file
        self._config = config
        self._overrides = overrides

    def load(self, exports: dict[str, str]) -> Config:
        """Return the stage's run; ``exports`` is variable → folder of the earlier stages. Raises UserError."""
        overrides = [*self._overrides, f"--run_dir={self.run_dir}"]
        return load_config(self._file, overrides, self._config.scale, settings=self._config.set, variables=exports)

    @property
    def variable(self) -> str:
        """The variable that stands for this stage's export in later ones."""
        return f"STAGE_{self.name.upper()}"


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
    folder = Path(run_dir or expand_variables(pipeline.run_dir, f"{path}: run_dir"))
    stages = []
    for name, stage in pipeline.stages.items():
        if not name.isidentifier():
            raise UserError(f"{path}: stages: found the name '{name}'; expected letters, digits and underscores")
        stage = stage if scale is None else stage.model_copy(update={"scale": scale})
        stages.append(Stage(name, folder, path.parent / stage.config, stage, of_stage[name]))
    return stages


def config_digest(config: Config) -> str:
    """SHA-256 of what a config says, its folders included."""
    return hashlib.sha256(dump_config(config).encode()).hexdigest()


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
        if flag == "--run_dir":
            run_dir = value
        elif name in of_stage and key:
            of_stage[name].append(f"--{key}={value}")
        else:
            raise UserError(
                f"{flag}: in a pipeline an override names its stage, --STAGE.{name} VALUE; stages: {', '.join(stages)}."
                f"{nearest(name, stages)}"
            )
    return run_dir, of_stage
