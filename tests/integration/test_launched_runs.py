"""The same job of two ranks by every launcher, by the templates of ``launch/``: the same losses, to the last bit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Cluster
from training_runs import make_data, write_config
from waiting import LONG, free_port

from mmd2v.train.metrics import read_metrics

LAUNCH = Path(__file__).parents[2] / "launch"
STEPS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    return write_config(folder / "run.yaml", make_data(folder), steps=STEPS, engine__zero_stage=1)


@pytest.fixture(scope="module")
def expected(config) -> dict[int, float]:
    """Losses by step under torchrun, an agent with one rank on each of two nodes (both are this machine)."""
    return _losses(_run_on_two_nodes(config, [LAUNCH / "torchrun.sh"], NODES=2))


def _environment(**more: object) -> dict[str, str]:
    """This process's environment with the interpreter of the tests in front, and nothing of a launcher around."""
    foreign = ("SLURM", "OMPI", "PMI", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return {**inherited, **own, "DS_ACCELERATOR": "cpu", **{name: str(value) for name, value in more.items()}}


def _start(config: Path, command: list[object], run_dir: Path, **environ: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*map(str, command), str(config), "--run_dir", str(run_dir)],
        env=_environment(**environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _run(config: Path, command: list[object], **environ: object) -> Path:
    run_dir = config.parent / "runs" / Path(str(command[0])).stem
    _end_well([_start(config, command, run_dir, **environ)])
    return run_dir


def _run_on_two_nodes(config: Path, command: list[object], **environ: object) -> Path:
    """Start ``command`` once for each node, as is done where no node reaches the others by ssh."""
    run_dir, port = config.parent / "runs" / Path(str(command[0])).stem, free_port()
    _end_well(
        [
            _start(config, command, run_dir, NODE_RANK=rank, HEAD="127.0.0.1", MASTER_PORT=port, **environ)
            for rank in (0, 1)
        ]
    )
    return run_dir


def _end_well(processes: list[subprocess.Popen[str]]) -> None:
    try:
        said = [process.communicate(timeout=LONG)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)


def _losses(run_dir: Path) -> dict[int, float]:
    environment = yaml.safe_load((run_dir / "environment.json").read_text())
    assert environment["ranks"] == 2  # and not twice one rank
    losses = {record["step"]: record["loss"] for record in read_metrics(run_dir / "metrics.jsonl") if "loss" in record}
    assert sorted(losses) == list(range(1, STEPS + 1))
    return losses


def test_deepspeed(config, expected):
    hosts = config.parent / "hosts"
    hosts.write_text("first-node slots=1\nsecond-node slots=1\n")
    assert _losses(_run_on_two_nodes(config, [LAUNCH / "deepspeed.sh", hosts])) == expected


def test_mpirun(config, expected):
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun here (launch/debian-packages.sh installs OpenMPI)")
    pytest.importorskip("mpi4py", reason="no mpi4py here (pip install 'mmd2v[mpi]')")
    # Root in a container, on a machine with fewer cores than ranks.
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": 1, "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": 1, "OMPI_MCA_rmaps_base_oversubscribe": 1}
    assert _losses(_run(config, [LAUNCH / "mpirun.sh"], RANKS=2, **allowed)) == expected


def test_srun_on_two_nodes(config, expected, slurm: Cluster):
    run_dir = config.parent / "runs" / "srun"
    log = config.parent / "srun.log"
    asked = ["--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}", f"--chdir={config.parent}"]
    environment = _environment(SLURM_CONF=slurm.environment["SLURM_CONF"])
    command = ["sbatch", *asked, str(LAUNCH / "srun.sbatch"), str(config), "--run_dir", str(run_dir)]
    job = int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    state = slurm.wait(job, {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL"}, LONG)
    assert state == "COMPLETED", log.read_text()
    assert _losses(run_dir) == expected
