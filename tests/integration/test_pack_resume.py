"""A pack that is interrupted goes on where it stopped, and ends in the bytes of an uninterrupted one."""

import json
import os
import signal
import subprocess
import sys

import pytest
from data_samples import captions_of, encoded, leftovers, write_images, write_json
from waiting import LONG, wait_until

from mmd2v.data.manifest import read_manifest
from mmd2v.data.packing import pack
from mmd2v.data.partial import PartialFolder
from mmd2v.errors import UserError

SIZE = 5  # samples a shard

# Packs as the command does; with so many shards finished its main thread waits to be killed, however late that is.
HELD = """
import os, sys, time
from mmd2v.cli.main import main
from mmd2v.data.partial import PartialFolder
original, parent = PartialFolder.finished, os.getppid()
def finished(self, *arguments):
    original(self, *arguments)
    while len(self.written) >= int(sys.argv[1]) and os.getppid() == parent:
        time.sleep(0.01)
PartialFolder.finished = finished
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def source(tmp_path):
    write_images(tmp_path / "in", [f"{n:03d}.jpg" for n in range(60)])
    for n in (7, 23):
        (tmp_path / f"in/{n:03d}.jpg").write_bytes(encoded(n)[:200])
    entries = [{"image": f"{n:03d}.jpg", "caption": captions_of(n, 2)} for n in range(60)]
    return write_json(tmp_path / "in/c.json", entries)


def command(source, out, *more):
    return ["data", "pack", str(source), "--out", str(out), "--shard-size", str(SIZE), "--skip-bad", *more]


def shards_of(folder):
    return sorted(path.name for path in folder.glob("shards/*.tar.idx"))


def interrupt(source, out, number, at_least, *more):
    """Start packing, send a signal once some shards are finished; the exit status."""
    partial = out.with_name(out.name + ".partial")
    held = [sys.executable, "-c", HELD, str(at_least)]
    process = subprocess.Popen([*held, *command(source, out, *more)], stderr=subprocess.PIPE, text=True)

    def is_there():
        assert process.poll() is None, process.stderr.read()
        return len(shards_of(partial)) >= at_least

    try:
        wait_until(is_there)
        os.kill(process.pid, number)
        said = process.communicate(timeout=LONG)[1]
    finally:
        process.kill()
    return process.returncode, said


def run(source, out, *more):
    done = subprocess.run(
        [sys.executable, "-m", "mmd2v", *command(source, out, *more)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def same(a, b):
    assert leftovers(a) == leftovers(b)
    for name in leftovers(a):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_kill_minus_nine_and_on(source, tmp_path):
    pack(source, tmp_path / "whole", shard_size=SIZE, skip_bad=True, workers=1)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    assert interrupt(source, out, signal.SIGKILL, 2)[0] == -signal.SIGKILL
    assert not out.exists() and (partial / "journal.jsonl").exists()
    first = shards_of(partial)
    assert 2 <= len(first) < 11
    # Killed a second time, further on; and what was finished before is not written again.
    written = (partial / "shards" / first[0]).stat().st_mtime_ns
    assert interrupt(source, out, signal.SIGKILL, len(first) + 2)[0] == -signal.SIGKILL
    assert (partial / "shards" / first[0]).stat().st_mtime_ns == written
    # Other arguments, and another source, are refused; nothing is touched.
    before = leftovers(partial)
    with pytest.raises(UserError) as caught:
        pack(source, out, shard_size=SIZE, skip_bad=True, resize=20)
    other = "with other arguments (--resize: none then, 20 now)"
    assert str(caught.value).startswith(f"--out: {partial} holds an interrupted pack {other}")
    image = source.parent / "050.jpg"
    data, times = image.read_bytes(), (image.stat().st_atime_ns, image.stat().st_mtime_ns)
    image.write_bytes(encoded(3, width=60))
    with pytest.raises(UserError, match="of a source that has changed since"):
        pack(source, out, shard_size=SIZE, skip_bad=True)
    image.write_bytes(data)
    os.utime(image, ns=times)
    assert leftovers(partial) == before
    status, said = run(source, out)
    assert status == 0, said
    assert "going on behind" in said and "58 images, 116 captions, 12 shards" in said
    assert "left out 2 damaged ones" in said and "image 007.jpg" in said
    same(tmp_path / "whole", out)
    assert not partial.exists()


def test_control_c_keeps_the_finished_shards(source, tmp_path):
    pack(source, tmp_path / "whole", shard_size=SIZE, skip_bad=True)
    out = tmp_path / "out"
    status, said = interrupt(source, out, signal.SIGINT, 3)
    assert status == 130 and "Traceback" not in said
    assert "the same command goes on behind them" in said
    assert pack(source, out, shard_size=SIZE, skip_bad=True).samples == 58
    same(tmp_path / "whole", out)


def stop_after(monkeypatch, shards, error):
    """Make the journal fail once so many shards are in it."""
    original = PartialFolder.finished

    def finished(self, name, entry, state):
        original(self, name, entry, state)
        if len(self.written) == shards:
            raise error

    monkeypatch.setattr(PartialFolder, "finished", finished)


@pytest.mark.parametrize(
    "harm", ["torn journal", "journal without its last line", "lost shard", "lost index", "strays"]
)
def test_what_a_crash_may_leave(source, tmp_path, monkeypatch, harm):
    pack(source, tmp_path / "whole", shard_size=SIZE, skip_bad=True)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with monkeypatch.context() as patched:
        stop_after(patched, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(source, out, shard_size=SIZE, skip_bad=True)
    journal = partial / "journal.jsonl"
    text = journal.read_text()
    assert text.count("\n") == 5
    if harm == "torn journal":
        journal.write_text(text + '{"shard": "shard-000004.tar", "entry": [5')
    elif harm == "journal without its last line":
        journal.write_text("".join(line + "\n" for line in text.splitlines()[:-1]))
    elif harm == "lost shard":
        (partial / "shards/shard-000002.tar").unlink()
    elif harm == "lost index":
        (partial / "shards/shard-000003.tar.idx").unlink()
    else:
        (partial / "shards/shard-000004.tar").write_bytes(b"half")
        (partial / "shards/.x.tmp").mkdir()
    pack(source, out, shard_size=SIZE, skip_bad=True)
    same(tmp_path / "whole", out)
    assert not partial.exists()


def test_a_full_disk_keeps_the_finished_shards(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_after(patched, 2, OSError(28, "No space left on device"))
        with pytest.raises(UserError, match=r"the disk is full.*out\.partial keeps 2 finished shards"):
            pack(source, out, shard_size=SIZE, skip_bad=True)
    assert pack(source, out, shard_size=SIZE, skip_bad=True).samples == 58


def test_bad_input_leaves_nothing(source, tmp_path):
    before = leftovers(tmp_path)
    with pytest.raises(UserError, match=r"007.jpg: the image does not decode.* --skip-bad leaves such samples out"):
        pack(source, tmp_path / "out", shard_size=SIZE)
    assert leftovers(tmp_path) == before


def test_an_interrupt_before_the_first_shard_leaves_nothing(source, tmp_path, monkeypatch):
    before = leftovers(tmp_path)

    def interrupted(data, encoding, where):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmd2v.data.packing._as_jpeg", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", shard_size=SIZE, skip_bad=True)
    assert leftovers(tmp_path) == before


def test_two_processes_cannot_write_one_folder(source, tmp_path):
    out = tmp_path / "out"
    held = PartialFolder(out, {}, [])
    with pytest.raises(UserError, match=r"another process is writing .*out\.partial"):
        pack(source, out, skip_bad=True)
    held.remove()
    assert pack(source, out, skip_bad=True).samples == 58


def test_text_and_limits_resume_too(tmp_path, monkeypatch):
    rows = [{"text": f"Passage {n}. " * 9} if n != 8 else {"txt": ""} for n in range(30)]
    source = tmp_path / "c.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    options = {"shard_size": SIZE, "passage_words": 10, "skip_bad": True, "limit": 43}
    whole = pack(source, tmp_path / "whole", **options)
    assert whole.samples == 43 and whole.skipped == {"no_caption": 1}
    with monkeypatch.context() as patched:
        stop_after(patched, 6, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "out", **options)
    assert pack(source, tmp_path / "out", **options) == whole
    same(tmp_path / "whole", tmp_path / "out")


def test_edited_captions_of_a_folder_are_another_source(tmp_path, monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "out"
    write_images(folder, [f"{n:03d}.jpg" for n in range(20)])
    for n in range(20):
        (folder / f"{n:03d}.txt").write_text(captions_of(n)[0])
    with monkeypatch.context() as patched:
        stop_after(patched, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(folder, out, shard_size=SIZE)
    (folder / "015.txt").write_text("another caption")
    with pytest.raises(UserError, match="of a source that has changed since"):
        pack(folder, out, shard_size=SIZE)


def test_the_manifest_has_the_checksums(source, tmp_path):
    import hashlib

    pack(source, tmp_path / "out", shard_size=SIZE, skip_bad=True)
    manifest = read_manifest(str(tmp_path / "out"))
    assert len(manifest) == 12
    for name, entry in manifest.items():
        data = (tmp_path / "out" / name).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
