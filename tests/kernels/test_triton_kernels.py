"""The Triton kernels: right in the interpreter, within the resources of the chips ahead of time, right on a GPU.

Each runs in a process of its own, as the interpreter is chosen when Triton is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import ahead_of_time
import device_checks
import pytest

from mmd2v_kernels.dispatch import triton_version

HERE = Path(__file__).parent
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes a block may use; the compiler does not check it."""
COMPILING = os.environ.get("MMD2V_TRITON_PYTHON", sys.executable)
"""Python whose Triton compiles ahead of time: of an environment with another version, say."""

pytestmark = pytest.mark.skipif(triton_version() is None, reason="Triton is not installed")


def run(script: str, *arguments: str, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess:
    variables = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MMD2V_KERNELS")}
    return subprocess.run(
        [python, str(HERE / script), *arguments],
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )


def outcomes(**environment: str) -> dict[str, dict]:
    done = run("device_checks.py", **environment)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-3000:]
    return {line["check"]: line for line in lines}


@pytest.fixture(scope="module")
def interpreted():
    return outcomes(TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def on_gpu():
    return outcomes()


@pytest.mark.parametrize("name", device_checks.names(("float32", "float16"), interpreted=True))
def test_in_the_interpreter(name, interpreted):
    assert interpreted[name]["problem"] == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", device_checks.names(device_checks.NAMES, interpreted=False))
def test_on_a_gpu(name, on_gpu):
    assert on_gpu[name]["problem"] == ""


@pytest.fixture(scope="module")
def compiled():
    done = run("ahead_of_time.py", python=COMPILING)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


GOLDEN = json.loads((HERE / "kernel_resources.json").read_text(encoding="utf-8"))


def test_every_form_is_compiled(compiled):
    expected = set(GOLDEN[max(GOLDEN)])
    assert set(compiled["resources"]) == expected, "write the table anew: see kernel_resources.py"


@pytest.mark.parametrize("name", sorted(GOLDEN[max(GOLDEN)]))
def test_ahead_of_time(name, compiled):
    found = compiled["resources"][name]
    assert found["stack"] == 0 and found["spills"] == 0
    assert found["shared"] <= SHARED_MEMORY[int(name.rpartition("sm_")[2])]
    assert (found["tensor_cores"] > 0) == bool(found["expects_tensor_cores"])
    table = GOLDEN.get(compiled["triton"])
    if table is not None:
        assert found["special"] == table[name]["special"]
        assert found["registers"] <= table[name]["registers"] + 8
        assert found["shared"] == table[name]["shared"]


def test_a_spilling_kernel_would_be_seen():
    """The counters read real machine code: one that needs more registers than there are."""
    done = run("spilling_kernel.py", python=COMPILING)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["spills"] > 0 and found["stack"] > 0
    assert found["tensor_cores"] > 0 and found["special"] > 0


def test_the_modules_are_those_of_the_package():
    package = HERE.parents[1] / "kernels/mmd2v_kernels"
    assert {path.stem for path in package.glob("*_triton.py")} == set(ahead_of_time.MODULES)
