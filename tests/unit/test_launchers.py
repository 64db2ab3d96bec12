"""Which rank a process is, by the variables of every launcher, and SLURM's lists of hosts."""

import builtins
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmd2v.distributed import compile_caches, launchers, mpi_meeting
from mmd2v.distributed.hostlist import counts, hosts
from mmd2v.distributed.launchers import ALONE, Place, announce, find_place
from mmd2v.errors import ReportedByMainRank, UserError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "5",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}


def known(host: str) -> bool:
    return True


def unknown(host: str) -> bool:
    return False


# ------------------------------------------------------------------------------------- every launcher


def test_nothing_launched_this_process():
    assert find_place({}) == ALONE
    assert find_place({"MASTER_ADDR": "left", "MASTER_PORT": "over"}) == ALONE


def test_batch_script_without_srun_is_alone():
    assert find_place(BATCH_SCRIPT) == ALONE


def test_torchrun():
    place = find_place(TORCHRUN)
    assert (place.rank, place.size, place.local_rank, place.local_size) == (5, 8, 1, 4)
    assert (place.address, place.port) == ("first", 29500)
    assert place.variables() == {name: TORCHRUN[name] for name in list(TORCHRUN)[:6]}


def test_deepspeed_calls_the_size_of_a_node_otherwise():
    environ = {name: value for name, value in TORCHRUN.items() if "LOCAL_WORLD" not in name and "ELASTIC" not in name}
    assert find_place(environ | {"LOCAL_SIZE": "4"}).local_size == 4
    assert find_place(environ).local_size is None


@pytest.mark.parametrize(
    "environ",
    [
        OPENMPI,
        {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"},
        {name.replace("OMPI", "MV2"): value for name, value in OPENMPI.items()},
        # mpirun starts its own servants through srun, one a node.
        OPENMPI | SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
    ],
)
def test_mpirun(environ):
    place = find_place(environ, known)
    assert (place.rank, place.size, place.local_rank, place.local_size) == (5, 8, 1, 4)
    assert (place.address, place.port) == (None, None) and mpi_meeting.needs_meeting(place)
    met = find_place(environ | {"MASTER_ADDR": "mine", "MASTER_PORT": "7"}, known)
    assert (met.address, met.port) == ("mine", 7) and not mpi_meeting.needs_meeting(met)


def test_mpirun_that_says_nothing_of_the_node():
    place = find_place({"PMI_RANK": "5", "PMI_SIZE": "8", "MASTER_ADDR": "mine", "MASTER_PORT": "7"})
    assert (place.local_rank, place.local_size) == (None, None) and mpi_meeting.needs_meeting(place)


def test_srun():
    place = find_place(SRUN, known)
    assert (place.rank, place.size, place.local_rank, place.local_size) == (5, 8, 1, 4)
    assert place.address == "gpu07"
    assert find_place(SRUN, unknown).address == "10.0.0.7"
    assert find_place(SRUN | {"MASTER_ADDR": "mine", "MASTER_PORT": "7"}, known).variables()["MASTER_PORT"] == "7"


def test_srun_with_pmi2_is_srun():
    assert find_place(SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}, known) == find_place(SRUN, known)


def test_srun_with_another_number_of_tasks_on_each_node():
    environ = SRUN | {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "5,2", "SLURM_LOCALID": "0"}
    assert find_place(environ, known).local_size == 2
    assert find_place(environ | {"SLURM_NODEID": "0"}, known).local_size == 5


def test_port_of_a_step_is_its_own():
    ports = [
        find_place(SRUN | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": restart}, known).port
        for job, step, restart in itertools.product(("77", "78", "79"), ("0", "1"), ("0", "1", "2"))
    ]
    assert len(set(ports)) == len(ports)  # by chance all different; they do not change
    assert all(20_000 <= port < 32_000 for port in ports if port is not None)
    # The same for every task.
    others = [find_place(SRUN | {"SLURM_PROCID": str(rank)}, known).port for rank in range(8)]
    assert set(others) == {find_place(SRUN, known).port}


def test_step_of_one_task_is_alone_whatever_the_environment_says_of_an_address():
    environ = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "MASTER_ADDR": "elsewhere"}
    assert find_place(environ, known).variables() == ALONE.variables()


def test_torchrun_in_the_tasks_of_srun():
    step = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert find_place(step | TORCHRUN, known) == find_place(TORCHRUN)
    own = TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert find_place(step | own, known).size == 1  # a torchrun of its own in every task


