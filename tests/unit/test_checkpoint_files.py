"""Checkpoints as they are written: copies that training does not reach, and nothing torn whatever goes wrong."""

import errno
import fcntl
import hashlib
import logging
import os
import pickle
import resource
import shutil
import threading
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_checkpoints import ALONE, FOUND, StubEngine, stub_engine, write_checkpoint
from safetensors import safe_open
from waiting import LONG

from mmd2v.config.training import CheckpointConfig
from mmd2v.errors import UserError
from mmd2v.train.checkpoints import direct_file
from mmd2v.train.checkpoints.checksums import verify
from mmd2v.train.checkpoints.choosing import choose_checkpoint
from mmd2v.train.checkpoints.direct_file import DirectFile
from mmd2v.train.checkpoints.folders import restore_replaced
from mmd2v.train.checkpoints.host_copy import HostBuffers
from mmd2v.train.checkpoints.manifest import read_manifest
from mmd2v.train.checkpoints.saving import Checkpointer
from mmd2v.train.checkpoints.writer import CheckpointWriter

MODEL_STATES = "mp_rank_00_model_states.pt"


def _weights(path: Path) -> torch.Tensor:
    return torch.load(path / MODEL_STATES, weights_only=True)["module"]["w"]


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def _manifest(step: int):
    return replace(FOUND, step=step, world_size=1)


@pytest.fixture
def gate(monkeypatch):
    """Holds the background thread back before every file until it is set."""
    gate = threading.Event()
    write = CheckpointWriter._write

    def gated(self, name, value):
        while not (gate.wait(0.01) or self._abandoned.is_set()):
            pass
        write(self, name, value)

    monkeypatch.setattr(CheckpointWriter, "_write", gated)
    yield gate
    gate.set()


# ------------------------------------------------------------------------------------ copies on the host


def _state() -> dict:
    flat = torch.arange(1000.0)
    module = OrderedDict(a=flat[:400].view(20, 20), b=flat[400:], again=flat[:400].view(20, 20))
    module._metadata = {"": {"version": 2}}
    return {
        "module": module,
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "parameter": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
        "plain": [1, 2.5, None, "x", (1, torch.tensor([7])), {"set": {1, 2}}],
        "shapes": [OrderedDict(a=torch.Size([20, 20]))],
        "dtype": torch.float16,
    }


def _same(a, b) -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)
    elif isinstance(a, dict):
        assert type(a) is type(b) and list(a) == list(b)
        for key in a:
            _same(a[key], b[key])
    elif type(a) in (list, tuple):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _same(x, y)
    else:
        assert type(a) is type(b) and a == b


def _copy(state, buffers=None):
    buffers = buffers or HostBuffers()
    buffers.begin()
    copied = buffers.copy(state)
    buffers.complete()
    return copied


def test_copy_is_equal_deep_and_shares_what_was_shared():
    state, expected = _state(), _state()
    copied = _copy(state)
    state["module"]["a"].zero_()
    state["plain"][5]["set"].add(3)
    state["plain"][4][1].zero_()
    _same(copied, expected)
    assert copied["module"]._metadata == {"": {"version": 2}}
    storages = {copied["module"][name].untyped_storage().data_ptr() for name in ("a", "b", "again")}
    assert len(storages) == 1


def test_views_of_one_buffer_are_written_once(tmp_path):
    flat = torch.arange(100_000.0)
    state = {str(i): flat[1000 * i : 1000 * (i + 1)] for i in range(100)}
    state["whole"] = flat
    torch.save(state, tmp_path / "direct.pt")
    torch.save(_copy(state), tmp_path / "copied.pt")
    assert (tmp_path / "copied.pt").stat().st_size <= (tmp_path / "direct.pt").stat().st_size + 100
    _same(torch.load(tmp_path / "copied.pt", weights_only=True), state)


def test_memory_is_used_again_and_not_hoarded():
    buffers = HostBuffers()
    first = _copy({"a": torch.ones(100), "b": torch.ones(300)}, buffers)
    places = {name: x.data_ptr() for name, x in first.items()}
    second = _copy({"b": torch.full((300,), 2.0), "a": torch.full((100,), 3.0)}, buffers)
    assert {name: x.data_ptr() for name, x in second.items()} == places
    assert second["a"].eq(3).all() and second["b"].eq(2).all()
    _copy({"c": torch.ones(7)}, buffers)
    assert [buffer.numel() for _, buffer in buffers._used] == [28] and not buffers._free


