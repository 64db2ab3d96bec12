"""The cache by itself: claims, its bound, and many processes that are killed while they use it."""

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import LONG, wait_until

from mmd2v.data import shard_cache
from mmd2v.data.damage import DamageKind
from mmd2v.data.shard_cache import FAILURE_KEPT, NoRoom, ShardCache, cache_name
from mmd2v.errors import UserError


def bring(cache, name, size):
    """Put an entry into the cache; its descriptor, which must be closed."""
    with cache.claim(name) as claim:
        claim.reserve(size)
        path = claim.temporary()
        with open(path, "wb") as handle:
            handle.write(name.encode()[:1] * size)
        return claim.commit(path)


def entries(cache):
    return {name for name in os.listdir(cache.folder) if not name.startswith(".")}


@settings(deadline=None, max_examples=40)
@given(steps=st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 60), st.booleans()), max_size=25))
def test_any_history_stays_within_the_bound(tmp_path_factory, steps):
    cache = ShardCache(str(tmp_path_factory.mktemp("cache")), 100)
    open_, sizes = {}, {}
    for name, size, close in steps:
        handle = cache.open(name)
        if handle is None:
            needed = sum(sizes[other] for other in open_)
            if needed + size > 100:
                with pytest.raises(NoRoom):
                    bring(cache, name, size)
                continue
            handle = bring(cache, name, size)
            sizes[name] = size
        open_.setdefault(name, []).append(handle)
        assert os.pread(handle, 100, 0) == name.encode() * sizes[name]
        assert cache.usage() <= 100 and set(open_) <= entries(cache)
        if close:
            for other in open_.pop(name):
                shard_cache.close(other)
    for handles in open_.values():
        for handle in handles:
            shard_cache.close(handle)
    assert not [name for name in os.listdir(cache.folder) if name.startswith(".") and name != ".lock"]


def test_the_least_recently_used_goes_first(tmp_path):
    cache = ShardCache(str(tmp_path), 100)
    for name in "abc":
        shard_cache.close(bring(cache, name, 30))
        os.utime(tmp_path / name, (ord(name), ord(name)))
    shard_cache.close(cache.open("a"))  # now the newest
    shard_cache.close(bring(cache, "d.idx", 10))
    os.utime(tmp_path / "d.idx", (1, 1))
    shard_cache.close(bring(cache, "e", 30))
    assert entries(cache) == {"a", "c", "d.idx", "e"}, "b was oldest; an index goes only after all shards"
    shard_cache.close(bring(cache, "f", 95))
    assert entries(cache) == {"f"}


def test_one_claim_at_a_time(tmp_path):
    cache, other = ShardCache(str(tmp_path), 100), ShardCache(str(tmp_path), 100)
    with cache.claim("a") as claim:
        assert other.claim("a") is None
        claim.reserve(70)
        with other.claim("b") as second, pytest.raises(NoRoom, match=r"needed 40 bytes, 70 of 100 are in use"):
            second.reserve(40)
    with other.claim("a") as again:
        again.reserve(100)  # what the first had reserved is free


def test_failures_are_remembered_for_a_while(tmp_path):
    cache = ShardCache(str(tmp_path), 100)
    assert cache.failure("a") is None
    cache.failed("a", DamageKind.SHARD_TRUNCATED, "why")
    kind, message = cache.failure("a")
    assert kind is DamageKind.SHARD_TRUNCATED and message.startswith("why (seen ")
    old = time.time() - FAILURE_KEPT - 1
    os.utime(tmp_path / ".a.failed", (old, old))
    assert cache.failure("a") is None
    cache.failed("a", DamageKind.SHARD_TRUNCATED, "why")
    shard_cache.close(bring(cache, "a", 10))
    assert cache.failure("a") is None, "it was fetched since"


def test_names():
    names = [cache_name(a, v) for a in ("s3://b/x.tar", "s3://c/x.tar", "pipe:cat 'a b' | x") for v in ("", "1")]
    assert len(set(names)) == 6 and all("/" not in name and len(name) < 100 for name in names)
    assert names[0].endswith("-s3_b_x.tar")
    assert "secret" not in cache_name("https://h/x.tar?sig=secret")