def test_srun_completes_what_a_script_exports():
    by_hand = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "mine"}
    place = find_place(SRUN | by_hand, known)
    assert (place.local_rank, place.local_size, place.address) == (1, 4, "mine")
    assert place.port == find_place(SRUN, known).port


# -------------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK, WORLD_SIZE set, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"),
        ({"RANK": "1"}, "RANK set, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT, WORLD_SIZE missing"),
        (TORCHRUN | {"RANK": "-1"}, "environment variable RANK: found '-1'; expected a whole number"),
        (TORCHRUN | {"RANK": "8"}, "gives rank 8 of 8; expected 0 to 7"),
        (TORCHRUN | {"RANK": "1", "WORLD_SIZE": "1"}, "gives rank 1 of 1"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "gives local rank 4 of 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "9 ranks on this node, but 8 in all"),
        (OPENMPI | {"OMPI_COMM_WORLD_RANK": "9"}, "OpenMPI gives rank 9 of 8"),
        (SRUN | {"SLURM_PROCID": ""}, "SLURM_STEP_NUM_TASKS set, but SLURM_PROCID missing; start it with srun"),
        (SRUN | {"SLURM_PROCID": "eight"}, "SLURM_PROCID: found 'eight'"),
        (SRUN | {"SLURM_STEP_NODELIST": "gpu[7"}, r"SLURM_STEP_NODELIST: 'gpu\[7' is no list of hosts"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4x2"}, "'4x2' is no list of counts"),
        (SRUN | {"SLURM_NODEID": "2"}, "SLURM_NODEID is 2, but SLURM_STEP_TASKS_PER_NODE=.* has fewer nodes"),
        (SRUN | {"MASTER_PORT": "any"}, "MASTER_PORT: found 'any'"),
        # A variable left from another run would make every task rank 0 of a run of its own.
        (
            SRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "found RANK=0, WORLD_SIZE=1, but srun started 8 processes and says this one is rank 5; unset",
        ),
        (
            OPENMPI | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "but OpenMPI started 8 processes",
        ),
    ],
)
def test_variables_that_cannot_be(environ, message):
    with pytest.raises(UserError, match=message):
        find_place(environ, known)


# ----------------------------------------------------------------------------------------- host lists


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a", ["a"]),
        ("a,b-1.example", ["a", "b-1.example"]),
        ("a[001-003,7],b", ["a001", "a002", "a003", "a7", "b"]),
        ("r[1-2]n[08-10]x", ["r1n08x", "r1n09x", "r1n10x", "r2n08x", "r2n09x", "r2n10x"]),
        ("a[9-11]", ["a9", "a10", "a11"]),
    ],
)
def test_host_lists(text, names):
    assert list(hosts(text)) == names


def test_first_of_many_hosts_costs_nothing():
    assert next(hosts("a[1-999999999999]")) == "a1"


@pytest.mark.parametrize("text", ["", "a[1", "a]1", "a[x-2]", "a[]", "a,,b", "a[1,]", "[1-2", "a[[1]]"])
def test_no_host_list(text):
    with pytest.raises(ValueError, match="is no list of hosts"):
        list(hosts(text))


name = st.text("abcxyz-", min_size=1, max_size=4)
span = st.tuples(st.integers(0, 200), st.integers(0, 12), st.integers(1, 4))


@given(st.lists(st.tuples(name, st.lists(span, max_size=3)), min_size=1, max_size=4))
def test_host_list_is_what_was_compressed(groups):
    entries, expected = [], []
    for prefix, spans in groups:
        inside = []
        for first, more, width in spans:
            numbers = [f"{number:0{width}d}" for number in range(first, first + more + 1)]
            inside.append(f"{numbers[0]}-{numbers[-1]}" if more else numbers[0])
            # A wider first number says how wide all are; a narrower one lets them grow: as SLURM writes them.
            expected += [prefix + number for number in numbers]
        entries.append(f"{prefix}[{','.join(inside)}]" if inside else prefix)
        expected += [] if inside else [prefix]
    assert list(hosts(",".join(entries))) == expected


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 5)), min_size=1, max_size=5))
def test_counts_are_what_was_compressed(runs):
    text = ",".join(f"{value}(x{times})" if times > 1 else str(value) for value, times in runs)
    assert counts(text) == [value for value, times in runs for _ in range(times)]


@given(st.dictionaries(st.sampled_from([*TORCHRUN, *OPENMPI, *SRUN]), st.text(max_size=8), max_size=8))
def test_any_environment_gives_a_place_or_a_message(environ):
    try:
        place = find_place(environ, known)
    except UserError as error:
        assert "environment" in str(error)
        return
    assert 0 <= place.rank < place.size


