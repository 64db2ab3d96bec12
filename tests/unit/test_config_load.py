"""From YAML, overrides and environment to a config: every error names file or flag, key, found and expected."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mmd2v.config.load import dump_config, load_config
from mmd2v.config.overrides import split_overrides
from mmd2v.config.schema import Config
from mmd2v.errors import UserError

BASE = """
name: base
run_dir: runs
steps: 10
data:
  train: {shards: train}
  tokenizer: {path: tokenizer.json}
model:
  width: 32
  heads: 4
  encoders:
    image: {kind: patch, patch_size: 8}
    text: {kind: tokens}
  layers: [{kind: separate}, {kind: shared, count: 2}]
objectives: [{kind: contrastive}]
"""


@pytest.fixture
def load(tmp_path):
    """Return a function: the YAML of a child of BASE → its config."""
    (tmp_path / "base.yaml").write_text(BASE)

    def load_text(text: str = "", *overrides: str, base: str = "base: base.yaml\n") -> Config:
        (tmp_path / "run.yaml").write_text(base + text)
        return load_config(tmp_path / "run.yaml", overrides)

    return load_text


# ------------------------------------------------------------------------------------------- values


def test_child_merges_mappings_and_replaces_lists(load):
    config = load("model: {width: 64, layers: [{kind: mome}]}\noptimizer: {lr: 5e-4}")
    assert (config.name, config.model.width, config.model.heads) == ("base", 64, 4)
    assert [layer.kind for layer in config.model.layers] == ["mome"]
    assert config.optimizer.lr == 5e-4


def test_chain_of_bases_is_relative_to_each_file(tmp_path, load):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "middle.yaml").write_text("base: ../base.yaml\nname: middle\nseed: 4")
    (tmp_path / "deep" / "er" / "leaf.yaml").write_text("base: ../middle.yaml\nname: leaf")
    config = load_config(tmp_path / "deep" / "er" / "leaf.yaml")
    assert (config.name, config.seed, config.steps) == ("leaf", 4, 10)


def test_section_of_another_kind_replaces_that_of_the_base(load):
    config = load("model: {encoders: {image: {kind: timm, name: resnet18}}}")
    assert config.model.encoders["image"].kind == "timm"
    assert config.model.encoders["text"].kind == "tokens"


def test_overrides_set_keys_list_items_and_new_entries(load):
    config = load(
        "", "--model.layers.1.count", "3", "--optimizer.lr=1e-3", "--name", "2024", "--teachers.t.name", "timm:x",
        "--optimizer.clip_norm", "null", "--optimizer.betas", "[0.8, 0.9]",
    )  # fmt: skip
    assert [layer.count for layer in config.model.layers] == [1, 3]
    assert (config.optimizer.lr, config.name, config.optimizer.clip_norm) == (1e-3, "2024", None)
    assert config.teachers["t"].name == "timm:x"
    assert config.optimizer.betas == (0.8, 0.9)


def test_variables_come_from_the_environment_after_merging(load, monkeypatch):
    monkeypatch.setenv("DATA_HOME", "/disk")
    monkeypatch.delenv("ELSEWHERE", raising=False)
    text = "data: {train: {shards: '${DATA_HOME}/${ELSEWHERE:-here}/a.tar'}}\nname: $${DATA_HOME}"
    config = load(text)
    assert config.data.train.shards == "/disk/here/a.tar"
    assert config.name == "${DATA_HOME}"
    (_ := load("name: ${ELSEWHERE}", "--name", "given"))  # an overridden variable is not asked for


# ------------------------------------------------------------------------------------------- errors

ERRORS = {
    "unknown key": ("optimizr: {}", (), ["run.yaml: optimizr: unknown key", "Did you mean 'optimizer'?"]),
    "unknown nested key": ("engine: {batch_sise: 1}", (), ["engine.batch_sise: unknown key", "'batch_size'"]),
    "unknown key in a union": (
        "model: {encoders: {image: {patch_sise: 4}}}", (), ["model.encoders.image.patch_sise", "'patch_size'"]
    ),
    "unknown key in a list": (
        "model: {layers: [{kind: mome, coun: 2}]}", (), ["model.layers.0.coun: unknown key", "'count'"]
    ),
    "unknown choice": (
        "engine: {precision: bf16_autocas}",
        (),
        ["run.yaml: engine.precision: found 'bf16_autocas'; expected 'auto', 'fp32'", "Did you mean 'bf16_autocast'?"],
    ),
    "unknown kind": ("model: {encoders: {image: {kind: pach}}}", (), ["found 'pach'", "Did you mean 'patch'?"]),
    "missing kind": ("objectives: [{weight: 2}]", (), ["objectives.0: kind: missing"]),
    "missing value": ("model: {encoders: {image: {kind: timm}}}", (), ["image.name: missing", "timm model name"]),
    "wrong choice": ("engine: {device: cud}", (), ["engine.device: found 'cud'; expected 'auto', 'cpu'", "'cuda'?"]),
    "out of range": ("steps: -1", (), ["run.yaml: steps: found -1; expected greater than or equal to 0"]),
    "not a number": ("steps: many", (), ["steps: found 'many'; expected a valid integer"]),
    "not a mapping": ("engine: 3", (), ["engine: found 3; expected a mapping"]),
    "bad list item": ("data: {train: {shards: [a, 3]}}", (), ["data.train.shards.1: found 3; expected"]),
    "inconsistent": ("epochs: 2", (), ["the config: give exactly one of `steps` and `epochs`"]),
    "value of the base": ("", ("--steps", "-1"), ["--steps: steps: found -1"]),
    "unset variable": ("name: ${NO_SUCH_THING}", (), ["name: environment variable 'NO_SUCH_THING' is not set"]),
    "unknown override": ("", ("--engine.batchsize", "8"), ["--engine.batchsize: ", "unknown key", "'batch_size'"]),
    "override without value": ("", ("--engine.batch_size",), ["--engine.batch_size: a value is missing"]),
    "two overrides, one value": ("", ("--seed", "--steps", "3"), ["--seed: a value is missing"]),
    "override of nothing": ("", ("seed", "3"), ["'seed': expected an override"]),
    "override past a list": ("", ("--model.layers.2.count", "1"), ["'2' is no item of the list", "0 to 1"]),
    "override into a value": ("", ("--name.first", "x"), ["'name' is the value 'base', it has no key 'first'"]),
    "override that is no YAML": ("", ("--optimizer.betas", "[1"), ["--optimizer.betas, line 1", "not valid YAML"]),
    "broken YAML": ("a: [1\n", (), ["run.yaml, line 3, column 1: not valid YAML"]),
    "key twice": ("seed: 1\nseed: 2", (), ["run.yaml, line 3, column 1", "key 'seed' is given twice"]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "overrides", "expected"), ERRORS.values(), ids=ERRORS.keys())
def test_error_says_where_what_and_what_instead(load, monkeypatch, text, overrides, expected):
    monkeypatch.delenv("NO_SUCH_THING", raising=False)
    with pytest.raises(UserError) as error:
        load(text, *overrides)
    for part in expected:
        assert part in str(error.value)


def test_all_problems_are_told_at_once(load):
    with pytest.raises(UserError, match="2 problems in the config:") as error:
        load("steps: -1\nengine: {zero_stage: 7}")
    assert len(str(error.value).splitlines()) == 3


def test_error_names_the_file_the_value_came_from(load, tmp_path):
    (tmp_path / "base.yaml").write_text(BASE.replace("width: 32", "width: none"))
    with pytest.raises(UserError, match=r"base\.yaml: model\.width: found 'none'"):
        load("seed: 1")


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("base: bse.yaml\n", "run.yaml: base: config file .* does not exist. Did you mean 'base.yaml'?"),
        ("base: run.yaml\n", "goes in a circle"),
        ("base: [a, b]\n", "base: found a list; expected one path"),
        ("- 1\n", "found a list at the top"),
        ("", "the file is empty"),
    ],
)
def test_file_that_cannot_be_a_config(load, base, expected):
    with pytest.raises(UserError, match=expected):
        load("", base=base)


def test_config_file_that_is_not_there(tmp_path):
    (tmp_path / "flickr8k.yaml").write_text(BASE)
    with pytest.raises(UserError, match=r"'.*flickr8.yaml' does not exist. Did you mean 'flickr8k.yaml'?"):
        load_config(tmp_path / "flickr8.yaml")


def test_config_that_is_no_text(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "run.yaml")


# --------------------------------------------------------------------------------------- round trip

TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12) | st.sampled_from(
    ["${HOME}", "$${x}", "$$${y}", "1e5", "5e-4", "null", "~", "yes", "12:30", "2024-01-01", "0x1f", ".inf", " a ", "#"]
)
VALUE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
NESTED = st.recursive(VALUE, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


@settings(max_examples=60, deadline=None)
@given(
    name=TEXT,
    lr=st.floats(min_value=1e-12, max_value=1e3),
    betas=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
    options=st.dictionaries(TEXT, NESTED, max_size=4),
    shards=TEXT | st.lists(TEXT, min_size=1, max_size=3),
)
def test_dumped_config_loads_equal(tmp_path_factory, name, lr, betas, options, shards):
    values = yaml.safe_load(BASE) | {"name": name, "optimizer": {"lr": lr, "betas": betas}}
    values["engine"] = {"deepspeed": options}
    values["data"]["train"]["shards"] = shards
    config = Config.model_validate(values)
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


# ------------------------------------------------------------------------------------- command line


def test_command_line_is_parted_into_own_arguments_and_overrides():
    argv = ["--engine.batch_size", "8", "c.yaml", "--resume", "auto", "--dry_run", "--steps=3"]
    flags = {"--resume": True, "--dry-run": False}
    own, overrides = split_overrides(argv, flags)
    assert own == ["c.yaml", "--resume", "auto", "--dry_run"]
    assert overrides == ["--engine.batch_size", "8", "--steps=3"]
    assert split_overrides(["--dry-run", "c.yaml"], flags) == (["--dry-run", "c.yaml"], [])


def test_a_key_of_another_section_is_pointed_to(tmp_path):
    config = Path(__file__).parents[2] / "configs" / "cpu" / "minimal.yaml"
    with pytest.raises(UserError, match=r"unknown key\. Did you mean 'optimizer\.lr'"):
        load_config(config, ["--lr", "3e-4"])


def test_a_slip_in_a_flag_is_no_override():
    with pytest.raises(UserError, match=r"--dryrun: no such flag\. Did you mean '--dry-run'"):
        split_overrides(["a.yaml", "--dryrun"], {"--dry-run": False, "--resume": True})


def test_the_smallest_config_is_valid():
    assert load_config(Path(__file__).parents[2] / "configs" / "cpu" / "minimal.yaml").name == "minimal"


@pytest.mark.parametrize(("flag", "value"), [("steps", 7), ("epochs", 2.5)])
def test_the_command_line_says_how_long_a_run_is(load, flag, value):
    other = {"steps": "epochs", "epochs": "steps"}[flag]
    in_file = {"steps": "steps: 3", "epochs": "steps: null\nepochs: 3"}[other]
    config = load(in_file, f"--{flag}", str(value))
    assert getattr(config, flag) == value and getattr(config, other) is None


def test_null_takes_an_inherited_mapping_away(tmp_path):
    (tmp_path / "base.yaml").write_text(MINIMAL_MIXTURE)
    row = tmp_path / "row.yaml"
    row.write_text("base: base.yaml\ndata: {train: {sets: {a: null, c: {shards: c}}}}\n")
    assert list(load_config(row).data.train.sets) == ["b", "c"]


def test_null_takes_inherited_scales_away(tmp_path):
    (tmp_path / "base.yaml").write_text(MINIMAL_MIXTURE + "scales: {small: {set: {model.width: 8}}}\n")
    row = tmp_path / "row.yaml"
    row.write_text("base: base.yaml\n")
    assert load_config(row, scale="small").model.width == 8
    row.write_text("base: base.yaml\nscales: null\n")
    assert load_config(row).model.width == 16
    with pytest.raises(UserError, match=r"--scale: found 'small', but .*row\.yaml has no `scales`"):
        load_config(row, scale="small")
    row.write_text("base: base.yaml\nscales: {large: {set: {model.width: 32}}}\n")
    with pytest.raises(UserError, match=r"--scale: unknown name 'smal'\. Did you mean 'small'"):
        load_config(row, scale="smal")


SCALES = {
    "length twice in its file": (
        "{small: {file: sizes.yaml}}", "epochs: 2\nsteps: 5",
        r"sizes\.yaml: found steps: 5 and epochs: 2; expected one of the two",
    ),
    "length twice in its keys": (
        "{small: {set: {steps: 5, epochs: 2}}}", "seed: 1",
        r"run\.yaml: scales\.small\.set: found steps: 5 and epochs: 2",
    ),
    "no such item in its file": (
        "{small: {file: sizes.yaml}}", "model.layers.9.count: 2",
        r"sizes\.yaml: model\.layers\.9\.count: '9' is no item of the list",
    ),
    "no such item in its keys": (
        "{small: {set: {model.layers.9.count: 2}}}", "seed: 1",
        r"run\.yaml: scales\.small\.set: model\.layers\.9\.count: '9' is no item of the list",
    ),
    "unknown key in its file": (
        "{small: {file: sizes.yaml}}", "engine.batchsize: 2",
        r"sizes\.yaml: engine\.batchsize: unknown key\. Did you mean 'batch_size'",
    ),
    "unknown key in its keys": (
        "{small: {set: {name.x: 2}}}", "seed: 1",
        r"run\.yaml: scales\.small\.set: name\.x: 'name' is the value 'base', it has no key 'x'",
    ),
    "no mapping": ("3", "seed: 1", r"run\.yaml: scales: found 3; expected a mapping"),
}  # fmt: skip


@pytest.mark.parametrize(("scales", "file", "expected"), SCALES.values(), ids=SCALES.keys())
def test_error_in_a_scale_says_where(load, tmp_path, scales, file, expected):
    (tmp_path / "sizes.yaml").write_text(file)
    load(f"scales: {scales}")
    with pytest.raises(UserError, match=expected):
        load_config(tmp_path / "run.yaml", scale="small")


def test_a_scale_may_change_how_its_file_says_the_length(load, tmp_path):
    (tmp_path / "sizes.yaml").write_text("epochs: 2\nsteps: null")
    load("scales: {small: {file: sizes.yaml}, short: {file: sizes.yaml, set: {steps: 5}}}")
    small, short = (load_config(tmp_path / "run.yaml", scale=name) for name in ("small", "short"))
    assert (small.steps, small.epochs, short.steps, short.epochs) == (None, 2, 5, None)


MINIMAL_MIXTURE = """
name: x
run_dir: x
steps: 5
data: {train: {sets: {a: {shards: a}, b: {shards: b}}}, labels: known}
model: {width: 16, heads: 2, encoders: {image: {kind: patch}}, layers: [{kind: separate}]}
objectives: [{kind: attributes, classes: 3}]
"""
