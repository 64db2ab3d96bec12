"""What the environment says of ranks and devices, and what it says wrongly."""

import pytest
import torch

from mmd2v.distributed import environment
from mmd2v.errors import UserError

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*LAUNCHED, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "DS_ACCELERATOR", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that whatever the code sets is undone
        monkeypatch.delenv(name)


def test_device_is_what_there_is_and_deepspeed_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.choose_device("auto") == "cpu"
    assert environment.os.environ["DS_ACCELERATOR"] == "cpu"
    with pytest.raises(UserError, match="found 'cuda', but torch sees no CUDA device"):
        environment.choose_device("cuda")


def test_device_that_deepspeed_would_not_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert environment.choose_device("auto") == "cpu"
    with pytest.raises(UserError, match="DS_ACCELERATOR is 'cpu'; unset it"):
        environment.choose_device("cuda")


def test_incomplete_launcher_is_named(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, LAUNCHED[name])
    with pytest.raises(UserError, match=r"RANK, WORLD_SIZE set, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"):
        environment.initialize("cpu")


def test_rank_that_is_no_number(monkeypatch):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UserError, match="environment variable RANK: found 'first'; expected a whole number"):
        environment.initialize("cpu")


def test_cores_are_shared_unless_threads_are_set(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: set(range(8)))
    environment._share_cores()
    assert threads == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    environment._share_cores()
    assert threads == [2]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    environment._share_cores()
    assert threads == [2]


def test_cores_that_srun_keeps_for_a_rank_are_its_own(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: set(range(8)))
    step = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_CPUS_PER_TASK": "6"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    environment._share_cores()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # a launcher of its own on each node: its ranks share the task
    environment._share_cores()
    assert threads == [6, 4]