def test_bad_folders(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.source\.cache_dir: .*file cannot be written"):
        ShardCache(str(tmp_path / "file"), 100)
    monkeypatch.setenv("MMD2V_CACHE", str(tmp_path / "mine"))
    assert ShardCache(None, 100).folder == tmp_path / "mine"
    monkeypatch.setattr(os, "getuid", lambda: -5)
    with pytest.raises(UserError, match="belongs to another user"):
        ShardCache(None, 100)


@pytest.mark.parametrize("limit", [10**9, 4000])
def test_small_files_are_kept_without_a_look_at_all_others(tmp_path, monkeypatch, limit):
    cache = ShardCache(str(tmp_path), limit)
    looks, look = [], cache._entries
    monkeypatch.setattr(cache, "_entries", lambda: looks.append(1) or look())
    for number in range(2000):
        cache.put(f"{number}.idx", b"0123")
    assert len(looks) <= 1 if limit > 8000 else len(looks) < 200
    assert cache.usage() <= limit
    assert os.path.exists(tmp_path / "1999.idx") and len(entries(cache)) == min(2000, cache.usage() // 4)


def test_small_files_are_left_out_of_a_cache_that_is_in_use(tmp_path, monkeypatch):
    cache = ShardCache(str(tmp_path), 100)
    handle = bring(cache, "a", 100)
    now = [1000.0]
    monkeypatch.setattr(shard_cache, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    looks, look = [], cache._entries
    monkeypatch.setattr(cache, "_entries", lambda: looks.append(1) or look())
    for number in range(50):
        cache.put(f"{number}.idx", b"0")
    assert entries(cache) == {"a"} and len(looks) < 5
    shard_cache.close(handle)
    now[0] = cache._full_until
    cache.put("b.idx", b"0")
    assert entries(cache) == {"b.idx"}


def test_what_was_reserved_in_vain_is_free_again(tmp_path, monkeypatch):
    cache = ShardCache(str(tmp_path), 100)
    cache.put("b.idx", b"0")
    monkeypatch.setattr(cache, "_entries", lambda: pytest.fail("there is room"))
    for _ in range(5):
        with cache.claim("a") as claim:
            claim.reserve(60)


def test_a_small_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    cache = ShardCache(str(tmp_path), 100)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache.put("a.idx", b"0")
    cache.failed("a", DamageKind.SHARD_TRUNCATED, "why")
    assert os.listdir(tmp_path) == [".lock"]


def test_a_lock_that_fails_leaves_nothing_open(tmp_path, monkeypatch):
    cache = ShardCache(str(tmp_path), 100)
    shard_cache.close(bring(cache, "a", 10))
    before = len(os.listdir("/proc/self/fd"))

    def broken(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", broken)
        with pytest.raises(OSError, match="No locks available"):
            cache.open("a")
    assert len(os.listdir("/proc/self/fd")) == before


def as_of_nfs(handle, kind, flock=fcntl.flock):
    if kind & fcntl.LOCK_EX and fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    flock(handle, kind)


def no_locks(handle, kind):
    raise OSError(errno.ENOSYS, "Function not implemented")


def exclusive_alone(handle, kind, flock=fcntl.flock):
    flock(handle, kind & ~fcntl.LOCK_SH | fcntl.LOCK_EX if kind & fcntl.LOCK_SH else kind)


@pytest.mark.parametrize("flock", [no_locks, exclusive_alone, lambda handle, kind: None])
def test_locks_that_do_not_hold_are_found(tmp_path, monkeypatch, flock):
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"data\.source\.cache_dir: .* cannot be locked .*, expected a local disk"):
        ShardCache(str(tmp_path), 100)


def test_eviction_where_exclusive_locks_need_a_file_open_for_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", as_of_nfs)
    cache = ShardCache(str(tmp_path), 100)
    shard_cache.close(bring(cache, "a", 60))
    shard_cache.close(bring(cache, "b", 60))
    assert entries(cache) == {"b"}


WORKER = """
import os, random, sys
from mmd2v.data.shard_cache import NoRoom, ShardCache
cache, chance = ShardCache(sys.argv[1], 1000), random.Random(int(sys.argv[2]))
print("begun", flush=True)
while not os.path.exists(sys.argv[3]):
    name = chance.choice("abcdefghij")
    size = 100 + 10 * ord(name)  % 100
    handle = cache.open(name)
    if handle is None:
        claim = cache.claim(name)
        if claim is None:
            continue
        with claim:
            try:
                claim.reserve(size)
            except NoRoom:
                continue
            path = claim.temporary()
            with open(path, "wb") as out:
                for _ in range(size):
                    out.write(name.encode())
                    out.flush()
            handle = claim.commit(path)
    assert os.pread(handle, 2000, 0) == name.encode() * size, name
    os.close(handle)
print("good")
"""


def test_processes_that_are_killed_do_no_harm(tmp_path):
    chance = random.Random(0)
    folder, enough = tmp_path / "cache", tmp_path / "enough"
    cache = ShardCache(str(folder), 1000)

    def start(number):
        arguments = [sys.executable, "-c", WORKER, str(folder), str(number), str(enough)]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)

    survivor, *victims = processes = [start(number) for number in range(3)]
    try:
        for process in processes:
            assert process.stdout.readline() == "begun\n"
        for victim in victims:
            for _ in range(60):
                time.sleep(0.012 + 0.01 * chance.random())
                with cache._exclusive():  # nothing is evicted while the entries are added up
                    assert cache.usage() <= cache.limit
            victim.send_signal(signal.SIGKILL)
            victim.communicate()
        wait_until(lambda: entries(cache))
        enough.touch()
        assert survivor.communicate(timeout=LONG)[0] == "good\n"
    finally:
        for process in processes:
            process.kill()
    for name in entries(cache):
        assert (folder / name).read_bytes() == name.encode() * (100 + 10 * ord(name) % 100)
