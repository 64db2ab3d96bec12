"""`mmd2v doctor --node` among real processes, one of them on a node that is not fit."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from waiting import LONG, free_port

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
DOCTOR = [sys.executable, "-m", "mmd2v", "doctor", "--node"]
PATIENT = ["--timeout", str(LONG)]  # for processes that begin one after the other on a busy machine


def _ranks(
    arguments: dict[int, list[str]], size: int, environ: dict[int, dict[str, str]] | None = None
) -> dict[int, tuple[int, str, str]]:
    """Start some ranks of ``size`` on nodes node0, node1, …; return (status, output, errors) of each."""
    port = str(free_port())
    processes = {}
    for rank, own in arguments.items():
        launched = {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "SLURMD_NODENAME": f"node{rank}",
        }
        processes[rank] = subprocess.Popen(
            [*DOCTOR, *own],
            env=ENVIRONMENT | launched | (environ or {}).get(rank, {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    told = {rank: process.communicate(timeout=LONG) for rank, process in processes.items()}
    return {rank: (processes[rank].returncode, *told[rank]) for rank in processes}


def test_node_with_another_run_folder_is_named(tmp_path):
    shared, own, file = tmp_path / "runs" / "shared", tmp_path / "own", tmp_path / "found.json"
    own.mkdir()
    told = _ranks(
        {
            0: ["--run-dir", str(shared), "--json", str(file), *PATIENT],
            1: ["--run-dir", str(own), *PATIENT],
            2: ["--run-dir", str(shared), *PATIENT],
        },
        3,
    )
    assert [status for status, _, _ in told.values()] == [1, 1, 1], told
    assert "bad: node1 (rank 1) (of 3 nodes)" in told[0][1], told
    assert f"{own} does not hold what rank 0 wrote (node0 (rank 0)): not shared" in told[0][1]
    assert told[1][1] == told[2][1] == ""  # rank 0 alone talks
    assert sorted(tmp_path.iterdir()) == [file, own]  # what was made for the check is gone

    nodes = json.loads(file.read_text())["nodes"]
    assert [node["node"] for node in nodes] == ["node0", "node1", "node2"]
    checks = {found["check"]: found for found in nodes[2]["found"]}
    assert checks["link"]["level"] != "error" and "node2 (rank 2) → node0 (rank 0) by gloo" in checks["link"]["what"]
    assert checks["clock"]["level"] == "ok" and checks["shared folder"]["level"] == "ok"


def test_rank_that_never_comes_is_named():
    with ThreadPoolExecutor() as both:  # two jobs at a time, each with one of its two ranks
        first, second = both.map(lambda rank: _ranks({rank: ["--timeout", "4"]}, 2)[rank], (0, 1))
    status, _, errors = first
    assert status == 1, first
    assert "rank(s) 1 did not come within 4 s; 1 of 2 ranks did (node0)" in errors
    status, _, errors = second
    assert status == 1, second
    assert "rank 0 did not answer at 127.0.0.1:" in errors and "node1 (rank 1)" in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.slow  # gloo on the other nodes waits half a minute
def test_node_that_others_cannot_reach_is_named():
    told = _ranks(dict.fromkeys(range(3), PATIENT), 3, {1: {"GLOO_SOCKET_IFNAME": "nonesuch"}})
    assert [status for status, _, _ in told.values()] == [1, 1, 1], told
    assert "no group by gloo: " in told[0][1] and "nonesuch" in told[0][1]
    assert told[0][1].splitlines()[-1] == "bad: node1 (rank 1) (of 3 nodes)"


def test_under_torchrun(tmp_path):
    launcher = Path(sys.executable).with_name("torchrun")
    result = subprocess.run(
        [launcher, "--nproc-per-node", "2", f"--master-port={free_port()}", "-m", "mmd2v", "doctor", "--nodes",
         "--run-dir", str(tmp_path / "run"), "--ranks", "2", *PATIENT],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=LONG,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 node: fit" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_alone():
    result = subprocess.run(
        [*DOCTOR, "--gpus", "63"], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=LONG
    )
    assert result.returncode == 1, result.stderr
    assert "expected 63" in result.stdout and result.stdout.splitlines()[-1].startswith("bad: ")
