"""What the checks of `mmd2v doctor` say of a machine that is not as it should be."""

import itertools
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from waiting import LONG

from mmd2v.cli import doctor as command
from mmd2v.cli.main import main
from mmd2v.distributed.launchers import Place
from mmd2v.doctor import alone, comparing, devices, folders, links, machine, sharing, software
from mmd2v.doctor.finding import Check, Finding, Named, Subject, TooSlow, ask_all, within, worst
from mmd2v.doctor.links import Link
from mmd2v.doctor.meeting import Apart, Meeting, call_roll, missing_message, node_name
from mmd2v.doctor.table import Outcome, by_node, render

ANY = Subject()
H100, A100 = "NVIDIA H100", "NVIDIA A100"


# ---------------------------------------------------------------------------------------- the registry


def test_a_check_that_fails_hides_no_other():
    def broken(subject):
        raise ValueError("no such thing")

    found = ask_all([Check("first", broken), Check("second", lambda subject: Finding("ok", "fine"))], ANY, LONG)
    assert [named.finding.level for named in found] == ["error", "ok"]
    assert "ValueError: no such thing" in found[0].finding.what


def test_a_check_that_never_answers_is_named():
    held = threading.Event()
    checks = [
        Check("quick", lambda s: Finding("ok", "")),
        Check("stuck", lambda s: Finding("ok", str(held.wait(LONG)))),
    ]
    found = ask_all(checks, ANY, 0.5)
    assert [(named.check, named.finding.level) for named in found] == [("quick", "ok"), ("stuck", "error")]
    with pytest.raises(TooSlow):
        within(0.01, lambda: held.wait(LONG))
    held.set()


def test_worst_level_counts():
    levels = [Finding("ok", ""), Finding("error", ""), Finding("warning", "")]
    assert worst(levels) == "error" and worst(levels[::2]) == "warning" and worst([]) == "ok"


def test_every_check_of_a_node_answers_here(tmp_path):
    checks = alone.node_checks()
    assert len({check.name for check in checks}) == len(checks)
    found = ask_all(checks, Subject(run_dir=tmp_path), LONG)
    assert [named.check for named in found] == [check.name for check in checks]
    assert not [named for named in found if "could not be checked" in named.finding.what]


# -------------------------------------------------------------------------------------------- software


def test_package_that_is_missing_or_too_old():
    assert software.package("no-such-package", ">=2", ANY).level == "error"
    old = software.package("torch", ">=99.1", ANY)
    assert old.level == "error" and "expected >=99.1" in old.what and "pip install 'torch>=99.1'" in old.hint
    assert software.package("torch", ">=2.10", ANY).level == "ok"


def test_everything_mmd2v_needs_is_asked_for():
    names = [check.name for check in software.software_checks()]
    assert {"torch", "torchvision", "deepspeed", "triton", "xformers", "apex", "mpi4py", "C++ compiler"} <= set(names)
    assert "pytest" not in names  # an extra


def test_foreign_apex_is_told_from_nvidias(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert software.apex(ANY).level == "warning"
    (tmp_path / "apex" / "optimizers").mkdir()
    (tmp_path / "apex" / "optimizers" / "fused_adam.py").touch()
    assert software.apex(ANY).level == "ok"


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = software.compiler(ANY)
    assert found.level == "warning" and "launch/debian-packages.sh" in found.hint


def test_versions_that_differ_name_the_odd_node():
    same = {"python": "3.12.1", "torch": "2.14.1"}
    found = comparing.compare_versions([same, {**same, "torch": "2.13.0"}, same])
    assert list(found) == [1] and found[1].level == "error"
    assert "torch 2.13.0 (others 2.14.1)" in found[1].what and "python" not in found[1].what
    assert comparing.compare_versions([same, same]) == {}
    assert list(comparing.compare_versions([same, {"python": "3.12.1"}])) == [1]  # of two, the first counts


# --------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("seen", "driver", "subject", "level"),
    [
        ([H100] * 8, 8, Subject(gpus=8), "ok"),
        ([H100] * 7, 7, Subject(gpus=8), "error"),
        ([H100] * 8, 8, Subject(gpus=4), "error"),
        ([], None, ANY, "ok"),
        ([], None, Subject(gpus=0), "ok"),
        ([], None, Subject(device="cuda"), "error"),
        ([], 8, ANY, "error"),  # a torch for another driver
        ([], 8, Subject(device="cpu"), "ok"),
        ([H100], "Unable to determine the device handle", ANY, "error"),
        ([H100] * 2, 8, ANY, "ok"),  # CUDA_VISIBLE_DEVICES
    ],
)
def test_number_of_gpus(seen, driver, subject, level):
    assert devices.count_finding(seen, driver, subject).level == level


