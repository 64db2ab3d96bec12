"""Who may import whom, and that `import mmd2v` needs none of the optional packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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