# ---------------------------------------------------------------------------------- before they meet


def _without_launcher() -> dict[str, str]:
    """This process's variables but a launcher's: tests that train in it leave some."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMPI_", "PMI_", "MV2_", "MASTER_", "LOCAL_", "TORCHELASTIC_"))
        and name not in ("RANK", "WORLD_SIZE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    }


@pytest.fixture
def bare(monkeypatch):
    """An environment without any launcher, restored afterwards."""
    clean = _without_launcher()
    monkeypatch.setattr(os, "environ", clean)
    return clean


@pytest.mark.parametrize("launched", [SRUN, OPENMPI])
def test_ranks_are_announced_before_they_meet(bare, launched):
    bare.update(launched)
    announce()
    said = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert {name: bare[name] for name in said} == said
    assert "MASTER_ADDR" not in bare and "MASTER_PORT" not in bare
    # What was announced changes nothing of what is found later.
    assert find_place(bare, known) == find_place(launched, known)


def test_nothing_is_announced_of_one_process_or_of_nonsense(bare):
    before = dict(bare)
    announce()
    assert bare == before
    bare["SLURM_STEP_NUM_TASKS"] = "many"
    announce()
    assert "RANK" not in bare


@pytest.mark.parametrize(("local_rank", "expected"), [("0", UserError), ("1", ReportedByMainRank)])
def test_errors_before_the_ranks_meet_come_once_a_node(tmp_path, local_rank, expected):
    environ = {**_without_launcher(), **SRUN, "SLURM_LOCALID": local_rank, "SLURM_PROCID": str(4 + int(local_rank))}
    code = "import sys, mmd2v.cli.main as m; m.GRACE_SECONDS = 0; sys.exit(m.main(['train', 'absent.yaml']))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    if expected is UserError:
        assert done.stderr.startswith("error (rank 4): command line: config file 'absent.yaml' does not exist")
    else:
        assert done.stderr == ""


# ----------------------------------------------------------------------------------- without mpi4py


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Place("OpenMPI", 0, 8, 0, 4), r"does not say where the ranks meet: .*'mmd2v\[mpi\]'\), or set MASTER_ADDR"),
        (Place("MPICH", 0, 8, None, None, "a", 1), r"which of the ranks of a node this is: .*or set LOCAL_RANK"),
    ],
)
def test_missing_mpi4py_is_named(monkeypatch, place, message):
    real = builtins.__import__

    def refuse(module, *rest):
        if module.startswith("mpi4py"):
            raise ImportError("No module named 'mpi4py'")
        return real(module, *rest)

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=message):
        mpi_meeting.meet_by_mpi(place)


def test_own_address_is_one_to_be_reached_at():
    address = mpi_meeting.address_of_this_node()
    assert launchers._resolves(address)
    assert 0 < mpi_meeting.free_port() < 65536


# --------------------------------------------------------------------------------------- cache folders

MANY = Place("srun", 3, 8, 3, 8, "a", 1)


def test_every_rank_compiles_into_a_folder_of_its_own(tmp_path):
    environ = {"SLURM_TMPDIR": str(tmp_path / "node"), "TMPDIR": "/nowhere", "SLURM_JOB_ID": "77"}
    made = compile_caches.separate_caches(MANY, environ)
    assert set(made) == {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} and len(set(made.values())) == 2
    folder = Path(made["TRITON_CACHE_DIR"]).parent
    assert folder.parent == tmp_path / "node" and folder.name.endswith("77-rank3")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert compile_caches.separate_caches(MANY, environ) == made  # a second call finds its own


def test_what_is_set_stays_and_one_process_needs_none(tmp_path):
    environ = {"TMPDIR": str(tmp_path), "TRITON_CACHE_DIR": "mine"}
    assert set(compile_caches.separate_caches(MANY, environ)) == {"TORCHINDUCTOR_CACHE_DIR"}
    assert compile_caches.separate_caches(ALONE, {"TMPDIR": str(tmp_path)}) == {}


def test_folder_that_others_can_write_to_is_not_used(tmp_path):
    environ = {"TMPDIR": str(tmp_path)}
    first = Path(compile_caches.separate_caches(MANY, environ)["TRITON_CACHE_DIR"]).parent
    first.chmod(0o777)
    second = Path(compile_caches.separate_caches(MANY, environ)["TRITON_CACHE_DIR"]).parent
    assert second != first and second.stat().st_mode & 0o777 == 0o700
    second.rmdir()