def test_missing_gpu_is_counted():
    found = devices.count_finding([H100] * 7, 7, Subject(gpus=8))
    assert "7 × NVIDIA H100" in found.what and "expected 8" in found.what and found.short == "7 GPUs"


def test_product_is_compared():
    assert devices.product_finding([torch.device("cpu")]).level == "ok"
    assert devices.product_finding([torch.device("meta")]).level == "error"  # a device that computes nothing


def test_wrong_product_is_noticed(monkeypatch):
    right = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: right(x).index_fill(0, torch.tensor([3]), 1.0))
    assert "wrong result" in devices.product_finding([torch.device("cpu")]).what


def test_gpu_that_somebody_uses():
    found = devices.gpu_memory_finding([(80 * 10**9, 80 * 10**9), (30 * 10**9, 80 * 10**9)])
    assert found.level == "warning" and "50.0 of 80.0 GB of GPU 1" in found.what and "GPU 0" not in found.what


def test_nvidia_smi_is_asked(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-2)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert devices._driver_says() == 2
    program.write_text("#!/bin/sh\necho 'NVML: Driver/library version mismatch'\nexit 18\n")
    assert devices._driver_says() == "NVML: Driver/library version mismatch"


def test_nodes_with_other_gpus():
    fewer = comparing.compare_gpus([[H100] * 8, [H100] * 7, [H100] * 8])
    assert list(fewer) == [1] and fewer[1].level == "error"
    other = comparing.compare_gpus([[H100] * 8, [H100] * 8, [A100] * 8])
    assert list(other) == [2] and other[2].level == "warning" and "8 × NVIDIA A100" in other[2].what
    assert comparing.compare_gpus([[], []]) == {}


# ------------------------------------------------------------------------------------------ the machine


def test_memory():
    assert machine.memory_finding(100e9).level == "ok"
    assert machine.memory_finding(3e9).level == "warning"
    assert machine.memory_finding(0.1e9).level == "error"
    container = machine.memory_finding(100e9, limit=8e9, used=7.9e9)
    assert container.level == "error" and "0.1 GB free (this job may use 8.0 GB)" in container.what