@pytest.mark.gpu
def test_copies_from_cuda_are_complete_and_page_locked():
    flat = torch.arange(4_000_000.0, device="cuda")
    state = {"a": flat[:1_000_000].view(1000, 1000), "b": flat[1_000_000:], "c": torch.ones(3, device="cuda").half()}
    expected = {name: x.cpu() for name, x in state.items()}
    buffers = HostBuffers()
    for _ in range(3):
        copied = _copy(state, buffers)
        flat.zero_()
        _same(copied, expected)
        assert (
            copied["a"].is_pinned()
            and copied["a"].untyped_storage().data_ptr() == copied["b"].untyped_storage().data_ptr()
        )
        flat.copy_(torch.arange(4_000_000.0))


def test_tensor_files_are_read_by_safetensors(tmp_path):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    tensors = {f"t/{dtype}": torch.arange(7).to(dtype) for dtype in (*dtypes, torch.int8, torch.uint8)}
    tensors |= {"bool": torch.tensor([[True], [False]]), "scalar": torch.tensor(1.5), "empty": torch.empty(0, 3)}
    tensors["transposed ü"] = torch.arange(6.0).view(2, 3).t()
    writer = CheckpointWriter(tmp_path, None)
    writer.add_tensors("file.safetensors", tensors, {"ranks": "2"})
    assert writer.error is None
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        assert file.metadata() == {"ranks": "2"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor) and file.get_tensor(name).dtype == tensor.dtype
    assert writer.files["file.safetensors"][0] == (tmp_path / "file.safetensors").stat().st_size


# ------------------------------------------------------------------------------------ beside the training


def test_training_that_goes_on_does_not_reach_the_files(tmp_path, gate):
    engine = stub_engine(1.0)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), ALONE)
    bank = torch.full((50,), 1.0)
    path = checkpointer.save(engine, _manifest(5), lambda to: to.add_tensors("bank.safetensors", {"rows": bank}))
    assert checkpointer.busy and checkpointer.pending
    assert checkpointer.newest is None and _names(tmp_path) == [".step-000005.tmp"]

    engine.files[MODEL_STATES]["module"]["w"].fill_(2.0)
    engine.files[MODEL_STATES]["global_steps"] = 4
    bank.fill_(2.0)
    gate.set()
    checkpointer.finish()
    assert not checkpointer.busy and not checkpointer.pending
    assert checkpointer.newest == path and _names(tmp_path) == ["step-000005"]
    assert torch.load(path / MODEL_STATES, weights_only=True)["global_steps"] == 3
    assert _weights(path).eq(1).all()
    with safe_open(path / "bank.safetensors", framework="pt") as file:
        assert file.get_tensor("rows").eq(1).all()
    manifest = read_manifest(path)
    assert set(manifest.files) == {*engine.files, "bank.safetensors"} and verify(path, manifest) == []
    checkpointer.finish()  # nothing is pending


def test_a_save_finishes_the_one_before(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), ALONE)
    for step in (1, 2, 3):
        checkpointer.save(stub_engine(step), _manifest(step))
    assert _names(tmp_path) == [".step-000003.tmp", "step-000001", "step-000002"]
    checkpointer.finish()
    checkpointer.close()  # waits for what is removed
    assert [int(_weights(path)[0]) for path in sorted((tmp_path / "checkpoints").iterdir())] == [2, 3]


def test_without_a_thread_the_checkpoint_is_there_at_once(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(asynchronous=False), ALONE)
    path = checkpointer.save(
        stub_engine(4), _manifest(5), lambda to: to.add_tensors("a.safetensors", {"x": torch.ones(2)})
    )
    assert not checkpointer.pending and verify(path, read_manifest(path)) == []
    assert checkpointer.newest == path and (path / "a.safetensors").is_file()


def test_closing_leaves_what_is_half_written_out_of_sight(tmp_path, gate):
    gate.set()
    before = write_checkpoint(tmp_path, 1)
    gate.clear()
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), ALONE)
    checkpointer.save(stub_engine(2), _manifest(2))
    checkpointer.close()
    assert not checkpointer.busy and not checkpointer.pending
    assert choose_checkpoint(tmp_path, "auto").path == before and _names(tmp_path) == [".step-000002.tmp", before.name]
    gate.set()
    write_checkpoint(tmp_path, 3)
    assert _names(tmp_path) == ["step-000001", "step-000003"]


