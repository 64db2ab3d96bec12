"""Output files: whole or absent, also after a kill; paths checked before long work; JSON that every reader accepts."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmd2v.errors import UserError
from mmd2v.files import atomic_path, check_output, naming, write_json, write_text

HANG = """
import sys
from mmd2v.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.mkdir()
    (temporary / "shard-000000.tar").write_bytes(bytes(1000))
    print("writing", flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_an_error_leaves_nothing_and_the_old_file_untouched(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_what_a_killed_process_left_is_removed_and_a_living_one_is_left_alone(tmp_path, caplog):
    command = [sys.executable, "-c", HANG, str(tmp_path / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    killed, living = (subprocess.Popen(command, **pipes) for _ in range(2))
    try:
        assert killed.stdout.readline() == living.stdout.readline() == b"writing\n"
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        (left,) = [name for name in names(tmp_path) if f"-{killed.pid}." in name]

        write_text(tmp_path / "out2", "another name")
        assert left in names(tmp_path)
        with atomic_path(tmp_path / "out") as temporary:
            assert left not in names(tmp_path) and f"{left}: removing" in caplog.text
            assert any(f"-{living.pid}." in name for name in names(tmp_path))
            temporary.mkdir()
        living.stdin.close()  # lets it finish: it finds the new folder empty, and replaces it
        assert living.wait() == 0
    finally:
        for process in (killed, living):
            process.kill()
            process.wait()
            process.stdout.close()
    assert names(tmp_path) == ["out", "out2"] and names(tmp_path / "out") == ["shard-000000.tar"]


def test_temporary_folders_of_other_hosts_and_strangers_are_left_alone(tmp_path):
    strangers = [".a.txt.0badc0de-999999999.x.tmp", ".a.txt.tmp", ".a.txt.swp"]
    for name in strangers:
        (tmp_path / name).mkdir()
    write_text(tmp_path / "a.txt", "x")
    assert names(tmp_path) == sorted([*strangers, "a.txt"])


def test_output_paths_are_checked_without_a_trace(tmp_path):
    (tmp_path / "file.txt").touch()
    check_output("--json", tmp_path / "new" / "deeper" / "a.json")
    check_output("--json", tmp_path / "file.txt")
    cases = [
        (tmp_path, {}, "is a folder, expected the name of a file"),
        (tmp_path / "file.txt", {"new": True}, r"file\.txt exists; name a new file or remove it"),
        (tmp_path / "file.txt" / "a.json", {}, r"cannot be written: .*file\.txt is no folder"),
        (Path("/proc/no/a.json"), {}, "cannot be written: /proc: "),
    ]
    for path, options, message in cases:
        with pytest.raises(UserError, match=f"^--json: .*{message}"):
            check_output("--json", path, **options)
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(UserError, match="Permission denied"):
        check_output("--json", tmp_path / "closed" / "a.json")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_holds_finite_numbers_only(tmp_path, number):
    with pytest.raises(UserError, match=rf"a\.json: final\.losses\.1 is {number}, which JSON cannot hold"):
        write_json(tmp_path / "a.json", {"final": {"losses": [1.0, number]}, "name": "ü"})
    with pytest.raises(UserError, match=f"its value is {number}"):
        write_json(tmp_path / "a.json", number)
    assert names(tmp_path) == []
    write_json(tmp_path / "a.json", {"final": {"losses": [1.0, 2]}, "name": "ü"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["name"] == "ü"


def test_files_are_as_readable_as_any_new_file(tmp_path):
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "inner").touch(mode=0o600)
    with atomic_path(tmp_path / "file") as temporary:
        temporary.touch(mode=0o600)
    plain = tmp_path / "plain"
    plain.write_text("")
    for path in (tmp_path / "folder" / "inner", tmp_path / "file"):
        assert path.stat().st_mode == plain.stat().st_mode


def test_error_of_an_open_file_is_given_its_name():
    with pytest.raises(OSError) as told, naming("metrics.jsonl"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert told.value.filename == "metrics.jsonl"
    with pytest.raises(FileNotFoundError) as told, naming("metrics.jsonl"):
        Path("/absent/other").read_bytes()
    assert told.value.filename == "/absent/other"  # it has a name of its own