def test_limit_of_a_container_is_read(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("300\n")
    assert machine._limit_and_use(tmp_path) == (1000.0, 300.0)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._limit_and_use(tmp_path)[0] == machine._limit_and_use(tmp_path / "absent")[0] == float("inf")


def test_fewer_cores_than_ranks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert machine.cores(Subject(gpus=8)).level == machine.cores(Subject(ranks=2)).level == "warning"
    assert machine.cores(ANY).level == "ok"


def test_limits(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda what: (1024, 65536))
    files = machine.open_files(ANY)
    assert files.level == "warning" and "ulimit -n 65536" in files.hint
    monkeypatch.setattr(machine, "_INFINIBAND", tmp_path)
    assert machine.locked_memory(ANY).level == "ok"
    (tmp_path / "mlx5_0").mkdir()
    assert machine.locked_memory(ANY).level == "warning" and "mlx5_0" in machine.locked_memory(ANY).what


# ------------------------------------------------------------------------------------------------ disk


def test_disk_that_is_low():
    room = folders.Room(1e9, 20e9, "error", "free some")
    levels = [folders.room_finding(Path("runs"), free, None, room).level for free in (30e9, 5e9, 0.5e9)]
    assert levels == ["ok", "warning", "error"]
    assert folders.room_finding(Path("runs"), 30e9, 12, room).level == "warning"  # no inodes
    assert "runs: 0.5 GB free" in folders.room_finding(Path("runs"), 0.5e9, None, room).what


def test_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    found = folders.run_folder(Subject(run_dir=tmp_path / "file" / "run"))
    assert found.level == "error" and str(tmp_path / "file") in found.what and "no folder" in found.what
    unwritable = folders.run_folder(Subject(run_dir=Path("/proc/run")))
    assert unwritable.level == "error" and "/proc/run cannot be written" in unwritable.what


def test_run_folder_is_written_through_and_left_clean(tmp_path):
    found = folders.run_folder(Subject(run_dir=tmp_path))
    assert "written, read and renamed in" in found.what
    assert list(tmp_path.iterdir()) == []
    assert folders.run_folder(Subject(run_dir=tmp_path / "new")).level != "error"
    assert not (tmp_path / "new").exists()


def test_slow_disk(tmp_path, monkeypatch):
    real = os.fsync
    monkeypatch.setattr(folders.os, "fsync", lambda handle: (time.sleep(0.2), real(handle)))
    monkeypatch.setattr(folders, "_SLOW_WRITE", 0.1)
    assert folders.run_folder(Subject(run_dir=tmp_path)).level == "warning"


# ----------------------------------------------------------------------------------------------- clock


@pytest.mark.parametrize("ahead", [-500.0, -3.0, 0.0, 3.0, 500.0])
def test_offset_of_a_clock(ahead, monkeypatch):
    now, took = [1000.0], itertools.cycle([0.5, 0.25, 4.0])  # the quickest counts
    monkeypatch.setattr(links, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def ask() -> float:
        now[0] += next(took)
        return now[0]

    # The other's clock is read at the very end of the question: as far from its middle as can be.
    assert links.offset(ask, lambda: now[0] + ahead) == (ahead - 0.125, 0.125)


def test_clock_thresholds():
    assert [links.clock_finding(s, 0.01).level for s in (0.5, -2.0, 61.0, -3600.0)] == ["ok", "warning"] + ["error"] * 2
    assert links.clock_finding(2.0, 1.5).level == "ok"  # too slow an answer to tell
    assert "3,600.0 s behind rank 0's" in links.clock_finding(-3600.0, 0.01).what


# ----------------------------------------------------------------------------------------------- links

NAMES = ["a (rank 0)", "b (rank 1)", "c (rank 2)", "d (rank 3)"]


def _ring(**broken: str) -> list[Link]:
    return [Link("gloo", i, (i + 1) % 4, broken.get(f"from_{i}", ""), 1e9, 1e-4) for i in range(4)]


def test_link_that_fails_names_both_ends():
    found = links.judge_links(_ring(from_1="Connection reset"), NAMES)
    assert [rank for rank, own in found.items() if worst(own) == "error"] == [1, 2]
    assert "b (rank 1) → c (rank 2) by gloo: Connection reset" in found[2][0].what


def test_node_between_two_links_that_fail_is_the_bad_one():
    found = links.judge_links(_ring(from_1="timed out", from_2="timed out"), NAMES)
    assert [rank for rank, own in found.items() if worst(own) == "error"] == [2]
    assert links.suspects([Link("gloo", 0, 1, "x"), Link("nccl", 0, 1, "x")]) == {0, 1}  # one way, tried twice


def test_link_that_is_slow():
    ring = [*_ring()[:3], Link("gloo", 3, 0, "", 1e8, 1e-4)]
    found = links.judge_links(ring, NAMES)
    assert [own[0].level for _, own in sorted(found.items())] == ["ok", "ok", "ok", "warning"]
    assert "d (rank 3) → a (rank 0)" in found[3][0].what and "median of all links is 1,000 MB/s" in found[3][0].what
    assert links.judge_links([Link("gloo", 0, 1, "", 1e6, 1e-3)], NAMES)[0][0].level == "warning"


def test_who_is_at_fault_when_no_group_is_formed():
    waited, own = "wait timeout after 30000ms", "Unable to find address for: eth7"
    assert [links.at_fault([waited, own, waited], rank) for rank in range(3)] == [False, True, False]
    assert [links.at_fault([waited, waited], rank) for rank in range(2)] == [True, True]
    assert not links.at_fault([waited, None], 0)  # it waited for one that is silent
    assert not links.at_fault(["", own], 0)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 9])
