"""Who may import whom, that `import mmd2v` needs none of the optional packages, and that commands start quickly.

How long a command takes to start is what it imports: torch alone takes seconds. Modules are counted here, not seconds.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from training_runs import make_data, write_config

from mmd2v.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
NO_ENGINE = ("mmd2v/models", "mmd2v/objectives", "mmd2v/data")
DEEPSPEED_ALLOWED = ("mmd2v/train", "mmd2v/distributed")


def imports(path: Path) -> set[str]:
    """Every module a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder} holds no source"
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_kernels_import_nothing_of_mmd2v():
    for path in sources("kernels"):
        assert not [name for name in imports(path) if within(name, "mmd2v")], path


@pytest.mark.parametrize("folder", NO_ENGINE)
def test_models_objectives_and_data_import_no_engine(folder):
    for path in sources(folder):
        found = [name for name in imports(path) if within(name, "deepspeed") or within(name, "mmd2v.train")]
        assert not found, f"{path}: {found}"


def test_only_train_and_distributed_import_deepspeed():
    for path in sources("mmd2v"):
        if not path.relative_to(ROOT).as_posix().startswith(DEEPSPEED_ALLOWED):
            assert not [name for name in imports(path) if within(name, "deepspeed")], path


def test_an_order_of_samples_needs_no_loader():
    code = """
import sys
import mmd2v.data.positions, mmd2v.data.token_batches
assert not {"mmd2v.data.loader", "mmd2v.data.handover", "webdataset"}.intersection(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_is_no_import_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_needs_no_optional_package():
    blocked = ["triton", "xformers", "apex", "mpi4py", "deepspeed", "torch", "transformers"]
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # makes `import name` fail
import mmd2v
assert mmd2v.__version__
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_models_need_no_accelerator_package():
    code = """
import sys
for name in ["xformers", "apex", "mpi4py"]:
    sys.modules[name] = None
import mmd2v.teachers, mmd2v.objectives, mmd2v_kernels
"""
    subprocess.run([sys.executable, "-c", code], check=True)


SLOW = ("torch", "torchvision", "deepspeed", "transformers", "timm", "webdataset", "triton", "xformers", "matplotlib")
"""Packages that take a quarter of a second to several seconds to import."""

COMPILER = ("torch._inductor.compile_fx", "torch._functorch.aot_autograd")
"""What torch.compile needs; nothing here is compiled with it."""

IN_A_ROW = """
import json, sys
from mmd2v.cli.main import main
for command, unwanted in json.loads(sys.argv[1]):
    try:
        status = main(command)
    except SystemExit as stop:  # behind --help
        status = stop.code
    assert status == 0, (command, status)
    found = set(unwanted).intersection(sys.modules)
    assert not found, f"{' '.join(command)} imports {', '.join(sorted(found))}"
"""


def run_in_a_row(commands: list[tuple[list[str], Sequence[str]]]) -> None:
    """Run commands in one new process; fail at the first one that has imported something it should not."""
    arguments = [sys.executable, "-c", IN_A_ROW, json.dumps(commands)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def test_help_imports_nothing_slow():
    groups = [[name, "--help"] for name in COMMANDS]
    single = [["data", "stats", "--help"], ["eval", "retrieval", "--help"], ["launch", "slurm", "--help"]]
    run_in_a_row([(command, SLOW) for command in [["--version"], ["--help"], *groups, *single]])


def test_commands_without_tensors_import_nothing_slow(data, tmp_path):
    config = str(write_config(tmp_path / "run.yaml", data))
    shards, tokenizer = str(data / "test"), str(data / "tokenizer.json")
    commands = [
        ["table", "--csv", str(tmp_path / "table.csv")],
        ["launch", "slurm", config, "--nodes", "1", "--gpus-per-node", "1", "--no-submit"],
        ["data", "stats", shards, "--tokenizer", tokenizer],
        ["data", "tokenizer", shards, "--out", str(tmp_path / "tokenizer.json")],
        ["data", "lengths", shards, "--tokenizer", tokenizer, "--out", str(tmp_path / "lengths"), "--workers", "1"],
    ]
    picture = ["data", "show", shards, "--out", str(tmp_path / "sheet.png")]  # with the letters of matplotlib
    allowed = [name for name in SLOW if name != "matplotlib"]
    run_in_a_row([*((command, SLOW) for command in commands), (picture, allowed)])


def test_commands_import_only_the_libraries_they_use(data, tmp_path):
    """Generating needs no decoder, measuring no engine, and training no library that the config does not name."""
    config = write_config(tmp_path / "run.yaml", data, teachers={}, objectives=[{"kind": "contrastive"}])
    training = ["transformers", "timm", "xformers", "matplotlib", "rich", *COMPILER]
    measuring = ["deepspeed", *training]
    generating = ["torchvision", *measuring]
    run_in_a_row(
        [
            (["data", "synth", "--out", str(tmp_path / "scenes"), "--count", "4", "--size", "32"], generating),
            (["eval", "retrieval", "random", str(data / "test")], measuring),
            (["train", str(config)], training),
        ]
    )
