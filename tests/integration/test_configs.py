"""Every config of the project validates and dry-runs, and the rows of table 1 have the published sizes."""

import re
from pathlib import Path

import pytest
from checkpoint_samples import SIZES, converted_base
from training_runs import make_data

from mmd2v.config.load import load_config, read_yaml_file
from mmd2v.config.pipeline import is_pipeline, load_pipeline
from mmd2v.data.tokenizers import load_tokenizer
from mmd2v.distributed import environment
from mmd2v.errors import UserError
from mmd2v.export import write_export
from mmd2v.models.student import build_student
from mmd2v.train.dry_run import dry_run, parameter_counts
from mmd2v.train.parts import build_parts

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name != "scales" and path.stem != "base"]
PIPELINES = [path for path in RUNS if path.parent.name == "pipeline"]
SINGLE = [path for path in RUNS if path not in PIPELINES]
PUBLIC_SIZE = [path for path in SINGLE if path.parent.name in ("table1", "questions", "stages", "pretrain", "beyond")]
CPU_SIZE = [path for path in SINGLE if path.parent.name == "cpu"]

VARIABLES = [
    *("MMD2V_DATA", "MMD2V_CHECKPOINTS", "MMD2V_TOKENIZER", "MMD2V_MINI", "MMD2V_TEACHERS", "FLICKR8K_SHARDS"),
    *("TEXT_SHARDS", "IMAGE_SHARDS", "DEMO_DIR", "PRETRAINED"),
]
SMALL = ["--engine.batch_size=2", "--engine.precision=fp32", "--engine.device=cpu"]
"""Two samples a step: what a CPU does at once."""

BLOCK = 7_087_872
"""Parameters of a block of width 768."""


