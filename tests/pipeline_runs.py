"""A pipeline of three stages that takes seconds on the data of `training_runs`."""

from __future__ import annotations

from pathlib import Path

RUN = """
name: {name}
run_dir: unused
steps: 2
data:
  train: {{shards: {shards}}}
  image: {{size: 32, crop_scale: [1.0, 1.0]}}
  workers: 0
  {tokenizer}
model:
  width: 16
  heads: 2
  encoders: {{{encoders}}}
  layers: [{layers}]
  final_norm: false
  projection: {{kind: none}}
{teachers}
objectives: [{objectives}]
engine: {{device: cpu, batch_size: 4, precision: fp32, zero_stage: 0}}
logging: {{tensorboard: false}}
"""

PATCH = "image: {kind: patch, patch_size: 8, frozen: true}"

STAGES = ("teacher", "half", "both")


def write_pipeline(folder: Path, data: Path) -> Path:
    """Write the YAML of a pipeline and of its stages; its run directory is ``runs`` beside them.

    A teacher is trained, half of it is distilled, and the result teaches text.
    """
    shards = data / "train"
    tokenizer = f"tokenizer: {{path: {data / 'tokenizer.json'}, max_length: 24}}"
    teacher = RUN.format(
        name="teacher",
        shards=shards,
        tokenizer="labels: attributes",
        encoders=PATCH,
        layers="{kind: separate, count: 2, norm: post}",
        teachers="",
        objectives="{kind: attributes, classes: 450, prior: 0.02}",
    )
    half = RUN.format(
        name="half",
        shards=shards,
        tokenizer="",
        encoders=PATCH.replace("}", ', init: "mmd2v:${STAGE_TEACHER}"}'),
        layers='{kind: separate, norm: post, init: {image: {source: "mmd2v:${STAGE_TEACHER}"}}}',
        teachers='teachers: {whole: {name: "mmd2v:${STAGE_TEACHER}", shared_encoder: image}}',
        objectives="{kind: layer_results, teacher: whole, modality: image}",
    )
    both = RUN.format(
        name="both",
        shards=shards,
        tokenizer=tokenizer,
        encoders=PATCH.replace("}", ', init: "mmd2v:${STAGE_HALF}"}') + ", text: {kind: tokens}",
        layers='{kind: separate, norm: post, init: {image: {source: "mmd2v:${STAGE_HALF}"}}}, {kind: shared}',
        teachers='teachers: {image: {name: "mmd2v:${STAGE_TEACHER}"}}',
        objectives="{kind: cls_regression, teacher: image, head: none}, {kind: contrastive}",
    )
    for name, text in {"teacher": teacher, "half": half, "both": both}.items():
        (folder / f"{name}.yaml").write_text(text)
    file = folder / "pipeline.yaml"
    stages = "\n".join(f"  {name}: {{config: {name}.yaml}}" for name in STAGES)
    file.write_text(f"run_dir: {folder / 'runs'}\nstages:\n{stages}\n")
    return file