def test_links_of_one_turn_share_no_rank(size):
    done: list[int] = []
    for rank in range(size):
        order = links._turns(size, rank)
        assert sorted(order) == sorted({rank, (rank - 1) % size})
    # Played through: a link is tried once both of its ends are there, and every rank gets to its end.
    waiting = {rank: links._turns(size, rank) for rank in range(size)}
    for _ in range(3):
        ready = [s for s in range(size) if waiting[s][:1] == [s] and waiting[(s + 1) % size][:1] == [s]]
        done += ready
        for sender in ready:
            waiting[sender].pop(0)
            waiting[(sender + 1) % size].pop(0)
    assert sorted(done) == list(range(size))


def test_block_that_arrives_changed(monkeypatch):
    """Two ends in one process: the second receives what the first sends, a bit of it flipped on the way."""
    pipes = {name: [] for name in "ab"}
    ready = threading.Condition()

    def send(x, to, group):
        with ready:
            value = x.clone()
            if value.dtype == torch.uint8:
                value[5] ^= 1
            pipes["b" if to == 1 else "a"].append(value)
            ready.notify_all()

    def recv(x, source, group):
        mine = pipes["a" if source == 1 else "b"]
        with ready:
            assert ready.wait_for(lambda: mine, LONG)
            x.copy_(mine.pop(0))

    monkeypatch.setattr(dist, "send", send)
    monkeypatch.setattr(dist, "recv", recv)
    block = torch.arange(64, dtype=torch.uint8)
    other = threading.Thread(target=links._receive, args=(block, 0, None), daemon=True)
    other.start()
    rate, latency = links._send(block, 1, None)
    other.join(LONG)
    assert rate == 0.0 and latency > 0


# -------------------------------------------------------------------------------------- the run's folder


def test_marker_is_seen_and_goes_away(tmp_path):
    run_dir = tmp_path / "new" / "run"
    with sharing.marker(run_dir) as placed:
        found = sharing.look_for(run_dir, placed, "node1")
        assert found.level == "ok" and "node1" in found.what
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_not_shared(tmp_path):
    (tmp_path / "other").mkdir()
    with sharing.marker(tmp_path / "run") as placed:
        empty = sharing.look_for(tmp_path / "other", placed, "node1", patience=0.1)
        absent = sharing.look_for(tmp_path / "absent", placed, "node1", patience=0.1)
    assert empty.level == absent.level == "error"
    assert "does not hold what rank 0 wrote (node1): not shared" in empty.what and "is not there" in absent.what


def test_marker_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with sharing.marker(tmp_path / "file" / "run") as placed:
        assert placed is None
    assert sharing.look_for(tmp_path, None, "node1").level == "error"


# ----------------------------------------------------------------------------------------- the roll-call


def _meetings(size: int) -> list[Meeting]:
    store = dist.HashStore()
    return [Meeting(Place("test", rank, size, 0, 1, "first", 1), 5, store) for rank in range(size)]


