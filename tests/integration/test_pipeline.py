"""Three stages by one command: each from the exports of those before it, none repeated, interrupted ones continued."""

import shutil

import pytest
import torch
from pipeline_runs import write_pipeline
from safetensors.torch import load_file
from training_runs import make_data, run_config

from mmd2v.config.load import load_config
from mmd2v.config.pipeline import load_pipeline
from mmd2v.data.tokenizers import load_tokenizer
from mmd2v.errors import UserError
from mmd2v.export import export
from mmd2v.models.student import build_student
from mmd2v.train.loop import train
from mmd2v.train.metrics import read_metrics
from mmd2v.train.pipeline import dry_run_pipeline, run_pipeline


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def pipeline(data, tmp_path):
    return write_pipeline(tmp_path, data)


def test_stages_follow_one_another_and_are_not_repeated(pipeline, capsys):
    runs = pipeline.parent / "runs"
    run_pipeline(load_pipeline(pipeline))
    for name in ("teacher", "half", "both"):
        assert (runs / name / "export" / "model.safetensors").is_file()
    rows = read_metrics(runs / "half" / "metrics.jsonl")
    assert any("loss/layer_results_loss/image" in row for row in rows)
    written = {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}

    capsys.readouterr()
    run_pipeline(load_pipeline(pipeline))
    assert capsys.readouterr().out.count("finished before") == 3
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")} == written

    # A last stage that was not exported is the only one that is trained again, from its checkpoint.
    shutil.rmtree(runs / "both" / "export")
    run_pipeline(load_pipeline(pipeline))
    out = capsys.readouterr().out
    assert out.count("finished before") == 2 and "continuing from" in out

    # The student of the second stage started from the first one's weights and has its encoder.
    config = load_config(runs / "half" / "export" / "config.yaml")
    assert config.model.encoders["image"].init is None

    with pytest.raises(UserError, match=r"stage half: .* was made with another config"):
        run_pipeline(load_pipeline(pipeline, ["--half.steps", "3"]))


def test_overrides_name_their_stage(pipeline):
    with pytest.raises(UserError, match="an override names its stage"):
        load_pipeline(pipeline, ["--steps", "3"])
    with pytest.raises(UserError, match=r"Did you mean 'half'\?"):
        load_pipeline(pipeline, ["--hulf.steps", "3"])


def test_dry_run_names_what_is_missing(pipeline, capsys):
    dry_run_pipeline(load_pipeline(pipeline))
    out = capsys.readouterr().out
    assert "stage half: cannot be built before" in out
    assert not (pipeline.parent / "runs").exists()


def test_unknown_scale_is_named(pipeline):
    teacher = pipeline.parent / "teacher.yaml"
    with pytest.raises(UserError, match=r"--scale: found 'mini', but .*teacher\.yaml has no `scales`"):
        load_config(teacher, scale="mini")
    with pytest.raises(UserError, match=r"--scale: found 'mini', but"):
        load_pipeline(pipeline, scale="mini")[0].load({})
    teacher.write_text(teacher.read_text() + "scales: {small: {}}\n")
    pipeline.write_text(pipeline.read_text().replace("teacher.yaml", "teacher.yaml, scale: smal"))
    with pytest.raises(UserError, match=r"pipeline\.yaml: stages\.teacher\.scale: unknown name 'smal'.*'small'"):
        load_pipeline(pipeline)[0].load({})


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("{name: [x]}", r"pipeline\.yaml: stages\.teacher\.set: name: found \['x'\]"),
        ("{model.layers.9.count: 2}", r"pipeline\.yaml: stages\.teacher\.set: model\.layers\.9\.count: '9' is no item"),
        ("{steps: 3, epochs: 2}", r"pipeline\.yaml: stages\.teacher\.set: found steps: 3 and epochs: 2"),
    ],
)
def test_error_in_a_stage_names_it(pipeline, setting, expected):
    pipeline.write_text(pipeline.read_text().replace("teacher.yaml", f"teacher.yaml, set: {setting}"))
    with pytest.raises(UserError, match=expected):
        load_pipeline(pipeline)[0].load({})


def test_a_folder_is_taken_as_it_stands(pipeline):
    folder = pipeline.parent / "x #1: ${HOME}"
    stage = load_pipeline(pipeline, ["--run_dir", str(folder)])[0]
    assert stage.load({}).run_dir == str(stage.run_dir) == str(folder / "teacher")


