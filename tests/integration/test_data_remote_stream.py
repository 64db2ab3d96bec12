"""Batches of remote shards, by loader processes of two ranks: those of local shards, with each shard fetched once."""

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from data_samples import make_shards
from shard_server import ShardServer

from mmd2v.config.schema import DataConfig
from mmd2v.data.stream import train_loader

SHARDS, SAMPLES = 6, 24


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    make_shards(tmp_path / "web" / "set", SAMPLES, SAMPLES // SHARDS)
    with ShardServer(tmp_path / "web") as server:
        yield server


def config(tmp_path, shards, **source):
    return {
        "train": {"shards": str(shards)},
        "image": {"size": 24},
        "shuffle_shards": 2,
        "workers": 2,
        "prefetch": 1,
        "source": {"cache_dir": str(tmp_path / "cache"), "retry_delay": 0.01, "timeout": 300, **source},
    }


def batches(settings, count, rank=0, world_size=1, start=0):
    loader = train_loader(
        DataConfig.model_validate(settings),
        seed=3,
        tokenizer=None,
        rank=rank,
        world_size=world_size,
        micro_batch_size=4,
        start_index=start,
    )
    return list(itertools.islice(loader, count))


PROGRAM = """
import json, sys
from mmd2v.config.schema import DataConfig
from mmd2v.data.stream import train_loader
settings, rank = json.loads(sys.argv[1])
loader = train_loader(DataConfig.model_validate(settings), seed=3, tokenizer=None, rank=rank, world_size=2,
                      micro_batch_size=4)
for batch in loader:
    print(*batch.sample_ids, flush=True)
"""


def rank_process(settings, rank):
    arguments = json.dumps([settings, rank])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, arguments], stdout=subprocess.PIPE, text=True, env=environment
    )


def downloads(server):
    return {name: len(sizes) for name, sizes in server.requests.items() if name.endswith(".tar")}


@pytest.mark.parametrize("access", ["cache", "range"])
def test_remote_batches_are_the_local_ones(server, tmp_path, access):
    local = batches(config(tmp_path, tmp_path / "web" / "set"), 9)
    for shard in range(SHARDS):
        server.faults[f"shard-{shard:06d}.tar"] = [500, "truncate"]
    remote = batches(config(tmp_path, f"{server.url}/set", access=access), 9)
    for a, b in zip(local, remote, strict=True):
        assert a.sample_ids == b.sample_ids and torch.equal(a.images, b.images)


def test_ranks_share_downloads_and_a_resumed_run_repeats_none(server, tmp_path):
    settings = config(tmp_path, f"{server.url}/set")
    local = config(tmp_path, tmp_path / "web" / "set")
    expected = [[" ".join(b.sample_ids) for b in batches(local, 9, rank, 2)] for rank in range(2)]
    server.always["shard-000003.tar"] = "slow"

    ranks = [rank_process(settings, rank) for rank in range(2)]
    got = [[process.stdout.readline().rstrip() for _ in range(4)] for process in ranks]
    assert got == [lines[:4] for lines in expected]
    for process in ranks:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    before = downloads(server)
    assert len(before) == SHARDS and set(before.values()) == {1}
    resumed = [batches(settings, 5, rank, 2, start=4 * 8) for rank in range(2)]
    assert [[" ".join(batch.sample_ids) for batch in found] for found in resumed] == [lines[4:] for lines in expected]
    assert downloads(server) == before


def test_a_shard_that_cannot_be_fetched_is_counted_damage(server, tmp_path):
    settings = config(tmp_path, f"{server.url}/set", retries=1)
    settings["damage"] = {"limit": 0.5}
    server.always["shard-000002.tar"] = 404
    whole = batches(config(tmp_path, tmp_path / "web" / "set"), 6)
    found = batches(settings, 6)
    lost = {f"sample-{n:04d}" for n in range(8, 12)}
    for a, b in zip(whole, found, strict=True):
        assert len(a.sample_ids) == len(b.sample_ids) == 4
        for row, name in enumerate(a.sample_ids):
            if name not in lost:
                assert b.sample_ids[row] == name and torch.equal(a.images[row], b.images[row])
    damaged = [entry for batch in found for entry in batch.damaged]
    assert len(damaged) == 4 and {entry.kind.value for entry in damaged} == {"shard_unreadable"}
    assert downloads(server)["shard-000002.tar"] <= 2
