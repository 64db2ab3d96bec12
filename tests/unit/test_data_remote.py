"""Shards that are elsewhere: fetched from a real web server, a command, or any fsspec file system."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import ClassVar
from urllib.parse import urlsplit

import fsspec
import pytest
from data_samples import captions_of, encoded, make_shards, write_tar
from fsspec.implementations.local import LocalFileSystem
from shard_server import ShardServer
from waiting import LONG, wait_until

from mmd2v.config.schema import SourceConfig
from mmd2v.data import fetch, places, remote, shard_cache
from mmd2v.data.addresses import display
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.shard_cache import Claim, cache_name
from mmd2v.data.shards import INDEX_SUFFIX, ShardSet, expand_shards
from mmd2v.errors import UserError

SHARD = "shard-000001.tar"
PROMPT = 30.0  # seconds in which what takes a second must be done, on a busy machine too


@pytest.fixture(autouse=True)
def hanging(monkeypatch):
    """Only an attempt that hangs on purpose has the configured half second: a busy machine might need it for any other.

    Add to it what tells of an address whether the next attempt will hang.
    """
    tests = []

    def given_time(function):
        def call(address, *arguments, **named):
            if not any(test(address) for test in tests):
                arguments = [changed(a, timeout=LONG) if isinstance(a, SourceConfig) else a for a in arguments]
            return function(address, *arguments, **named)

        return call

    for module, name in (
        (remote, "download"),
        (remote, "ask"),
        (remote, "read_bytes"),
        (fetch, "read_bytes"),
        (places, "ask"),
    ):
        monkeypatch.setattr(module, name, given_time(getattr(module, name)))
    return tests


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("packed") / "set", 25, 10)


@pytest.fixture
def shards(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "web" / "set")


@pytest.fixture
def server(shards, hanging):
    with ShardServer(shards.parent) as server:
        hanging.append(lambda address: server.next_fault(os.path.basename(urlsplit(address).path)) == "stall")
        yield server


@pytest.fixture
def source(tmp_path):
    return SourceConfig(cache_dir=str(tmp_path / "cache"), retries=3, retry_delay=0.01, timeout=0.5, prefetch=2)


def changed(source, **fields):
    return source.model_copy(update=fields)


def cached(source):
    """Names of the shards in the cache, without their hash."""
    names = os.listdir(source.cache_dir) if os.path.isdir(source.cache_dir) else []
    return sorted(n[-len(SHARD) :] for n in names if n.endswith(".tar") and not n.startswith("."))


def hidden(source):
    """Temporaries, locks and marks of failures."""
    return sorted(name for name in os.listdir(source.cache_dir) if name.startswith(".") and name != ".lock")


def assert_all_samples(data, count=25):
    assert len(data) == count
    for n in (count - 1, 0, count // 2):
        sample = data.read(*data.locate(n))
        assert (sample.id, sample.captions) == (f"sample-{n:04d}", tuple(captions_of(n)))
        assert bytes(sample.image) == encoded(n) and not sample.image.readonly
    assert [captions[0] for captions in data.captions()] == [captions_of(n)[0] for n in range(count)]
    data.close()


# ------------------------------------------------------------------------------- where shards may be


@pytest.mark.parametrize("kind", ["folder", "braces", "list", "manifest", "file", "pipe", "two stages", "wildcard"])
def test_every_kind_of_address(server, shards, source, kind):
    spec = {
        "folder": f"{server.url}/set",
        "braces": f"{server.url}/set/shard-{{000000..000002}}.tar",
        "list": f"{server.url}/set/list.txt",
        "manifest": f"{server.url}/set/shards.json",
        "file": f"file://{shards}",
        "pipe": f"pipe:cat {shards}/shard-{{000000..000002}}.tar",
        "two stages": f"pipe:gzip -c {shards}/shard-{{000000..000002}}.tar | gzip -d",
        "wildcard": f"file://{shards}/shard-*.tar",
    }[kind]
    (shards / "list.txt").write_text(
        f"# comment\nshard-000000.tar  # first\n\n{server.url}/set/shard-{{000001..000002}}.tar\n"
    )
    assert_all_samples(ShardSet(spec, source=source))


@pytest.mark.parametrize("kind", ["http", "file"])
def test_folders_without_a_manifest_are_listed(server, shards, source, kind):
    (shards / "shards.json").unlink()
    server.lists = True
    assert_all_samples(ShardSet(f"{server.url}/set/" if kind == "http" else f"file://{shards}", source=source))


def test_an_empty_remote_folder(shards, source):
    for path in shards.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"folder file://.* holds no \.tar file"):
        ShardSet(f"file://{shards}", source=source)


def test_lists_of_local_shards(shards, tmp_path):
    (tmp_path / "list.txt").write_text(f"web/set/{SHARD}\n{shards}/shard-000000.tar\n")
    data = ShardSet(str(tmp_path / "list.txt"))
    assert [os.path.basename(path) for path in data.paths] == [SHARD, "shard-000000.tar"] and len(data) == 20
    assert ShardSet(str(shards / "shards.json")).counts.tolist() == [10, 10, 5]
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="names no shard"):
        ShardSet(str(tmp_path / "list.txt"))


@pytest.mark.parametrize(
    "entry",
    [
        "pipe:touch {ran}",
        "/etc/{{a,b}}.tar",
        "~/a.tar",
        "file:///etc/a.tar",
        "file:/etc/a.tar",
        "local:///etc/a.tar",
        "zip://a.tar::/etc/b.zip",
        "zip://a.tar::file:///etc/b.zip",
    ],
)
def test_a_list_from_an_address_reaches_nothing_of_this_machine(server, shards, source, tmp_path, entry):
    (shards / "list.txt").write_text(f"# shards\nshard-000000.tar\n{entry.format(ran=tmp_path / 'ran')}\n")
    with pytest.raises(UserError, match=r"/set/list\.txt line 3: found '.*', expected a name in the list's own folder"):
        ShardSet(f"{server.url}/set/list.txt", source=source)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../a.tar", "sub/a.tar", "sub\\a.tar", "/etc/a.tar", ".."])
def test_a_manifest_names_only_files_beside_it(server, shards, source, name):
    (shards / "shards.json").write_text(json.dumps({"version": 1, "shards": {name: [1, 1]}}))
    for spec in (f"{server.url}/set", str(shards)):
        with pytest.raises(
            UserError, match=r"shards\.json: found the shard name .*, expected the name of a file beside"
        ):
            ShardSet(spec, source=source)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("[1e999, 1]", r"shard 'a\.tar': found \[Infinity, 1\], expected \[samples, bytes, SHA-256\]"),
        ("[1%s, 1]" % ("0" * 24), "expected .* natural numbers"),
        ("[1, 1%s]" % ("0" * 24), "expected .* natural numbers"),
        ("[-1, 1]", "expected .* natural numbers"),
        ("[1.5, 1]", "expected .* natural numbers"),
        ("[true, 1]", "expected .* natural numbers"),
        ("[1]", "expected .* natural numbers"),
        ("[1, 1, 1]", "expected .* natural numbers"),
        ("[" * 100_000, r"shards\.json: cannot be read: "),
    ],
)
def test_damaged_manifests(shards, entry, message):
    (shards / "shards.json").write_text(f'{{"version": 1, "shards": {{"a.tar": {entry}}}}}')
    with pytest.raises(UserError, match=message):
        ShardSet(str(shards))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{url}/nothing", "no shards.json in it, and it cannot be listed: there is no such file"),
        ("{url}/list.txt", "there is no such file"),
        ("{url}/other.json", "is no manifest, expected a shards.json"),
        ("{url}/set/shard-{{0..", "unbalanced braces"),
        ("{url}/set/shard-000000.tar.gz", r"pipe:curl -sfL ADDRESS \| gzip -d"),
        ("file://{folder}/none-*.tar", "no file matches"),
        ("htpp://127.0.0.1/a.tar", "'htpp' is no protocol that fsspec knows. Did you mean 'http'"),
        ("s3://bucket/a.tar", "s3:// needs a package that is not installed: pip install s3fs"),
        ("pipe:cat 'a", "No closing quotation"),
        ("pipe:cat a | | gzip", "empty command"),
        ("pipe:cat a > b", "found '>', but the command runs without a shell"),
        ("pipe:no-such-program a", "'no-such-program' cannot be run: No such file"),
    ],
)
def test_bad_addresses(server, shards, source, spec, message):
    with pytest.raises(UserError, match=message):
        ShardSet(spec.format(url=server.url, folder=shards), source=source)


class Strict(LocalFileSystem):
    """Local files under a protocol of its own, with one option."""

    protocol = ("strict",)

    def __init__(self, token):
        assert token == "secret"
        super().__init__()


def test_storage_options_reach_the_file_system(shards, source):
    fsspec.register_implementation("strict", Strict, clobber=True)
    assert_all_samples(ShardSet(f"strict://{shards}", source=changed(source, storage_options={"token": "secret"})))
    with pytest.raises(
        UserError, match=r"data\.source\.storage_options: found \['nonsense'\], which the file system of"
    ):
        ShardSet(f"strict://{shards}", source=changed(source, storage_options={"nonsense": 1}))


# ------------------------------------------------------------------------------ counting the samples


def test_counts_come_from_the_cheapest_place(server, shards, source):
    def counted():
        server.requests.clear()
        spec = f"{server.url}/set/shard-{{000000..000002}}.tar"
        data = ShardSet(spec, source=source)
        data.close()
        assert data.counts.tolist() == [10, 10, 5]
        return {name for name, sizes in server.requests.items() if any(sizes)}

    assert counted() == {"shards.json"}
    (shards / "shards.json").unlink()
    (shards / "sizes.json").write_text(
        json.dumps({f"shard-00000{n}.tar": count for n, count in enumerate([10, 10, 5])})
    )
    assert counted() == {"sizes.json"}
    (shards / "sizes.json").unlink()
    assert counted() == {f"shard-00000{n}.tar{INDEX_SUFFIX}" for n in range(3)}
    assert counted() == set(), "indexes must be kept"
    shutil.rmtree(source.cache_dir)
    for path in shards.glob("*" + INDEX_SUFFIX):
        path.unlink()
    assert counted() == {f"shard-00000{n}.tar" for n in range(3)}
    for name in os.listdir(source.cache_dir):
        if name.endswith(".tar"):
            os.unlink(os.path.join(source.cache_dir, name))
    assert counted() == set(), "what a scan found must be kept"


def test_links_that_are_signed_one_by_one_ask_for_no_manifest(server, source):
    spec = [f"{server.url}/set/shard-00000{n}.tar?sig={n}" for n in range(3)]
    assert ShardSet(spec, source=source).counts.tolist() == [10, 10, 5]
    assert "shards.json" not in server.requests and "sizes.json" not in server.requests
    ShardSet([link.replace("sig=2", "sig=1").replace("sig=0", "sig=1") for link in spec], source=source)
    assert len(server.requests["shards.json"]) == 1


def test_limit_leaves_later_remote_shards_alone(server, shards, source):
    for path in [*shards.glob("*.json"), *shards.glob("*" + INDEX_SUFFIX)]:
        path.unlink()
    data = ShardSet(f"{server.url}/set/shard-{{000000..000002}}.tar", 12, source=changed(source, prefetch=0))
    assert data.counts.tolist() == [10, 2, 0]
    assert "shard-000002.tar" not in server.requests


@pytest.mark.parametrize(
    "content", ["[1]", '{"a.tar": -1}', '{"a.tar": 1e999}', "[" * 100_000, '{"a.tar": "x"}', "nonsense"]
)
def test_damaged_sizes(shards, source, content):
    (shards / "shards.json").unlink()
    (shards / "sizes.json").write_text(content)
    with pytest.raises(UserError, match=r"sizes\.json: expected a JSON object of shard name"):
        ShardSet(f"file://{shards}", source=source)


# ----------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("faults", "requests"),
    [([500, 503], 3), (["truncate"], 2), (["stall"], 2), (["garble"], 2), ([429, "truncate"], 3), (["slow"], 1)],
)
def test_faults_that_pass(server, source, faults, requests):
    server.faults[SHARD] = list(faults)
    data = ShardSet(f"{server.url}/set", source=changed(source, timeout=2.0))  # time to begin before it stalls
    assert data.read(1, 2).id == "sample-0012"
    assert len(server.requests[SHARD]) == requests
    assert cached(source) == [SHARD]
    data.close()
    wait_until(lambda: hidden(source) == [])


@pytest.mark.parametrize(
    ("fault", "attempts", "message"),
    [
        (404, 1, "there is no such file"),
        (403, 1, "the server answered 403"),
        (500, 4, r"\(4 attempts\): the server answered 500"),
        ("truncate", 4, r"\(4 attempts\): "),
        ("stall", 4, r"no byte came for 0.5 s \(data\.source\.timeout\)"),
        ("garble", 4, "found SHA-256 .*, expected .* by its manifest"),
    ],
)
def test_faults_that_stay(server, source, fault, attempts, message):
    server.always[SHARD] = fault
    data = ShardSet(f"{server.url}/set", source=source)
    samples = data.read_many([(0, 0), (1, 2), (1, 3), (2, 1)])
    assert [type(sample) for sample in samples[1:3]] == [Damage, Damage]
    assert samples[0].id == "sample-0000" and samples[3].id == "sample-0021"
    with pytest.raises(Damage, match=message) as caught:
        data.read(1, 2)
    assert caught.value.kind is DamageKind.SHARD_UNREADABLE and f"{server.url}/set/{SHARD}" in str(caught.value)
    assert len(server.requests[SHARD]) == attempts, "a shard that failed must not be tried for each sample"
    data.close()
    # Nor by another process of the node.
    again = ShardSet(f"{server.url}/set", source=source)
    with pytest.raises(Damage, match=r"seen \d+ s ago"):
        again.read(1, 0)
    assert len(server.requests[SHARD]) == attempts
    assert SHARD not in cached(source)
    again.close()


def test_manifest_of_another_size(server, shards, source):
    record = json.loads((shards / "shards.json").read_text())
    record["shards"][SHARD][1] += 512
    (shards / "shards.json").write_text(json.dumps(record))
    with pytest.raises(Damage, match=r"found 30,720 bytes, expected 31,232 by its manifest"):
        ShardSet(f"{server.url}/set", source=source).read(1, 0)


def test_a_page_is_no_shard(server, shards, source):
    (shards / "page.tar").write_text("<html>please log in</html>" * 100)
    with pytest.raises(Damage, match="not a readable, uncompressed tar"):
        ShardSet(f"{server.url}/set/page.tar", source=source)
    assert cached(source) == []


def test_secrets_stay_out_of_messages(server, source):
    with pytest.raises(Damage) as caught:
        ShardSet(f"http://me:word@{server.url.removeprefix('http://')}/set/no.tar?sig=key", source=source)
    assert "word" not in str(caught.value) and "key" not in str(caught.value) and "/set/no.tar?…" in str(caught.value)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:SECRET@h/set/a.tar?sig=SECRET", "https://h/set/a.tar?…"),
        ("s3://key:SECRET@bucket/a.tar?versionId=SECRET", "s3://bucket/a.tar?…"),
        ("abfs://container@account.net/a.tar", "abfs://container@account.net/a.tar"),
        ("zip://a.tar::https://me:SECRET@h/b.zip?sig=SECRET", "zip://a.tar::https://h/b.zip?…"),
        (
            "pipe:curl -H 'Authorization: Bearer SECRET' 'https://me:SECRET@h/a.tar?s=SECRET' | gzip -d",
            "pipe:curl … a.tar",
        ),
        ("pipe:fetch --token SECRET.SECRET", "pipe:fetch …"),
    ],
)
def test_addresses_are_shown_without_secrets(address, shown):
    assert display(address) == shown and "SECRET" not in cache_name(address)
    for spec in ([address, address], [address + "{"]):
        with pytest.raises(UserError) as caught:
            expand_shards(spec)
        assert "SECRET" not in str(caught.value)


def test_secrets_stay_out_of_what_libraries_say(source):
    import aiohttp

    for error in (
        aiohttp.InvalidURL("https://me:SECRET@h:port/a.tar?sig=SECRET"),
        ValueError("cannot open 'https://h/a.tar?sig=SECRET'"),
    ):
        assert "SECRET" not in fetch.describe(error, 1) and "https://h" in fetch.describe(error, 1)
    for spec in (
        "pipe:sh -c 'echo https://h/a.tar?SECRET >&2; exit 3' SECRET",
        "pipe:no-such SECRET",
        "pipe:cat SECRET > a",
    ):
        with pytest.raises(UserError) as caught:
            ShardSet(spec, source=changed(source, retries=0))
        assert "SECRET" not in str(caught.value), spec


def test_a_full_disk_under_a_command_is_no_damage(shards, source, tmp_path, monkeypatch):
    def temporary(claim):
        path = tmp_path / "full"
        path.symlink_to("/dev/full")
        return str(path)

    monkeypatch.setattr(Claim, "temporary", temporary)
    with pytest.raises(UserError, match=r"data\.source\.cache_dir: .* the disk is full") as caught:
        ShardSet(f"pipe:cat {shards}/{SHARD}", source=source)
    assert not isinstance(caught.value, Damage) and hidden(source) == []


NAP = f"sleep {2 * LONG:.0f}.{os.getpid()}"  # as no other test on this machine sleeps


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat {}/no.tar", "`cat .*no.tar` ended with status 1: cat: .*No such file"),
        ("cat {}/no.tar | cat", "`cat .*no.tar` ended with status 1"),
        ("cat {}/shard-000000.tar | false", "`false` ended with status 1"),
        ("NAP", "no byte came for 0.5 s"),
        ("cat {}/shard-000000.tar | NAP", "no byte came for 0.5 s"),
    ],
)
def test_commands_that_fail(shards, source, hanging, command, message):
    hanging.append(lambda address: NAP in address)
    start = time.monotonic()
    with pytest.raises(Damage, match=message):
        ShardSet("pipe:" + command.format(shards).replace("NAP", NAP), source=changed(source, retries=1))
    assert time.monotonic() - start < PROMPT
    found = subprocess.run(["pgrep", "-fx", NAP], capture_output=True, text=True).stdout.split()
    assert found == [], "an abandoned command must be ended"


def test_command_arguments_reach_no_shell(shards, source, tmp_path):
    odd = shards / "a b;touch $(x).tar"
    shutil.copy(shards / SHARD, odd)
    data = ShardSet(f"pipe:cat {shlex.quote(str(odd))}", source=source)
    assert data.read(0, 0).id == "sample-0010"
    data.close()


class Hanging(LocalFileSystem):
    """Local files of which the first transfer and the first piece never come."""

    protocol = ("hanging",)
    calls: ClassVar[list[str]] = []
    released = threading.Event()

    def get_file(self, path1, path2, **kwargs):
        self.calls.append("whole")
        if self.calls.count("whole") == 1:
            self.released.wait(2 * LONG)
        shutil.copyfile(path1, path2)

    def cat_file(self, path, start=None, end=None, **kwargs):
        if start is not None:
            self.calls.append("piece")
            if self.calls.count("piece") == 1:
                self.released.wait(2 * LONG)
        return super().cat_file(path, start, end, **kwargs)


def test_a_file_system_that_hangs_is_not_waited_for(shards, source, hanging):
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    try:
        for access, kind in (("cache", "whole"), ("range", "piece")):
            hanging[:] = [lambda address, kind=kind: address.endswith(SHARD) and kind not in Hanging.calls]
            start = time.monotonic()
            data = ShardSet(f"hanging://{shards}", source=changed(source, access=access))
            assert data.read(1, 2).id == "sample-0012"
            assert 0.5 <= time.monotonic() - start < PROMPT and Hanging.calls.count(kind) == 2
            data.close()
    finally:
        Hanging.released.set()


class Connecting(LocalFileSystem):
    """Local files behind a connection that hangs, or is refused, when the file system is made or a folder listed."""

    protocol = ("connecting",)
    released = threading.Event()
    refused = False
    hangs = "constructor"
    made = 0

    def __init__(self, **options):
        super().__init__(**options)
        Connecting.made += 1
        if self.refused:
            raise ConnectionRefusedError("refused")
        if self.hangs == "constructor":
            self.released.wait(2 * LONG)

    def ls(self, path, detail=False, **options):
        self.released.wait(2 * LONG)
        return super().ls(path, detail=detail, **options)


@pytest.mark.parametrize("hangs", ["constructor", "ls", "refused"])
@pytest.mark.parametrize("kind", ["folder", "wildcard", "file"])
def test_a_connection_that_hangs_or_is_refused_is_given_up(shards, source, monkeypatch, hanging, hangs, kind):
    fsspec.register_implementation("connecting", Connecting, clobber=True)
    (shards / "shards.json").unlink()
    monkeypatch.setattr(Connecting, "hangs", hangs)
    monkeypatch.setattr(Connecting, "refused", hangs == "refused")
    monkeypatch.setattr(Connecting, "made", 0)
    monkeypatch.setattr(Connecting, "released", threading.Event())
    if (hangs, kind) not in (("ls", "file"), ("refused", kind)):
        hanging.append(lambda address: True)
    spec = "connecting://" + {"folder": f"{shards}", "wildcard": f"{shards}/*.tar", "file": f"{shards}/{SHARD}"}[kind]
    start = time.monotonic()
    try:
        if (hangs, kind) == ("ls", "file"):
            assert len(ShardSet(spec, source=changed(source, retries=1, timeout=0.2))) == 10
            return
        with pytest.raises(UserError, match="refused" if hangs == "refused" else r"0\.2 s \(data\.source\.timeout\)"):
            ShardSet(spec, source=changed(source, retries=1, timeout=0.2))
        assert time.monotonic() - start < PROMPT and Connecting.made >= 2, "it must be tried again"
    finally:
        Connecting.released.set()


def test_what_cannot_succeed_is_not_repeated(source):
    calls = []

    def attempt_that_raises(error):
        def attempt():
            calls.append(1)
            raise error

        return attempt

    for error in (PermissionError("no"), FileNotFoundError("no"), NotImplementedError("no"), TypeError("no")):
        with pytest.raises(Damage):
            fetch.retrying(attempt_that_raises(error), "x://y", source, threading.Event())
    assert len(calls) == 4
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match=r"data\.source\.cache_dir: .* the disk is full"):
        fetch.retrying(attempt_that_raises(full), "x://y", source, threading.Event())


def test_pauses_grow_and_differ(source, monkeypatch):
    pauses = []

    class Stop(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)
            return False

    def attempt():
        raise OSError("always")

    with pytest.raises(Damage, match=r"\(13 attempts\)"):
        fetch.retrying(attempt, "x://y", changed(source, retries=12, retry_delay=0.5), Stop())
    bounds = [(0.5 * min(2**n * 0.5, 60), 1.5 * min(2**n * 0.5, 60)) for n in range(12)]
    assert all(low <= pause <= high for pause, (low, high) in zip(pauses, bounds, strict=True))
    assert len({round(pause / low, 3) for pause, (low, _) in zip(pauses, bounds, strict=True)}) > 6


# --------------------------------------------------------------------------------------- byte ranges


def test_ranges_bring_only_the_samples(server, shards, source):
    data = ShardSet(f"{server.url}/set", source=changed(source, access="range"))
    places = [(1, 3), (0, 9), (2, 0), (1, 0)]
    samples = data.read_many(places)
    assert [sample.id for sample in samples] == ["sample-0013", "sample-0009", "sample-0020", "sample-0010"]
    assert bytes(samples[0].image) == encoded(13)
    for shard in range(3):
        spans = [data.index(shard).span(row)[1] for s, row in places if s == shard]
        assert sorted(server.requests[f"shard-00000{shard}.tar"]) == sorted(spans)
    server.requests.clear()
    captions = data.read_many([(0, 4)], images=False)[0]
    assert captions.captions == tuple(captions_of(4)) and captions.image is None
    assert server.requests["shard-000000.tar"] == [data.index(0).spans[4, 1, 1]]
    assert cached(source) == []
    assert_all_samples(data)


def test_ranges_are_retried_and_fail_by_sample(server, source):
    server.faults[SHARD] = [500, "truncate", "stall"]
    server.always["shard-000002.tar"] = 404
    data = ShardSet(f"{server.url}/set", source=changed(source, access="range", retries=6))
    samples = data.read_many([(1, 1), (2, 1), (0, 1)])
    assert samples[0].id == "sample-0011" and samples[2].id == "sample-0001"
    assert isinstance(samples[1], Damage) and "there is no such file" in str(samples[1])
    data.close()


def test_a_slow_range_says_nothing_about_its_shard(server, source, hanging):
    hanging.append(lambda address: server.next_fault(os.path.basename(address)) == "slow")
    ranged = changed(source, access="range", retries=0)
    data = ShardSet(f"{server.url}/set", source=ranged)
    server.faults[SHARD] = ["slow"]
    with pytest.raises(Damage, match=r"bytes [\d,]+ to [\d,]+ were not complete within 0\.5 s \(data\.source\.timeout"):
        data.read(1, 1)
    assert data.read(1, 1).id == "sample-0011"
    server.faults[SHARD] = [403]
    with pytest.raises(Damage, match="403"):
        data.read(1, 2)
    with pytest.raises(Damage, match=r"403.*seen \d+ s ago"):
        data.read(1, 2)
    data.close()


def test_ranges_without_an_index_bring_no_shard(server, shards, source):
    (shards / "shards.json").unlink()
    spec = f"{server.url}/set/shard-{{000000..000002}}.tar"
    ranged = changed(source, access="range")
    assert ShardSet(spec, source=ranged).counts.tolist() == [10, 10, 5]
    (shards / f"shard-000002.tar{INDEX_SUFFIX}").unlink()
    shutil.rmtree(source.cache_dir)
    with pytest.raises(UserError, match=r"data\.source\.access: range needs an index beside each shard"):
        ShardSet(spec, source=ranged)
    assert sum(sum(server.requests[f"shard-00000{n}.tar"]) for n in range(3)) == 0


def test_ranges_need_an_index_and_a_server_that_knows_them(server, shards, source):
    ranged = changed(source, access="range")
    server.always["shard-000000.tar"] = "whole"
    with pytest.raises(
        UserError, match=r"does not answer requests for a range of bytes; use data\.source\.access: cache"
    ):
        ShardSet(f"{server.url}/set", source=ranged).read(0, 0)
    (shards / f"{SHARD}{INDEX_SUFFIX}").unlink()
    with pytest.raises(UserError, match=r"data\.source\.access: range needs an index beside each shard"):
        ShardSet(f"{server.url}/set", source=ranged).read(1, 0)


# --------------------------------------------------------------------------------------- the cache


def test_nothing_is_fetched_twice(server, source):
    for _ in range(2):
        data = ShardSet(f"{server.url}/set", source=source)
        assert_all_samples(data)
        data.close()
    assert {name: len(sizes) for name, sizes in server.requests.items() if name.endswith(".tar")} == {
        f"shard-00000{n}.tar": 1 for n in range(3)
    }


def test_a_cache_that_somebody_removes_is_made_again(server, source):
    data = ShardSet(f"{server.url}/set", source=source)
    data.read(0, 0)
    shutil.rmtree(source.cache_dir)
    assert data.read(0, 1).id == "sample-0001" and data.read(1, 0).id == "sample-0010"
    data.close()
    shutil.rmtree(source.cache_dir)
    with open(source.cache_dir, "w"), pytest.raises(UserError, match=r"data\.source\.cache_dir: .* cannot be "):
        data.read(2, 0)


def test_a_shard_that_was_packed_again_is_fetched_again(server, shards, source):
    ShardSet(f"{server.url}/set", source=source).read(1, 0)
    write_tar(shards / SHARD, [("new.jpg", encoded(99)), ("new.txt", b"other")])
    (shards / f"{SHARD}{INDEX_SUFFIX}").unlink()
    data = (shards / SHARD).read_bytes()
    record = json.loads((shards / "shards.json").read_text())
    record["shards"][SHARD] = [1, len(data), hashlib.sha256(data).hexdigest()]
    (shards / "shards.json").write_text(json.dumps(record))
    assert ShardSet(f"{server.url}/set", source=source).read(1, 0).captions == ("other",)


def test_without_a_manifest_the_server_tells_whether_a_shard_is_the_same(server, shards, source):
    for path in [shards / "shards.json", *shards.glob("*" + INDEX_SUFFIX)]:
        path.unlink()
    server.etags[SHARD] = "one"

    def first(signature):
        data = ShardSet(f"{server.url}/set/{SHARD}?sig={signature}", source=source)
        sample = data.read(0, 0)
        data.close()
        return sample.captions, sum(map(bool, server.requests[SHARD]))

    assert first("a") == first("b") == (tuple(captions_of(10)), 1), "a new signature is no new shard"
    write_tar(shards / SHARD, [("new.jpg", encoded(99)), ("new.txt", b"other")])
    server.etags[SHARD] = "two"
    assert first("c") == (("other",), 2)


def test_links_that_only_their_queries_tell_apart(server, shards, source):
    (shards / "shards.json").unlink()
    server.etags[SHARD] = "one"
    data = ShardSet([f"{server.url}/set/{SHARD}?id={n}" for n in range(2)], source=source)
    assert {data.read(n, 0).id for n in range(2)} == {"sample-0010"} and len(cached(source)) == 2
    data.close()


def test_a_thread_that_is_about_to_end_is_not_counted_on(server, source, monkeypatch):
    data = ShardSet(f"{server.url}/set", source=changed(source, prefetch=1))
    remote = data._remote
    release, work = threading.Event(), remote._work

    def slow_to_end():
        work()
        release.wait(LONG)

    monkeypatch.setattr(remote, "_work", slow_to_end)
    try:
        data.prefetch([0])
        wait_until(lambda: cached(source) == ["shard-000000.tar"] and not remote._threads)
        data.prefetch([0, 1])
        wait_until(lambda: SHARD in cached(source))
    finally:
        release.set()
        data.close()


def open_in(folder):
    """Descriptors of this process that are open in a folder; other threads may open and close others meanwhile."""
    links = [f"/proc/self/fd/{handle}" for handle in os.listdir("/proc/self/fd")]
    found = 0
    for link in links:
        with contextlib.suppress(OSError):
            found += folder in os.readlink(link)
    return found


def test_prefetch_works_ahead_and_leaves_nothing_behind(server, source, monkeypatch):
    others = threading.enumerate()  # such as those that other tests left hanging on purpose

    def threads():
        own = [thread for thread in threading.enumerate() if thread not in others]
        return [thread for thread in own if thread.name.startswith("mmd2v")]

    data = ShardSet(f"{server.url}/set", source=source)
    seen, work = [], data._remote._work
    monkeypatch.setattr(data._remote, "_work", lambda: (seen.extend(threads()), work()))
    data.prefetch([0, 1, 2])
    wait_until(lambda: cached(source) == [f"shard-00000{n}.tar" for n in range(3)])
    wait_until(lambda: not threads())
    assert seen
    server.always["shard-000001.tar"] = server.always["shard-000002.tar"] = 404
    assert data.read(1, 1).id == "sample-0011" and data.read(2, 1).id == "sample-0021"
    assert open_in(source.cache_dir) == 3
    data.close()
    assert open_in(source.cache_dir) == 0


def test_closing_ends_downloads(server, source):
    server.always[SHARD] = "stall"
    data = ShardSet(f"{server.url}/set", source=changed(source, timeout=2 * LONG))
    data.prefetch([1])
    wait_until(lambda: server.requests[SHARD])
    start = time.monotonic()
    data.close()
    assert time.monotonic() - start < PROMPT
    assert hidden(source) == [] and cached(source) == []


PROGRAM = """
import sys
from mmd2v.config.schema import SourceConfig
from mmd2v.data.shards import ShardSet
spec, folder, shard, timeout = sys.argv[1:]
source = SourceConfig(cache_dir=folder, retries=0, timeout=float(timeout))
print(ShardSet(spec, source=source).read(int(shard), 0).id, flush=True)
"""


def start(server, source, shard):
    arguments = [f"{server.url}/set", source.cache_dir, str(shard), str(LONG)]
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)


def test_processes_share_one_download(server, source):
    server.always[SHARD] = "slow"
    running = [start(server, source, 1) for _ in range(2)]
    assert [process.communicate(timeout=LONG)[0] for process in running] == ["sample-0010\n"] * 2
    assert len(server.requests[SHARD]) == 1
    assert cached(source) == [SHARD] and hidden(source) == []


def test_a_killed_download_blocks_nobody_and_leaves_no_half_shard(server, source, monkeypatch):
    server.faults[SHARD] = ["stall"]
    killed = start(server, source, 1)
    wait_until(lambda: os.path.isdir(source.cache_dir) and any(name.endswith(".part") for name in hidden(source)))
    waiting = start(server, source, 1)
    time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert waiting.communicate(timeout=LONG)[0] == "sample-0010\n"
    assert len(server.requests[SHARD]) == 2 and cached(source) == [SHARD]
    (left,) = hidden(source)
    old = time.time() - 1000
    os.utime(os.path.join(source.cache_dir, left), (old, old))
    monkeypatch.setattr(shard_cache, "_SWEPT_EVERY", 0.0)
    ShardSet(f"{server.url}/set", source=source).read(2, 0)
    assert hidden(source) == [], "what it left must go"


def test_a_pickled_set_fetches_for_itself(server, source):
    data = ShardSet(f"{server.url}/set", source=source)
    data.prefetch([0, 1])
    data.read(0, 0)
    copy = pickle.loads(pickle.dumps(data))
    data.close()
    assert_all_samples(copy)


def test_a_forked_child_keeps_no_shard_open(server, source, monkeypatch):
    data = ShardSet(f"{server.url}/set", source=source)
    arrived, release = threading.Event(), threading.Event()
    bring = data._remote._bring

    def slow(*arguments, **options):
        handle = bring(*arguments, **options)
        arrived.set()
        release.wait(LONG)
        return handle

    data.read(0, 0)
    monkeypatch.setattr(data._remote, "_bring", slow)
    data.prefetch([1])
    assert arrived.wait(LONG)
    child = os.fork()
    if child == 0:
        found = 99
        try:
            found = open_in(source.cache_dir)
        finally:
            os._exit(found)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    release.set()
    assert data.read(0, 1).id == "sample-0001" and data.read(1, 0).id == "sample-0010"
    data.close()


def test_a_forked_child_fetches_for_itself(server, source):
    data = ShardSet(f"{server.url}/set", source=source)
    data.prefetch([0])
    assert data.read(0, 0).id == "sample-0000"
    child = os.fork()
    if child == 0:
        good = False
        try:
            data.prefetch([1])
            good = data.read(0, 1).id == "sample-0001" and data.read(1, 0).id == "sample-0010"
            data.close()
        finally:
            os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert data.read(0, 2).id == "sample-0002"
    data.close()


# ----------------------------------------------------------------------------------------- its bound


def sizes(shards):
    return [(shards / f"shard-00000{n}.tar").stat().st_size for n in range(3)]


def tar_bytes(source):
    return sum(
        os.stat(os.path.join(source.cache_dir, name)).st_size
        for name in os.listdir(source.cache_dir)
        if not name.startswith(".")
    )


def test_the_cache_stays_within_its_bound(server, shards, source):
    limit = sum(sizes(shards)[:2]) + 5000  # the indexes too
    bounded = changed(source, cache_gb=limit / 1e9)
    data = ShardSet(f"{server.url}/set", cache=1, source=bounded)
    for shard in (0, 1, 2, 0, 1, 1, 2, 0):
        assert data.read(shard, 1).id == f"sample-{10 * shard + 1:04d}"
        assert tar_bytes(source) <= limit
    # The one used longest ago goes first: 1 and 2 were there when 0 came.
    assert cached(source) == ["shard-000000.tar", "shard-000002.tar"]
    data.close()


def test_what_is_needed_is_not_evicted(server, shards, source):
    limit = sum(sizes(shards)[:2]) + 5000
    data = ShardSet(f"{server.url}/set", cache=3, source=changed(source, cache_gb=limit / 1e9, timeout=0.3))
    data.prefetch([0, 1])
    wait_until(lambda: len(cached(source)) == 2)
    data.read(0, 0)
    other = ShardSet(f"{server.url}/set", source=changed(source, cache_gb=limit / 1e9, timeout=0.3))
    with pytest.raises(UserError, match=r"data\.source\.cache_gb: found .* are in use on this node; expected at least"):
        other.read(2, 0)
    assert cached(source) == ["shard-000000.tar", SHARD]
    data.prefetch([1, 2])  # the window moves on
    assert other.read(2, 0).id == "sample-0020" and data.read(1, 0).id == "sample-0010"
    assert tar_bytes(source) <= limit
    data.close()
    other.close()


def test_a_cache_smaller_than_a_window_is_an_error(server, shards, source):
    small = changed(source, cache_gb=(sum(sizes(shards)[:2]) + 5000) / 1e9, timeout=0.3)
    data = ShardSet(f"{server.url}/set", cache=3, source=small)
    data.prefetch([0, 1, 2])
    assert data.read(0, 0).id == "sample-0000" and data.read(1, 0).id == "sample-0010"
    with pytest.raises(
        UserError, match=r"data\.source\.cache_gb: found .*shard-000002\.tar needs .*data\.shuffle_shards"
    ):
        data.read(2, 0)
    data.close()
    shutil.rmtree(source.cache_dir)
    with pytest.raises(UserError, match=r"data\.source\.cache_gb"):
        ShardSet(f"{server.url}/set", source=changed(source, cache_gb=1e-6)).read(0, 0)


def test_a_full_cache_is_no_damage_of_shards_of_unknown_size(server, shards, source):
    (shards / "shards.json").unlink()
    bounded = changed(source, cache_gb=(sum(sizes(shards)[:2]) - 5000) / 1e9)
    data = ShardSet(f"{server.url}/set/shard-{{000000..000002}}.tar", cache=1, source=bounded)
    assert data.read(0, 0).id == "sample-0000"
    data.prefetch([0, 1])
    wait_until(lambda: server.requests[SHARD] and not data._remote._threads)
    assert [name for name in hidden(source) if name.endswith(".failed")] == []
    data.prefetch([1])
    assert data.read(1, 0).id == "sample-0010"
    data.close()
