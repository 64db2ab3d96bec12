"""From a run's checkpoint to a self-contained folder that `mmd2v.load` opens.

The folder holds ``model.safetensors`` (fp32), ``config.yaml`` (paths relative to the folder, none of the machine the
run was on), ``tokenizer/``, ``encoders/NAME/config.json`` for each Hugging Face encoder, and ``README.md``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from mmd2v.config.load import dump_config, load_config
from mmd2v.config.schema import Config, EncoderConfig, InitConfig, LayerConfig, SourceConfig, TrainSetConfig
from mmd2v.data.addresses import display
from mmd2v.data.tokenizers import Tokenizer, load_tokenizer
from mmd2v.errors import UserError, nearest
from mmd2v.files import atomic_path, write_text
from mmd2v.models.exported import CONFIG_FILE, WEIGHTS_FILE
from mmd2v.models.student import Student, build_student
from mmd2v.models.timm_backbone import load_exactly
from mmd2v.report.model_card import Training, model_card
from mmd2v.train.averages import read_averages
from mmd2v.train.best import find_best
from mmd2v.train.checkpoints.folders import complete_checkpoints
from mmd2v.train.checkpoints.manifest import MANIFEST, read_manifest
from mmd2v.train.consolidate import consolidate
from mmd2v.train.metrics import METRICS_FILE, read_metrics

Which = Literal["newest", "best"]
"""Which checkpoint of a run: the newest, or the best by its `checkpoint.best`."""

_STUDENT = "student."
_TOKENIZER_FOLDER = "tokenizer"
_ENCODERS_FOLDER = "encoders"


def export(source: str | Path, out: str | Path, average: bool = False, which: Which = "newest") -> Path:
    """Write the export of a run or of one checkpoint folder to ``out``; return ``out``.

    ``average`` takes what the run's `ema:MODALITY` teachers hold in place of the student's own weights; ``which`` is
    the checkpoint of a run. Raises UserError when ``source`` is neither, the run has no such checkpoint, its weights
    do not fit its config, or ``out`` exists.
    """
    source, out = Path(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} exists; name a new folder or remove it")
    checkpoint = checkpoint_of(source, which)
    run = checkpoint.resolve().parent.parent
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{checkpoint}: found no {run / CONFIG_FILE}; a checkpoint is exported from inside its run")
    config = load_config(run / CONFIG_FILE)
    state = consolidate(checkpoint)
    tokenizer = None if config.data.tokenizer is None else load_tokenizer(config.data.tokenizer)
    student = build_student(config, tokenizer, pretrained=False)
    weights = {name.removeprefix(_STUDENT): value for name, value in state.items() if name.startswith(_STUDENT)}
    if average:
        weights |= {key.partition("/")[2]: value for key, value in read_averages(checkpoint).items()}
    load_exactly(student, weights, f"{checkpoint}: its weights are of another architecture than its config")
    write_export(out, student, config, tokenizer, training_record(run, checkpoint))
    return out


def checkpoint_of(source: Path, which: Which = "newest") -> Path:
    """Return the checkpoint folder that ``source`` is, or the newest or best complete one of the run it is.

    Raises UserError when it is neither, when a single checkpoint is asked for its best, and for a run that has
    measured none as the best.
    """
    if not source.is_dir():
        siblings = [entry.name for entry in source.parent.iterdir()] if source.parent.is_dir() else []
        raise UserError(f"{source}: no such folder, expected a run or a checkpoint.{nearest(source.name, siblings)}")
    if (source / MANIFEST).is_file():
        if which == "best":
            raise UserError(f"--checkpoint: {source} is a checkpoint itself; name its run to take the best of it")
        return source
    if (source / WEIGHTS_FILE).is_file():
        raise UserError(f"{source}: this is an export already, expected a run or a checkpoint")
    found = complete_checkpoints(source / "checkpoints")
    if not found:
        raise UserError(f"{source}: expected a run or a checkpoint, found no complete checkpoint in it")
    return _best_checkpoint(source) if which == "best" else found[-1][1]


def _best_checkpoint(run: Path) -> Path:
    """Return the best checkpoint by what the run has recorded: unlike ``best.json`` that is whole after any kill."""
    settings = load_config(run / CONFIG_FILE).checkpoint.best if (run / CONFIG_FILE).is_file() else None
    if settings is None:
        raise UserError(
            f"--checkpoint: {run} kept no best checkpoint; checkpoint.best.metric names the number it is by"
        )
    best = find_best(settings, run)
    if best is None:
        raise UserError(f"--checkpoint: {run} has no checkpoint at a step that measured {settings.metric}")
    return dict(complete_checkpoints(run / "checkpoints"))[best.step]


def training_record(run: Path, checkpoint: Path) -> Training:
    """Collect what the run says of the training that led to ``checkpoint``."""
    manifest = read_manifest(checkpoint)
    metrics: dict[str, float] = {}
    # Numbers of another step are not this checkpoint's.
    for row in read_metrics(run / METRICS_FILE) if (run / METRICS_FILE).is_file() else []:
        recall = {key.rpartition("/")[2]: value for key, value in row.items()}
        if row.get("step") == manifest.step and "i2t_R@1" in recall:
            metrics = recall
    return Training(step=manifest.step, samples=manifest.sample_index, metrics=metrics)


def write_export(
    out: str | Path, student: Student, config: Config, tokenizer: Tokenizer | None, training: Training | None = None
) -> None:
    """Write a student that is in memory, whole or not at all. ``training`` says in the model card where it is from."""
    with atomic_path(out) as folder:
        folder.mkdir()
        weights = {name: value.detach().cpu().contiguous() for name, value in student.state_dict().items()}
        weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
        portable = _portable_config(config, tokenizer, folder)
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        write_text(folder / CONFIG_FILE, dump_config(portable))
        write_text(folder / "README.md", model_card(portable, student, training or Training()))


def _portable_config(config: Config, tokenizer: Tokenizer | None, folder: Path) -> Config:
    """Put the tokenizer and the encoders' configurations into ``folder`` and point the config there."""
    data = config.data.model_copy(
        update={
            "train": _portable_train(config.data.train),
            "source": SourceConfig(),  # storage options may hold keys
            "trace": None,
            "lengths_dir": None,
            "eval": config.data.eval
            and config.data.eval.model_copy(update={"shards": _data_name(config.data.eval.shards)}),
        }
    )
    if tokenizer is not None and data.tokenizer is not None:
        (folder / _TOKENIZER_FOLDER).mkdir()
        saved = tokenizer.save(folder / _TOKENIZER_FOLDER)
        path = (Path(_TOKENIZER_FOLDER) / saved["path"]).as_posix()
        data = data.model_copy(update={"tokenizer": data.tokenizer.model_copy(update={**saved, "path": path})})
    encoders = {name: _portable_encoder(name, encoder, folder) for name, encoder in config.model.encoders.items()}
    layers = [layer.model_copy(update={"init": _portable_init(layer)}) for layer in config.model.layers]
    teachers = {
        name: teacher.model_copy(
            update={"name": _public_name(teacher.name), "kwargs": _without_folders(teacher.kwargs), "outputs": None}
        )
        for name, teacher in config.teachers.items()
    }
    sources = {name: _public_name(source) for name, source in config.model.sources.items()}
    model = config.model.model_copy(update={"encoders": encoders, "layers": layers, "sources": sources, "init": None})
    # DeepSpeed's options may name where a node offloads to.
    engine = config.engine.model_copy(update={"deepspeed": _without_folders(config.engine.deepspeed)})
    update = {"run_dir": config.name, "data": data, "model": model, "teachers": teachers, "engine": engine}
    return config.model_copy(update=update)