def test_a_stage_has_no_folder_elsewhere(pipeline):
    with pytest.raises(UserError, match="a stage's folder lies in the pipeline's"):
        load_pipeline(pipeline, ["--half.run_dir", "x"])
    pipeline.write_text(pipeline.read_text().replace("half.yaml", "half.yaml, set: {run_dir: x}"))
    with pytest.raises(UserError, match=r"stages\.half\.set: found run_dir; .*runs/half"):
        load_pipeline(pipeline)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("größe", r"stages: found the name 'größe'; expected letters from a to z"),
        ("1st", "found the name '1st'"),
        ("Half", r"'half' and 'Half' would both be \$\{STAGE_HALF\}"),
    ],
)
def test_every_stage_has_a_variable_of_its_own(pipeline, name, expected):
    pipeline.write_text(pipeline.read_text() + f"  {name}: {{config: both.yaml}}\n")
    with pytest.raises(UserError, match=expected):
        load_pipeline(pipeline)


def test_weights_are_never_taken_for_those_of_another_config(pipeline, capsys):
    """A stage that was trained, whose export was removed and whose config was edited."""
    stage = load_pipeline(pipeline)[0]
    run_pipeline([stage])
    shutil.rmtree(stage.export)
    edited = load_pipeline(pipeline, ["--teacher.optimizer.lr=1e-4"])[0]
    with pytest.raises(UserError, match=r"stage teacher: .*runs/teacher was made with another config"):
        run_pipeline([edited])
    assert not stage.export.exists()
    # Without any weights there is nothing to mistake.
    shutil.rmtree(stage.run_dir / "checkpoints")
    capsys.readouterr()
    run_pipeline([edited])
    assert load_config(stage.export / "config.yaml").optimizer.lr == 1e-4
    run_pipeline([edited])
    assert "finished before" in capsys.readouterr().out


def test_scale_replaces_values_from_its_file_and_its_own(tmp_path):
    (tmp_path / "sizes").mkdir()
    (tmp_path / "sizes" / "small.yaml").write_text("model.width: 64\nepochs: 3\nengine.batch_size: 8\n")
    base = tmp_path / "base.yaml"
    base.write_text(
        "name: x\nrun_dir: x\nsteps: 5\ndata: {train: {shards: s}}\n"
        "model: {width: 16, heads: 2, encoders: {image: {kind: patch}}, layers: [{kind: separate, count: 4}]}\n"
        "objectives: [{kind: attributes, classes: 3}]\n"
        "scales: {small: {file: sizes/small.yaml, set: {model.layers.0.count: 2}}}\n"
    )
    row = tmp_path / "row.yaml"
    row.write_text("base: base.yaml\ndata: {labels: a}\nscales: {small: {set: {engine.batch_size: 4}}}\n")
    plain, small = load_config(row), load_config(row, scale="small")
    assert (plain.steps, plain.model.width, plain.model.layers[0].count) == (5, 16, 4)
    assert (small.steps, small.epochs, small.model.width, small.model.layers[0].count) == (None, 3, 64, 2)
    assert small.engine.batch_size == 4
    row.write_text("base: base.yaml\ndata: {labels: a}\nscales: {small: {set: {model.layers.7.count: 4}}}\n")
    with pytest.raises(UserError, match=r"'7' is no item of the list 'model\.layers'"):
        load_config(row, scale="small")


def test_run_of_no_steps_measures_and_keeps_its_start(data, tmp_path):
    config = run_config(tmp_path / "start.yaml", data, steps=0, data__eval={"shards": str(data / "test")})
    train(config)
    run = tmp_path / "runs" / "start"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000"]
    (row,) = [row for row in read_metrics(run / "metrics.jsonl") if "evaluation/i2t_R@1" in row]
    assert row["step"] == 0
    export(run, tmp_path / "export")
    config = config.model_copy(update={"teachers": {}})
    start = build_student(config, load_tokenizer(config.data.tokenizer)).state_dict()
    kept = load_file(tmp_path / "export" / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in start.items())


def test_fine_tuning_starts_from_everything_of_an_export(data, tmp_path):
    train(run_config(tmp_path / "first.yaml", data, steps=1))
    export(tmp_path / "runs" / "first", tmp_path / "export")
    config = run_config(tmp_path / "tuned.yaml", data, model__init=f"mmd2v:{tmp_path / 'export'}")
    tokenizer = load_tokenizer(config.data.tokenizer)
    kept = load_file(tmp_path / "export" / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in build_student(config, tokenizer).state_dict().items())
    wider = run_config(tmp_path / "wider.yaml", data, model__init=f"mmd2v:{tmp_path / 'export'}", model__width=64)
    with pytest.raises(UserError, match=r"model\.init: (?s:.*)32.*64"):
        build_student(wider, tokenizer)
