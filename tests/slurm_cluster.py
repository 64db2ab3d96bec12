"""A real SLURM cluster of two nodes on this machine: munged, one slurmctld and two slurmd, all on loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from waiting import LONG, free_port

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
_START_SECONDS = 300.0
NODES = ("node1", "node2")

# Two CPUs a node, whatever this machine has: the jobs of the tests ask for no more.
_CONFIG = """\
ClusterName=mmd2v
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=300
SlurmdTimeout=600
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=100000,bf_interval=2
{nodes}
PartitionName=main Nodes={names} Default=YES State=UP MaxTime=60
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster; commands are run against it with `environment`."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: object, check: bool = True) -> str:
        """Run one of SLURM's commands and return what it prints."""
        done = subprocess.run(
            list(map(str, command)), env=self.environment, capture_output=True, text=True, check=False, timeout=LONG
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: int) -> str:
        """JobState of a job, such as ``RUNNING``."""
        return self.fields(job)["JobState"]

    def fields(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)

    def wait(self, job: int, states: set[str], seconds: float) -> str:
        """Wait until the job is in one of ``states`` and return it; fail with the logs when it takes too long."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            if time.monotonic() > deadline:
                pytest.fail(f"job {job} is {state} after {seconds} s\n{self.fields(job)}\n{self.logs()}", pytrace=False)
            time.sleep(0.2)
        return state

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        texts = [(log.name, log.read_text(errors="replace")[-2000:]) for log in sorted(self.folder.glob("*.log"))]
        return "\n".join(f"== {name}\n{text}" for name, text in texts)


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    absent = [program for program in _PROGRAMS if not _program(program)]
    if absent:
        return f"no SLURM here: {', '.join(absent)} not found (launch/debian-packages.sh installs it)"
    if os.geteuid() != 0:
        return "the SLURM daemons need root"
    return None


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """The cluster, one for all tests of a session."""
    with two_nodes() as cluster:
        yield cluster


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """Start the cluster, yield it, and end every job and daemon of it. Skips the test where that is not possible."""
    if reason := missing():
        pytest.skip(reason)
    # A short path: the name of a socket has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        ports = [free_port() for _ in range(3)]
        host = socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        text = _CONFIG.format(
            folder=folder, host=host, controller_port=ports[0], nodes="\n".join(nodes), names=",".join(NODES)
        )
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text(f"CgroupPlugin={_cgroup_plugin()}\n")
        (folder / "state").mkdir()
        environment = _environment(folder)
        stack.callback(_end_rest, folder)
        _start_munge(stack, folder)
        cluster = Cluster(folder, environment)
        _start(stack, [_program("slurmctld"), "-D", "-i"], environment, folder / "slurmctld.out")
        for name in NODES:
            _start(stack, [_program("slurmd"), "-D", "-N", name], environment, folder / f"slurmd-{name}.out")
        # Before the daemons end: no job of the test may outlive it.
        stack.callback(_end_jobs, cluster)
        _wait_for_nodes(cluster)
        yield cluster


def _cgroup_plugin() -> str:
    """The plugin slurmd loads although nothing here uses cgroups; versions before 23.11 cannot do without."""
    words = subprocess.run([_program("slurmd"), "-V"], capture_output=True, text=True, check=True).stdout.split()
    version = tuple(int(part) for part in words[-1].split(".")[:2])
    return "disabled" if version >= (23, 11) else "autodetect"


def _environment(folder: Path) -> dict[str, str]:
    """This process's environment, of which a job inherits a copy, without any launcher's variables."""
    foreign = ("SLURM", "SBATCH", "PMI", "OMPI", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**inherited, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}


def _start_munge(stack: ExitStack, folder: Path) -> None:
    place = folder / "munge"
    place.mkdir(mode=0o755)
    key = place / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
    options = [f"--{option}={place / name}" for option, name in files.items()]
    # --force: the folders above belong to whom they belong.
    _start(stack, [_program("munged"), "--foreground", "--force", *options], dict(os.environ), folder / "munged.out")
    deadline = time.monotonic() + _START_SECONDS
    while not (place / "socket").exists():
        assert time.monotonic() < deadline, (folder / "munged.out").read_text()
        time.sleep(0.05)


def _start(stack: ExitStack, command: list[str], environment: dict[str, str], output: Path) -> None:
    with open(output, "w") as out:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    stack.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_jobs(cluster: Cluster) -> None:
    """Cancel what still runs or waits, and give it a little time."""
    cluster.run("scancel", "--user=root", check=False)
    deadline = time.monotonic() + 3
    while cluster.run("squeue", "--noheader", check=False).strip():
        if time.monotonic() > deadline:  # a failed test's, which ignores the signal or still saves
            _end_rest(cluster.folder)
            return
        time.sleep(0.2)


def _end_rest(folder: Path) -> None:
    """Kill every process of the cluster in ``folder``: SLURM's step daemons and their tasks are no children of ours."""
    configured = f"SLURM_CONF={folder / 'slurm.conf'}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            # A step daemon hides its environment, but writes to the log of its node.
            of_cluster = configured in (process / "environ").read_bytes().split(b"\0") or any(
                os.readlink(handle).startswith(f"{folder}/slurmd-") for handle in (process / "fd").iterdir()
            )
            if of_cluster and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)


def _wait_for_nodes(cluster: Cluster) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        states = cluster.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()
        if states == ["idle"] * len(NODES):
            return
        assert time.monotonic() < deadline, f"the nodes are {states}\n{cluster.logs()}"
        time.sleep(0.2)


def _program(name: str) -> str:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin") or ""