def named(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


@pytest.fixture
def variables(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


@pytest.fixture
def public(shared, checkpoints, variables, monkeypatch):
    """Variables that name checkpoints of the public sizes and the tokenizer."""
    monkeypatch.setenv("MMD2V_CHECKPOINTS", str(checkpoints))
    monkeypatch.setenv("MMD2V_TOKENIZER", str(shared / "tokenizers" / "gpt2_fairseq"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders as the public checkpoints of base size would give, their values zero."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in SIZES:
        converted_base(folder / family, family)
    return folder


@pytest.mark.parametrize("path", SINGLE, ids=named)
def test_validates(path, variables):
    config = load_config(path)
    assert config.name


def scales_of(path: Path) -> set[str]:
    """Names of the scales a config and its bases have; `scales: null` takes those of the bases away."""
    values = read_yaml_file(path, "here")
    own = values.get("scales", {})
    if own is None:
        return set()
    return {*own, *(scales_of(path.parent / values["base"]) if "base" in values else ())}


@pytest.mark.parametrize("path", SINGLE, ids=named)
def test_validates_at_its_scales(path, variables):
    scales = scales_of(path)
    if not scales:
        pytest.skip("a config of one size")
    for scale in scales:
        config = load_config(path, scale=scale)
        assert config.model.width == 384


@pytest.mark.parametrize("path", [path for path in SINGLE if path.parent.name == "pretrain"], ids=named)
def test_pretraining_is_of_one_size(path, variables):
    with pytest.raises(UserError, match=f"--scale: found 'mini', but .*{path.name} has no `scales`"):
        load_config(path, scale="mini")


@pytest.mark.parametrize("path", PIPELINES, ids=named)
def test_every_stage_of_a_pipeline_validates(path, variables):
    assert is_pipeline(path)
    exports = {}
    for stage in load_pipeline(path):
        config = stage.load(exports)
        exports[stage.variable] = str(stage.export)
        assert config.run_dir == str(stage.run_dir)


def counts_of(row: str) -> dict[str, tuple[int, int]]:
    """Part → (trainable, frozen) parameters of a row of table 1."""
    config = load_config(CONFIGS / "table1" / f"{row}.yaml", SMALL)
    return parameter_counts(build_parts(config, environment.initialize("cpu")))


@pytest.mark.parametrize(
    ("row", "blocks", "millions"),
    [("mm_d2v2", 11, 77.97), ("mm_d2v2_7_2_beit2", 12, 85.05), ("mm_d2v2_7_beit2", 13, 92.14)],
)
def test_rows_of_table_1_have_the_published_sizes(row, blocks, millions, public):
    counts = counts_of(row)
    assert counts["layers"] == (blocks * BLOCK, 0)
    assert round(counts["layers"][0] / 1e6, 2) == millions
    assert [round(counts[f"encoders.{name}"][1] / 1e6, 2) for name in ("image", "text")] == [0.74, 39.0]


def test_dry_run_of_a_row_prints_these_sizes(public, capsys):
    dry_run(load_config(CONFIGS / "table1" / "mm_d2v2_beit2.yaml", SMALL))
    out = capsys.readouterr().out
    counts = {line.split()[0]: line.split()[1:] for line in out.splitlines() if re.match(r"\s+(layers|encoders)", line)}
    assert counts["layers"] == [f"{11 * BLOCK:,}", "0"]
    assert counts["encoders.image"] == ["0", "744,192"] and counts["encoders.text"] == ["0", "38,999,808"]
    assert "loss " in out


@pytest.mark.slow
@pytest.mark.parametrize("path", PUBLIC_SIZE, ids=named)
def test_public_sizes_dry_run(path, public, monkeypatch, tmp_path, capsys):
    if path.stem == "distilled_experts":
        for stage in ("image", "text"):
            untrained(CONFIGS / "stages" / f"{stage}.yaml", tmp_path / stage)
            monkeypatch.setenv(f"STAGE_{stage.upper()}", str(tmp_path / stage))
    if path.stem == "finetune":
        untrained(CONFIGS / "beyond" / "contrastive.yaml", tmp_path / "pretrained")
        monkeypatch.setenv("PRETRAINED", str(tmp_path / "pretrained"))
        monkeypatch.delenv("MMD2V_CHECKPOINTS")  # it needs none
    dry_run(load_config(path, SMALL))
    assert "loss " in capsys.readouterr().out


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """A tokenizer of generated captions, for the config that brings its own."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("path", CPU_SIZE, ids=named)
def test_small_runs_dry_run(path, shared, small_data, variables, monkeypatch, capsys):
    monkeypatch.setenv("MMD2V_TEACHERS", str(shared / "teachers"))
    overrides = ["--engine.device=cpu"]
    config = load_config(path, overrides)
    if config.data.batch_tokens is not None:
        overrides += ["--data.batch_tokens=1100"]
    elif config.data.tokenizer is not None and config.data.tokenizer.path == "tokenizer.json":
        overrides += [f"--data.tokenizer.path={small_data / 'tokenizer.json'}", "--engine.batch_size=4"]
    else:
        overrides += ["--engine.batch_size=4"]
    dry_run(load_config(path, overrides))
    assert "loss " in capsys.readouterr().out


MINI = [path for path in PUBLIC_SIZE if path.parent.name in ("table1", "questions", "stages", "beyond")]
ALWAYS = ["mm_d2v2_beit2", "frozen_image_attention", "matching"]
"""Rows that `make test` dry-runs at the mini scale; the others are slow together."""


def untrained(path: Path, out: Path, **options) -> None:
    config = load_config(path, **options)
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    write_export(out, build_student(config, tokenizer), config, tokenizer)


@pytest.fixture(scope="module")
def towers(shared, tmp_path_factory):
    """The small towers of `--scale mini` before their training."""
    folder = tmp_path_factory.mktemp("towers")
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.setenv(name, str(folder / name.lower()))
        patch.setenv("MMD2V_TEACHERS", str(shared / "teachers"))
        patch.setenv("MMD2V_MINI", str(folder))
        untrained(CONFIGS / "cpu" / "image_tower.yaml", folder / "image_tower" / "export")
        untrained(CONFIGS / "stages" / "image.yaml", folder / "image_distilled" / "export", scale="mini")
        untrained(CONFIGS / "cpu" / "text_stage.yaml", folder / "text_distilled" / "export")
    return folder


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=() if p.stem in ALWAYS else pytest.mark.slow, id=named(p)) for p in MINI]
)
def test_mini_scale_dry_runs(path, shared, towers, variables, monkeypatch, capsys):
    monkeypatch.setenv("MMD2V_TEACHERS", str(shared / "teachers"))
    monkeypatch.setenv("MMD2V_MINI", str(towers))
    monkeypatch.setenv("PRETRAINED", str(towers / "fine_tuned"))
    if path.stem == "finetune" and not (towers / "fine_tuned").exists():
        untrained(CONFIGS / "beyond" / "contrastive.yaml", towers / "fine_tuned", scale="mini")
    overrides = ["--engine.device=cpu"]
    if load_config(path, scale="mini").data.batch_tokens is None:
        overrides.append("--engine.batch_size=4")
    else:
        overrides.append("--data.batch_tokens=1100")
    dry_run(load_config(path, overrides, "mini"))
    assert "loss " in capsys.readouterr().out
