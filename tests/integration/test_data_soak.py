"""The loader at full speed for a long time: memory, open files and threads of all its processes stay what they were.

MMD2V_SOAK_MINUTES: how long, 30 by default. MMD2V_SOAK_OUT: a JSON file for the figures.
"""

import os
import time
from pathlib import Path
from statistics import fmean

import psutil
import pytest
from data_samples import captions_of, encoded

from mmd2v.config.schema import DataConfig
from mmd2v.data.packing import Sample, write_shards
from mmd2v.data.stream import train_loader
from mmd2v.data.tokenizers import load_tokenizer, train_tokenizer
from mmd2v.files import write_json

MINUTES = float(os.environ.get("MMD2V_SOAK_MINUTES", "30"))
WORKERS = 2
BATCH = 32
SAMPLES, SHARD = 600, 20
WARM_UP = 0.1  # of the time
LOOKS = 60  # at the processes, over the whole time
FLAT = ("memory_mb", "open_files", "threads")
FLATNESS = 0.05  # how far each may move, either way


def look(process: psutil.Process) -> dict[str, float]:
    """Memory in MB; open files; threads. Waits until the workers' queues are full: what is in flight has all three."""
    family = [process, *process.children(recursive=True)]
    idle, before = 0, -1.0
    while idle < 2:
        now = sum(sum(p.cpu_times()[:2]) for p in family[1:])
        idle = idle + 1 if now - before < 0.02 else 0
        before = now
        time.sleep(0.1)
    return {
        "memory_mb": sum(map(resident, family)) / 1e6,
        "open_files": sum(p.num_fds() for p in family),
        "threads": sum(p.num_threads() for p in family),
        "processes": len(family),
    }


def resident(process: psutil.Process) -> int:
    """Bytes in memory that are no file; what processes share counts once.

    The files are the libraries: how much of them counts here depends on who else on the machine runs torch.
    """
    fields = dict(line.split(":") for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(fields[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem")) * 1024


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 300)
# pytest keeps every warning, and forked workers inherit that: torchvision's, one a decoded image, look like a leak.
@pytest.mark.filterwarnings("ignore")
def test_loader_neither_grows_nor_leaks(tmp_path):
    samples = (
        Sample(f"s-{n:04d}", encoded(n, width=320, height=240), {"captions": captions_of(n)}) for n in range(SAMPLES)
    )
    write_shards(samples, tmp_path / "set", total=SAMPLES, shard_size=SHARD, what="writing")
    words = (text for n in range(SAMPLES) for text in captions_of(n))
    train_tokenizer(words, "wordlevel", 2000).save(str(tmp_path / "tokenizer.json"))
    config = DataConfig.model_validate(
        {
            "train": {"shards": str(tmp_path / "set")},
            "image": {"size": 224},
            "tokenizer": {"path": str(tmp_path / "tokenizer.json")},
            # Fewer shards than the set has are kept open, so that files are opened and closed all the time.
            "shuffle_shards": 3,
            "workers": WORKERS,
        }
    )
    loader = train_loader(
        config,
        seed=0,
        tokenizer=load_tokenizer(config.tokenizer),
        rank=0,
        world_size=1,
        micro_batch_size=BATCH,
    )
    process = psutil.Process()
    seconds = MINUTES * 60
    looks: list[dict[str, float]] = []
    batches = 0
    start = time.monotonic()
    for batch in loader:
        assert batch.images.shape == (BATCH, 3, 224, 224)
        batches += 1
        elapsed = time.monotonic() - start
        if elapsed >= seconds:
            break
        if elapsed >= seconds * (WARM_UP + (1 - WARM_UP) * len(looks) / LOOKS):
            looks.append({"seconds": elapsed, **look(process)})

    third = max(1, len(looks) // 3)
    before, after = (
        {name: fmean(one[name] for one in part) for name in looks[0]} for part in (looks[:third], looks[-third:])
    )
    figures = {
        "minutes": MINUTES,
        "workers": WORKERS,
        "samples": batches * BATCH,
        "epochs": batches * BATCH / SAMPLES,
        "after_warm_up": before,
        "at_the_end": after,
        "change": {name: after[name] / before[name] - 1 for name in FLAT},
        "highest_memory_mb": max(one["memory_mb"] for one in looks),
        "looks": looks,
    }
    if out := os.environ.get("MMD2V_SOAK_OUT"):
        write_json(Path(out), figures)
    assert len(looks) >= LOOKS / 6 and batches > 10 * WORKERS, "too few batches to tell anything: give it more time"
    assert before["processes"] == after["processes"] == 1 + WORKERS
    for name in FLAT:
        assert abs(figures["change"][name]) <= FLATNESS, (name, before[name], after[name])
