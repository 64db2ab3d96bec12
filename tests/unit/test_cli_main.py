"""The dispatcher: fast help, nearest command, exit statuses."""

import errno
import os
import subprocess
import sys

import pytest
from data_samples import encoded
from safetensors import SafetensorError

from mmd2v.cli import main as cli
from mmd2v.distributed.preemption import Preempted
from mmd2v.errors import ReportedByMainRank, UserError


def test_help_lists_every_command_without_torch():
    code = "import sys; from mmd2v.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, command in cli.COMMANDS.items():
        width = max(map(len, cli.COMMANDS))
        assert f"{name:<{width}}  {command.summary}" in result.stdout


def test_python_m_is_the_same_command():
    result = subprocess.run([sys.executable, "-m", "mmd2v", "trian"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "unknown name 'trian'. Did you mean 'train'?" in result.stderr
    assert "Traceback" not in result.stderr


def test_no_command_shows_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: mmd2v COMMAND" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mmd2v ")


def test_names_that_are_no_text_are_printed_all_the_same(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(encoded(0))
    (tmp_path / "in/a.txt").write_text("A caption.")
    name = os.fsdecode(os.fsencode(tmp_path) + b"/in/\xff.jpg")
    open(name, "w").close()
    command = [sys.executable, "-m", "mmd2v", "data", "pack", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([*command, "--skip-bad"], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"in/\udcff.jpg" in done.stdout and b"1 images" in done.stdout


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("no"), 2, "error: no\n"),
        (ReportedByMainRank("no"), 2, ""),
        (KeyboardInterrupt(), 130, ""),
        (Preempted("SIGTERM: saved"), 75, "SIGTERM: saved\n"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.json"),
            2,
            "error: out.json: the disk is full or a quota is reached (No space left on device)\n",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "error: out: Permission denied\n"),
        (SafetensorError("I/O error"), 2, "error: a safetensors file could not be read or written: I/O error\n"),
    ],
)
def test_statuses(monkeypatch, capsys, error, status, text):
    monkeypatch.setattr(cli, "GRACE_SECONDS", 0)

    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr("mmd2v.cli.train.main", fail)
    assert cli.main(["train"]) == status
    assert capsys.readouterr().err == text


def test_mistakes_of_ours_keep_their_traceback(monkeypatch):
    def fail(argv: list[str]) -> int:
        raise KeyError("forgotten")

    monkeypatch.setattr("mmd2v.cli.train.main", fail)
    with pytest.raises(KeyError):
        cli.main(["train"])


def test_another_rank_says_who_it_is(monkeypatch, capsys):
    def fail(argv: list[str]) -> int:
        raise UserError("no image here")

    monkeypatch.setattr("mmd2v.cli.train.main", fail)
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "error (rank 3): no image here\n"


def test_config_error_is_told_by_one_rank_of_a_node(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "GRACE_SECONDS", 0)
    monkeypatch.setenv("RANK", "1")
    for local_rank, text in (("1", ""), ("0", "error (rank 1): command line: config file")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert cli.main(["train", str(tmp_path / "absent.yaml")]) == 2
        found = capsys.readouterr().err
        assert found.startswith(text) if text else found == ""


def test_launchers_extra_argument_is_ignored(monkeypatch):
    seen = []
    monkeypatch.setattr("mmd2v.cli.train.main", lambda argv: seen.append(argv) or 0)
    assert cli.main(["--local_rank=1", "train", "c.yaml"]) == 0
    assert seen == [["c.yaml"]]
