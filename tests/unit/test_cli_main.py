"""The dispatcher: fast help, nearest command, exit statuses."""

import subprocess
import sys

import pytest

from mmd2v.cli import main as cli
from mmd2v.errors import UserError


def test_help_lists_every_command_without_torch():
    code = "import sys; from mmd2v.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, command in cli.COMMANDS.items():
        assert f"{name:<6}  {command.summary}" in result.stdout


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


@pytest.mark.parametrize(
    ("error", "status", "text"), [(UserError("no"), 2, "error: no\n"), (KeyboardInterrupt(), 130, "")]
)
def test_statuses(monkeypatch, capsys, error, status, text):
    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr("mmd2v.cli.train.main", fail)
    assert cli.main(["train"]) == status
    assert capsys.readouterr().err == text


def test_launchers_extra_argument_is_ignored(monkeypatch):
    seen = []
    monkeypatch.setattr("mmd2v.cli.train.main", lambda argv: seen.append(argv) or 0)
    assert cli.main(["--local_rank=1", "train", "c.yaml"]) == 0
    assert seen == [["c.yaml"]]