def test_everybody_comes():
    meetings = _meetings(3)
    names: dict[int, list[str]] = {}

    def come(meeting: Meeting) -> None:
        environ = {"SLURMD_NODENAME": f"node{meeting.place.rank}"}
        names[meeting.place.rank] = call_roll(meeting, LONG, environ)

    threads = [threading.Thread(target=come, args=(meeting,), daemon=True) for meeting in meetings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert names == {rank: ["node0", "node1", "node2"] for rank in range(3)}


def test_who_does_not_come_is_named():
    (first, *_) = _meetings(3)
    first.store.set("roll/2", json.dumps(["node3"]))
    slurm = {"SLURMD_NODENAME": "node1", "SLURM_STEP_NODELIST": "node[1-3]"}
    with pytest.raises(Apart, match=r"2 of 3 ranks did \(node1, node3\)") as told:
        call_roll(first, 0.2, slurm)
    assert str(told.value).startswith("node(s) node2 (rank(s) 1) did not come within 0 s; ")
    assert missing_message(["a", None], 1, {}).startswith("rank(s) 1 did not come within 1 s")
    assert missing_message(["a", None], 1, {"SLURM_STEP_NODELIST": "a["}).startswith("rank(s) 1 did")


def test_name_of_a_node():
    assert node_name({"SLURMD_NODENAME": "gpu7"}) == "gpu7"
    assert node_name({}) == os.uname().nodename


def test_rank_that_falls_silent_is_told_with_what_it_did():
    (first, second) = _meetings(2)
    second.at("trying its links by gloo")
    assert first.gather("report", {}, 0.1) == [{}, None]
    assert first.lost == {1}
    started = time.monotonic()
    assert first.gather("more", None, LONG) == [None, None]  # nobody waits for it again
    assert time.monotonic() - started < LONG / 2 and first.lost == {1}
    assert "since it began: trying its links by gloo" in comparing.silent(first.phase(1)).what
    assert first.phase(0) == "the roll-call"


# ----------------------------------------------------------------------------------------------- table


def test_table_names_the_bad_node():
    good = [Named("GPUs", Finding("ok", "8", short="8 GPUs")), Named("clock", Finding("ok", "", short="1.0 ms"))]
    bad = [good[0], Named("clock", Finding("error", "70.0 s ahead", "start chronyd", "70.0 s"))]
    outcome = Outcome(by_node(["node1", "node2"], [good, bad]))
    text = render(outcome)
    lines = text.splitlines()
    assert lines[0].split() == ["node", "ranks", "GPUs", "clock"]
    assert lines[2].split() == ["node2", "1", "8", "GPUs", "!", "70.0", "s", "error"]
    assert "node2 (rank 1):" in lines and "→ start chronyd" in text
    assert lines[-1] == "bad: node2 (rank 1) (of 2 nodes)"
    assert not outcome.fit and outcome.as_dict()["bad"] == ["node2"]
    assert Outcome(by_node(["node1", "node2"], [good, good])).fit


def test_ranks_of_a_node_are_told_apart():
    (node,) = by_node(["node1", "node1"], [[], [Named("clock", Finding("error", "70 s ahead"))]])
    assert node.found[0].finding.what == "rank 1: 70 s ahead" and str(node) == "node1 (ranks 0, 1)"


def test_number_of_ranks():
    assert comparing.count_of_ranks(2, 4).level == "error"
    assert comparing.count_of_ranks(4, 4).level == comparing.count_of_ranks(4, None).level == "ok"


# --------------------------------------------------------------------------------------------- command


def test_wrong_arguments(capsys, tmp_path):
    for arguments, said in (
        (["--node", "--timeout", "0"], "--timeout: found 0.0; expected more than 0"),
        (["--gpus", "-1"], "--gpus: found -1; expected 0 or more"),
        (["--ranks", "2"], "--ranks: only --node meets other ranks"),
        (["--config", str(tmp_path / "absent.yaml")], "absent.yaml"),
        (["--json", str(tmp_path)], "is a folder"),
    ):
        assert main(["doctor", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_config_says_where_and_on_what(tmp_path):
    from training_runs import write_config

    config = write_config(tmp_path / "my.yaml", tmp_path)
    subject = command._subject(command.Arguments(config=config, gpus=2))
    assert subject == Subject(tmp_path / "runs" / "my", 2, "cpu")
    assert command._subject(command.Arguments(config=config, run_dir=tmp_path)).run_dir == tmp_path


def test_command_tells_and_writes_what_is_wrong(tmp_path, capsys, monkeypatch):
    full, fine = Finding("error", "full", "free some"), Finding("ok", "")
    checks = [Check("disk", lambda subject: full), Check("other", lambda subject: fine)]
    monkeypatch.setattr(alone, "node_checks", lambda: checks)
    monkeypatch.setattr(alone, "software_checks", lambda: [])
    assert main(["doctor", "--json", str(tmp_path / "found.json")]) == 1
    said = capsys.readouterr().out
    assert "error    disk   full\n" in said and "→ free some" in said
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["fit"] is False and written["found"][0]["hint"] == "free some"
    checks.pop(0)
    assert main(["doctor"]) == 0


@pytest.mark.parametrize(
    ("cuda", "problem", "level"), [(True, "built for CUDA 12", "warning"), (True, None, "ok"), (False, "x", "ok")]
)
def test_xformers_whose_kernels_do_not_load_is_told_where_they_would_be_used(cuda, problem, level, monkeypatch):
    monkeypatch.setattr(software, "_has_cuda", lambda: cuda)
    monkeypatch.setattr(software, "installed", lambda name: "0.0.35")
    monkeypatch.setattr(software, "xformers_load_error", lambda: problem)
    finding = software.xformers(None)
    assert finding.level == level
    assert ("do not load: built for CUDA 12" in finding.what) == (level == "warning")
