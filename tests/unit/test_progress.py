import io

import pytest

from mmd2v.progress import Progress, duration, track


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (185, "3:05"), (7385, "2:03:05")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_plain_lines_without_a_terminal():
    stream = io.StringIO()
    with Progress("packing", 4, unit="images", stream=stream, every=0) as progress:
        for _ in range(4):
            progress.advance()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4  # the end is told once
    assert lines[0].startswith("packing: 1/4 images · ") and lines[0].endswith(" left")
    assert lines[-1].startswith("packing: 4/4 images · ")
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_few_lines():
    stream = io.StringIO()
    with Progress("reading", stream=stream, every=1e6) as progress:
        for _ in range(1000):
            progress.advance()
    assert len(stream.getvalue().splitlines()) == 1


def test_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress("packing", 10, unit="images", stream=stream) as progress:
        progress.advance(10)
    assert "10/10 images" in stream.getvalue()


def test_no_last_line_after_an_error():
    stream = io.StringIO()
    with pytest.raises(KeyError), Progress("packing", 3, stream=stream):
        raise KeyError
    assert stream.getvalue() == ""


def test_track(capsys):
    assert list(track([1, 2, 3], "reading", unit="files")) == [1, 2, 3]
    assert "reading: 3/3 files" in capsys.readouterr().err
    assert list(track(iter("ab"), "reading")) == ["a", "b"]
    assert "reading: 2 items" in capsys.readouterr().err
