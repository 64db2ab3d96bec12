"""The generated world as shards: scenes rendered in several processes, with captions, facts and attributes.

This module imports no torch: every process that renders starts quickly.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mmd2v.data.synthetic import (
    SPLITS,
    CountFact,
    Facts,
    ObjectFacts,
    RelationFact,
    attributes,
    captions,
    render,
    scene,
)
from mmd2v.errors import UserError, unknown_name

if TYPE_CHECKING:
    from mmd2v.data.packing import PackReport

_JPEG_QUALITY = 95
_CHUNK = 250  # scenes a task: a quarter of a second of work
SMALLEST_SIZE = 16  # pixels; below it shapes are a blur


def generate(
    out: str | Path,
    *,
    split: str,
    count: int,
    size: int,
    seed: int,
    captions_per_image: int = 5,
    shard_size: int = 1000,
    workers: int | None = None,
) -> PackReport:
    """Write ``count`` scenes as shards. The files depend on the arguments alone, not on the number of processes.

    Args:
        out: folder to create.
        split: ``train``; ``val``: other scenes; ``test``: combinations of attributes never seen in training.
        count: scenes.
        size: side of the images, in pixels.
        seed: of the world.
        captions_per_image: captions a scene.
        shard_size: samples a shard.
        workers: processes; none: one a core.

    Raises:
        UserError: an argument out of range, or the folder cannot be written; nothing is left behind then.
    """
    from mmd2v.data.packing import Sample, check_new_folder, write_shards

    if split not in SPLITS:
        raise unknown_name("--split", split, SPLITS)
    bounds = {"--count": (count, 1), "--size": (size, SMALLEST_SIZE), "--seed": (seed, 0)}
    bounds |= {"--captions": (captions_per_image, 1), "--shard-size": (shard_size, 1)}
    for flag, (value, least) in bounds.items():
        if value < least:
            raise UserError(f"{flag}: found {value}, expected at least {least}")
    check_new_folder(out)
    starts = range(0, count, _CHUNK)
    tasks = [(seed, split, start, min(start + _CHUNK, count), size, captions_per_image) for start in starts]
    samples = (Sample(*sample) for sample in _render_all(tasks, workers or os.cpu_count() or 1))
    return write_shards(samples, out, total=count, shard_size=shard_size, what=f"generating {split}")


_Task = tuple[int, str, int, int, int, int]  # seed, split, first scene, end, size, captions an image
_Rendered = tuple[str, bytes, dict[str, Any]]  # id, JPEG, JSON


def _render_all(tasks: list[_Task], workers: int) -> Iterator[_Rendered]:
    """Render in processes, results in order, a bounded number of tasks ahead; one task needs no process."""
    if min(workers, len(tasks)) == 1:
        for task in tasks:
            yield from _render_task(task)
        return
    # Spawned, not forked: the calling process may run threads.
    with ProcessPoolExecutor(min(workers, len(tasks)), multiprocessing.get_context("spawn")) as pool:
        pending: deque[Future[list[_Rendered]]] = deque()
        try:
            for task in tasks:
                pending.append(pool.submit(_render_task, task))
                if len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _render_task(task: _Task) -> list[_Rendered]:
    seed, split, start, end, size, count = task
    return [_sample(seed, split, index, size, count) for index in range(start, end)]


def _sample(seed: int, split: str, index: int, size: int, count: int) -> _Rendered:
    world = scene(seed, split, index)
    drawn = captions(world, seed, count)
    data = io.BytesIO()
    Image.fromarray(render(world, size)).save(data, "JPEG", quality=_JPEG_QUALITY)
    meta = {
        "captions": [caption.text for caption in drawn],
        "width": size,
        "height": size,
        "scene": {"seed": seed, "split": split, "index": index},
        "facts": [facts_to_json(caption.facts) for caption in drawn],
        "attributes": attributes(world).astype(int).tolist(),
    }
    return f"{split}-{seed}-{index:08d}", data.getvalue(), meta


def facts_to_json(facts: Facts) -> dict[str, Any]:
    """What a caption claims as a JSON object without empty entries; `facts_from_json` reads it back."""
    record = {
        "objects": [dict(thing.named()) for thing in facts.objects],
        "relations": [[fact.kind, fact.first, fact.second] for fact in facts.relations],
        "counts": [[fact.count, dict(fact.what.named())] for fact in facts.counts],
        "background": facts.background,
        "pattern": facts.pattern,
    }
    return {key: value for key, value in record.items() if value}


def facts_from_json(record: dict[str, Any]) -> Facts:
    """The facts that `facts_to_json` wrote."""
    return Facts(
        objects=tuple(ObjectFacts(**thing) for thing in record.get("objects", ())),
        relations=tuple(RelationFact(*fact) for fact in record.get("relations", ())),
        counts=tuple(CountFact(count, ObjectFacts(**what)) for count, what in record.get("counts", ())),
        background=record.get("background"),
        pattern=record.get("pattern"),
    )
