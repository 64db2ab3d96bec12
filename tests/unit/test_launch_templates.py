"""The templates beside the package: they parse, start what they say, and belong to nobody's machine."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from waiting import LONG

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), LAUNCH.parent / ".ci" / "run"])
RECIPES = [LAUNCH / "Dockerfile", LAUNCH / "mmd2v.def"]


def test_every_launcher_has_a_template():
    names = {path.name for path in LAUNCH.iterdir()}
    assert {
        "srun.sbatch",
        "deepspeed.sh",
        "torchrun.sh",
        "mpirun.sh",
        "hostfile.example",
        *(r.name for r in RECIPES),
    } <= names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr
    assert script.read_text().startswith("#!/usr/bin/env bash\n") and (
        script.suffix == ".sbatch" or os.access(script, os.X_OK)
    )


@pytest.mark.parametrize("path", [*SCRIPTS, *RECIPES, LAUNCH / "hostfile.example"], ids=lambda path: path.name)
def test_nothing_of_any_machine(path):
    text = path.read_text()
    assert not re.search(r"/(home|root|work|scratch|tmp)\b", text)
    assert not re.search(r"(?<![\d.])(?!127\.)\d{1,3}(\.\d{1,3}){3}(?![\d.])", text)  # addresses but the loopback's
    assert not re.search(r"--(account|partition|qos|nodelist)=", text)


@pytest.mark.parametrize("name", ["deepspeed.sh", "torchrun.sh", "mpirun.sh"])
def test_templates_without_a_config_say_how_they_are_used(name):
    done = subprocess.run([LAUNCH / name], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"launch/{name} " in done.stderr and "CONFIG.yaml" in done.stderr and "#" not in done.stderr


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_copy_all_that_the_installation_reads(recipe):
    root = LAUNCH.parent
    copied = set()
    for line in recipe.read_text().splitlines():
        words = line.split()
        if words[:1] == ["COPY"]:
            copied |= set(words[1:-1])
        elif recipe.suffix == ".def" and len(words) == 2 and words[1].startswith("/opt/mmd2v/"):
            copied.add(words[0])
    assert all((root / name).exists() for name in copied)
    assert copied == {"setup.py", "pyproject.toml", "VERSION", "README.md", "mmd2v", "kernels"}
    # What setup.py opens beside itself.
    assert set(re.findall(r'ROOT / "(\w[\w.]*)"', (root / "setup.py").read_text())) <= copied


def _pretend(folder: Path, **texts: str) -> dict[str, str]:
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (75, True)])
def test_job_of_the_template_queues_itself_again(tmp_path, status, requeued):
    environ = _pretend(tmp_path, srun=f'printf "%s\\n" "$@" >ran; exit {status}', scontrol='echo "$@" >>requeued')
    environ |= {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "3"}
    command = ["bash", LAUNCH / "srun.sbatch", "a b.yaml", "--name", "$HOME"]
    done = subprocess.run(command, env=environ, cwd=tmp_path, check=False, timeout=LONG)
    assert done.returncode == status
    assert (tmp_path / "ran").read_text().splitlines()[2:] == [
        *["--cpus-per-task=3", "python", "-m", "mmd2v", "train", "a b.yaml", "--name", "$HOME", "--resume", "auto"]
    ]
    log = tmp_path / "requeued"
    assert (log.read_text() == "requeue 7\n") if requeued else not log.exists()


def test_packages_that_cannot_be_installed_are_named(tmp_path):
    environ = _pretend(tmp_path, **{"apt-get": "exit 100", "dpkg-query": "exit 1", "sudo": '"$@"', "id": "echo 0"})
    done = subprocess.run([LAUNCH / "debian-packages.sh"], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "could not install: g++ make slurm-wlm munge openmpi-bin libopenmpi-dev" in done.stderr