def _portable_init(layer: LayerConfig) -> dict[str, InitConfig | list[InitConfig]]:
    """Name the sources of first weights without the folders of this machine."""

    def portable(init: InitConfig) -> InitConfig:
        return init.model_copy(update={"source": _public_name(init.source)})

    return {
        owner: [portable(init) for init in found] if isinstance(found, list) else portable(found)
        for owner, found in layer.init.items()
    }


def _portable_train(train: TrainSetConfig) -> TrainSetConfig:
    """Name the data without the folders of this machine."""
    shards = None if train.shards is None else _data_name(train.shards)
    sets = {k: one.model_copy(update={"shards": _data_name(one.shards)}) for k, one in train.sets.items()}
    return train.model_copy(update={"shards": shards, "sets": sets})


def _portable_encoder(name: str, encoder: EncoderConfig, folder: Path) -> EncoderConfig:
    if encoder.kind == "hf":
        from transformers import AutoConfig  # slow to import, and few exports need it

        relative = Path(_ENCODERS_FOLDER) / name
        try:
            # Left unsaid, transformers would ask on stdin whether to run code that comes with the model.
            AutoConfig.from_pretrained(encoder.name, trust_remote_code=False).save_pretrained(folder / relative)
        except (OSError, ValueError) as error:
            raise UserError(f"model.encoders.{name}.name: '{encoder.name}' has no usable config: {error}") from error
        return encoder.model_copy(update={"name": relative.as_posix(), "init": None})
    update: dict[str, Any] = {"init": None}
    if hasattr(encoder, "weights"):
        update["weights"] = None
    if hasattr(encoder, "kwargs"):
        update["kwargs"] = _without_folders(encoder.kwargs)
    return encoder.model_copy(update=update)


def _data_name(shards: str | list[str]) -> str | list[str]:
    """Keep of each path or address what names the data: its last two parts."""
    if isinstance(shards, list):
        return [_last_parts(display(item)) for item in shards]
    return _last_parts(display(shards))


def _public_name(name: str) -> str:
    """Keep of ``KIND:FOLDER`` what names the model: the folder's last two parts, and so all of ``hf:ORG/NAME``.

    Of ``timm:NAME@WEIGHTS``, whose name tells the model, the file alone is kept. A name in model.sources stays.
    """
    kind, colon, rest = name.partition(":")
    if not colon:
        return _last_parts(name)
    if kind == "timm":
        model, at, weights = rest.partition("@")
        return f"timm:{_last_parts(model)}{at}{Path(weights).name}"
    return f"{kind}:{_last_parts(rest)}"


def _without_folders(value: Any) -> Any:
    """Options of a library, their paths cut to the last two parts; public addresses stay."""
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    return display(value) if value.startswith(("https://", "http://")) else _last_parts(value)


def _last_parts(path: str) -> str:
    """Return the last two parts of a path that are names: no root, no ``..``, no home folder (``~``)."""
    parts = Path(os.path.normpath(path)).parts
    names = [part for i, part in enumerate(parts) if part != ".." and (i > 0 or not part.startswith(("/", "~")))]
    return "/".join(names[-2:])