# ---------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize(("keep", "left"), [(1, [50]), (2, [50, 100]), (3, [50, 90, 100])])
def test_checkpoint_just_written_is_never_pruned(tmp_path, keep, left):
    for step in (40, 90, 100):  # of a run that nobody set aside
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 50, keep=keep)
    assert _names(tmp_path) == [f"step-{step:06d}" for step in left]


def test_permanent_checkpoints_are_kept_beside_the_newest(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=2, permanent_every=20), ALONE)
    for step in (10, 20, 25, 30, 40):
        checkpointer.save(stub_engine(step), _manifest(step), permanent=step == 25)
    checkpointer.finish()
    assert _names(tmp_path) == [f"step-{step:06d}" for step in (10, 20, 25, 30, 40)]
    for step in (50, 55, 65):
        checkpointer.save(stub_engine(step), _manifest(step))
    checkpointer.finish()
    checkpointer.close()  # waits for what is removed
    assert _names(tmp_path) == [f"step-{step:06d}" for step in (20, 25, 40, 55, 65)]
    permanent = [read_manifest(path).permanent for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert permanent == [True, True, True, False, False]


def test_checkpoint_that_cannot_be_read_is_not_pruned(tmp_path):
    (write_checkpoint(tmp_path, 1) / "mmd2v.json").write_text("{")
    write_checkpoint(tmp_path, 2)
    write_checkpoint(tmp_path, 3, keep=1)
    assert _names(tmp_path) == ["step-000001", "step-000003"]


# ------------------------------------------------------------------------------------- what goes wrong


@pytest.fixture
def small_disk():
    """No file may grow beyond 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_full_disk(tmp_path, small_disk, asynchronous):
    before = write_checkpoint(tmp_path, 1)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(asynchronous=asynchronous), ALONE)
    message = (
        r"step-000002: the checkpoint could not be written \(rank 0: the disk is full or a quota is reached .*\); "
        "nothing of it was kept, the newest checkpoint is still .*step-000001$"
    )
    with pytest.raises(UserError, match=message):
        checkpointer.save(stub_engine(2, size=1_000_000), _manifest(2))
        checkpointer.finish()
    assert _names(tmp_path) == [before.name] and not checkpointer.pending
    checkpointer.save(stub_engine(3), _manifest(3))  # less than before, and it fits
    checkpointer.finish()
    assert choose_checkpoint(tmp_path, "auto").path == tmp_path / "checkpoints" / "step-000003"


def test_what_cannot_be_pickled_is_told_and_leaves_nothing(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), ALONE)
    checkpointer.save(StubEngine({MODEL_STATES: {"f": lambda: 0}}), _manifest(2))
    with pytest.raises(UserError, match=r"could not be written \(rank 0: .*pickle.*there is none before it") as error:
        checkpointer.finish()
    assert isinstance(error.value.__cause__, (AttributeError, pickle.PicklingError))
    assert _names(tmp_path) == []


def test_read_only_folder(tmp_path, monkeypatch):
    before = write_checkpoint(tmp_path, 1)

    def refused(self, *arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(UserError, match=r"step-000002: .* \(rank 0: Read-only file system\).* still .*step-000001"):
        Checkpointer(tmp_path, CheckpointConfig(), ALONE).save(stub_engine(), _manifest(2))
    monkeypatch.undo()
    assert choose_checkpoint(tmp_path, "auto").path == before


def test_folder_that_becomes_read_only_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    before = write_checkpoint(tmp_path, 1)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), ALONE)
    checkpointer.save(stub_engine(), _manifest(2))

    def refused(source, target):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(UserError, match=r"\(rank 0: Read-only file system\); nothing of it was kept"):
        checkpointer.finish()
    monkeypatch.undo()
    assert choose_checkpoint(tmp_path, "auto").path == before and not checkpointer.pending


@pytest.mark.parametrize("moment", ["before", "while writing"])
def test_run_directory_that_vanishes_is_not_made_anew(tmp_path, moment, gate):
    run = tmp_path / "run"
    gate.set()
    write_checkpoint(run, 1)
    checkpointer = Checkpointer(run, CheckpointConfig(), ALONE)
    message = rf"step-000002: the checkpoint could not be written: the run directory {run} is no longer there"
    if moment == "while writing":
        gate.clear()
        checkpointer.save(stub_engine(), _manifest(2))
    shutil.rmtree(run)
    gate.set()
    with pytest.raises(UserError, match=message):
        checkpointer.finish()
        checkpointer.save(stub_engine(), _manifest(2))
    assert not run.exists()


def test_older_checkpoints_that_cannot_be_removed_do_no_harm(tmp_path, monkeypatch, caplog):
    write_checkpoint(tmp_path, 1)
    replace_ = os.replace

    def refused(source, target):
        if Path(source).name == "step-000001":
            raise OSError(errno.EACCES, "Permission denied")
        replace_(source, target)

    monkeypatch.setattr(os, "replace", refused)
    with caplog.at_level(logging.WARNING):
        path = write_checkpoint(tmp_path, 2, keep=1)
    assert "older checkpoints could not be removed: Permission denied" in caplog.text
    assert choose_checkpoint(tmp_path, "auto").path == path


class Killed(BaseException):
    """Nothing of the code under test catches it."""


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("after", range(5))
def test_kill_between_any_two_renames_loses_nothing(tmp_path, monkeypatch, step, after):
    for earlier in (1, 2):
        write_checkpoint(tmp_path, earlier)
    rename, done = os.replace, []

    def killed(source, target):
        if len(done) == after:
            raise Killed
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    try:
        write_checkpoint(tmp_path, step, keep=1)
    except Killed:
        pass
    else:
        assert len(done) <= after  # all of them went through
    monkeypatch.undo()
    restore_replaced(tmp_path)
    choice = choose_checkpoint(tmp_path, "auto")
    assert choice.path is not None and choice.said == []
    found = int(choice.path.name.removeprefix("step-"))
    assert found in (2, step) and _weights(choice.path).eq(found).all()
    write_checkpoint(tmp_path, 4, keep=1)
    assert _names(tmp_path) == ["step-000004"]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 3 << 20, (8 << 20) + 4096, (16 << 20) + 5])
def test_what_is_written_past_the_page_cache_is_all_there(tmp_path, monkeypatch, size, direct):
    if not direct:  # as where the file system refuses
        monkeypatch.setattr(direct_file, "_DIRECT", 0)
    data = np.random.default_rng(0).bytes(size)
    with DirectFile(tmp_path / "file", threading.Event()) as file:
        for start in range(0, size, 700_001):
            assert file.write(data[start : start + 700_001]) == len(data[start : start + 700_001])
    assert (tmp_path / "file").read_bytes() == data
    assert (file.size, file.digest.hexdigest()) == (size, hashlib.sha256(data).hexdigest())


def test_device_that_takes_no_direct_writes_gets_others(tmp_path, monkeypatch):
    """Of some file systems one learns it at the first write."""
    real, refused = os.write, []

    def write(handle, data):
        if direct_file._DIRECT and fcntl.fcntl(handle, fcntl.F_GETFL) & direct_file._DIRECT:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(handle, data[: len(data) // 2 + 1])  # and a write may take less than it was given

    monkeypatch.setattr(direct_file.os, "write", write)
    data = bytes(range(256)) * 40_000
    with DirectFile(tmp_path / "file", threading.Event()) as file:
        file.write(data)
    assert (tmp_path / "file").read_bytes() == data
    assert len(refused) <= 1


def test_abandoned_file_is_not_written_on(tmp_path):
    abandoned = threading.Event()
    with pytest.raises(InterruptedError), DirectFile(tmp_path / "file", abandoned) as file:
        file.write(b"a")
        abandoned.set()
        file.write(b"b")
    assert file.size == 1


def test_checkpoint_that_is_replaced_goes_beside_the_training(tmp_path, monkeypatch):
    """Removing large files takes a file system a while, which no step waits for."""
    write_checkpoint(tmp_path, 1)
    may_go, remove = threading.Event(), shutil.rmtree

    def slowly(path, *arguments, **options):
        if Path(path).name == ".step-000001.tmp":
            may_go.wait(LONG)
        remove(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", slowly)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=1), ALONE)
    checkpointer.save(stub_engine(2), _manifest(2))
    checkpointer.finish()
    assert _names(tmp_path) == [".step-000001.tmp", "step-000002"]
    may_go.set()
    checkpointer.close()
    assert _names(tmp_path) == ["step-000002"]
