import gc
import itertools
import pickle

import numpy as np
import pytest
import torch
from data_samples import make_shards

from mmd2v.config.schema import DataConfig
from mmd2v.data.batch import Batch
from mmd2v.data.handover import Parcel, Ring
from mmd2v.data.stream import train_loader

PREFETCH = 2
SLOTS = PREFETCH + 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("handover") / "set", 24, 6)


def loader(folder, workers):
    config = DataConfig.model_validate(
        {"train": {"shards": str(folder)}, "image": {"size": 16}, "workers": workers, "prefetch": PREFETCH}
    )
    return train_loader(config, seed=0, tokenizer=None, rank=0, world_size=1, micro_batch_size=4)


def first(folder, workers, count):
    return [batch.images.clone() for batch in itertools.islice(loader(folder, workers), count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_images_are_those_of_one_process_and_their_memory_is_used_again(folder, workers):
    places = set()
    batches = iter(loader(folder, workers))
    for expected in first(folder, 0, 30):
        images = next(batches).images
        assert torch.equal(images, expected) and images.stride() == (3 * 16 * 16, 1, 3 * 16, 3)
        places.add(images.data_ptr())
        del images
    assert len(places) <= workers * SLOTS


@pytest.mark.parametrize(
    "keep", [lambda batch: batch, lambda batch: batch.images[1:3], lambda batch: batch.images.numpy()]
)
def test_what_is_still_referred_to_is_never_overwritten(folder, keep):
    batches = iter(loader(folder, 1))
    kept = [keep(next(batches)) for _ in range(3 * SLOTS)]  # more than there are slots
    for _ in range(3 * SLOTS):
        next(batches)
    expected = [keep(Batch(images, *[torch.zeros(0)] * 3)) for images in first(folder, 0, 3 * SLOTS)]
    for ours, theirs in zip(kept, expected, strict=True):
        ours, theirs = (one.images if isinstance(one, Batch) else one for one in (ours, theirs))
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_batch_outlives_its_loader_and_the_next_iteration(folder):
    stream = loader(folder, 1)
    batches = iter(stream)
    images = next(batches).images
    copy = images.clone()
    del batches
    gc.collect()
    for _ in itertools.islice(stream, 2 * SLOTS):
        pass
    assert torch.equal(images, copy)


def test_ring_gives_no_slot_when_all_are_taken_too_small_or_elsewhere():
    ring = Ring(2, PREFETCH, (4, 8))
    assert ring.take(0, 5, 8) is None and ring.take(0, 4, 9) is None and ring.take(0, 0, 8) is None
    taken = [ring.take(1, 4, 8) for _ in range(SLOTS)]
    assert [ring.slot_of(images) for images in taken] == [SLOTS + n for n in range(SLOTS)]
    assert ring.take(1, 4, 8) is None and ring.take(0, 3, 8) is not None  # each worker has its own
    assert ring.slot_of(torch.zeros(4)) is None
    lent = ring.lend(SLOTS, 4, 8)
    view = lent[0]
    del lent
    assert ring.take(1, 4, 8) is None
    del view
    assert ring.slot_of(ring.take(1, 4, 8)) == SLOTS
    assert pickle.loads(pickle.dumps(ring)).take(0, 4, 8) is None


def test_parcel_carries_every_tensor():
    ring = Ring(1, PREFETCH, (2, 4))
    images = ring.take(0, 2, 4)
    images.copy_(torch.arange(96).reshape(2, 3, 4, 4))
    batch = Batch(
        images=images,
        text_ids=torch.tensor([1, 2, 3], dtype=torch.int32),
        text_lengths=torch.tensor([3], dtype=torch.int32),
        caption_image=torch.tensor([0]),
        sample_ids=("a", "b"),
        labels=torch.ones(2, 3),
        teacher_outputs={"t": torch.ones(2, 5, dtype=torch.bfloat16)},
    )
    parcel = Parcel.of(batch, ring)
    message = pickle.dumps(parcel)
    opened = pickle.loads(message).open()
    assert torch.equal(opened.images, torch.arange(96, dtype=torch.uint8).reshape(2, 3, 4, 4))
    assert opened.sample_ids == ("a", "b") and opened.weights is None
    for name in ("text_ids", "text_lengths", "caption_image", "labels"):
        assert (
            torch.equal(getattr(opened, name), getattr(batch, name))
            and getattr(opened, name).dtype == getattr(batch, name).dtype
        )
    assert torch.equal(opened.teacher_outputs["t"], batch.teacher_outputs["t"])
