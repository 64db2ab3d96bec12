import gc
import itertools
import multiprocessing
import pickle
from collections import Counter

import pytest
import torch
from data_samples import captions_of, encoded, make_shards, write_tar

from mmd2v.config.schema import DataConfig, ShardsConfig, TokenizerConfig
from mmd2v.data.batch import Batch
from mmd2v.data.collate import chosen_captions
from mmd2v.data.shards import RawSample
from mmd2v.data.stream import eval_loader, train_facts, train_loader
from mmd2v.data.tokenizers import load_tokenizer, train_tokenizer
from mmd2v.errors import UserError

COUNT = 25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    make_shards(folder / "set", COUNT, 4)
    train_tokenizer([text for n in range(COUNT) for text in captions_of(n)], "wordlevel", 200).save(
        str(folder / "tokenizer.json")
    )
    return folder


def config(folder, **change):
    base = {
        "train": {"shards": str(folder / "set")},
        "image": {"size": 24},
        "tokenizer": {"path": str(folder / "tokenizer.json"), "max_length": 12},
        "captions_per_image": 2,
        "labels": "vector",
        "shuffle_shards": 3,
        "workers": 0,
        "prefetch": 1,
        "damage": {"limit": 0},  # the first one is an error
    }
    return DataConfig.model_validate({**base, **change})


def batches(folder, count, *, rank=0, world_size=1, micro=4, accumulation=1, start=0, seed=0, classes=2, **change):
    chosen = config(folder, **change)
    loader = train_loader(
        chosen,
        seed=seed,
        tokenizer=load_tokenizer(chosen.tokenizer) if chosen.tokenizer else None,
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro,
        accumulation=accumulation,
        start_index=start,
        label_classes=classes,
    )
    return list(itertools.islice(loader, count))


def same(a: Batch, b: Batch) -> bool:
    tensors = ("images", "text_ids", "text_lengths", "caption_image", "labels")
    return a.sample_ids == b.sample_ids and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


def test_what_a_batch_holds(folder):
    (batch,) = batches(folder, 1)
    assert batch.images.shape == (4, 3, 24, 24) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.text_ids.dtype == batch.text_lengths.dtype == torch.int32
    assert batch.caption_image.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and batch.caption_image.dtype == torch.int64
    assert len(batch.text_ids) == batch.text_lengths.sum() and len(batch.text_lengths) == 8
    assert batch.labels.shape == (4, 2) and batch.labels.dtype == torch.float32
    numbers = [float(name.removeprefix("sample-")) for name in batch.sample_ids]
    assert batch.labels[:, 0].tolist() == numbers
    tokenizer = load_tokenizer(config(folder).tokenizer)
    captions = {tuple(tokenizer.encode_batch([text])[0].tolist()) for n in numbers for text in captions_of(int(n))}
    assert {tuple(row.tolist()) for row in batch.text_ids.split(batch.text_lengths.tolist())} <= captions


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_changes_nothing(folder, workers):
    # 20 batches of 4 run through three epochs of 25.
    for alone, shared in zip(batches(folder, 20), batches(folder, 20, workers=workers), strict=True):
        assert same(alone, shared)


@pytest.mark.parametrize("workers", [0, 2])
def test_restart_continues(folder, workers):
    whole = batches(folder, 12)
    again = batches(folder, 5, start=7 * 4, workers=workers)
    assert all(same(a, b) for a, b in zip(whole[7:], again, strict=True))


def test_every_epoch_has_every_sample_once(folder):
    ids = [name for batch in batches(folder, 25, micro=3) for name in batch.sample_ids]
    for epoch in range(3):
        assert len(set(ids[epoch * COUNT : (epoch + 1) * COUNT])) == COUNT
    assert ids[:COUNT] != ids[COUNT : 2 * COUNT]


def rows(batch):
    """Everything about each sample of a batch."""
    texts = batch.text_ids.split(batch.text_lengths.tolist())
    for row, name in enumerate(batch.sample_ids):
        own = [texts[n].tolist() for n in range(len(texts)) if batch.caption_image[n] == row]
        yield name, batch.images[row].numpy().tobytes(), str(own), batch.labels[row].tolist()


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4)])
def test_ranks_together_are_one_rank(folder, world, micro, accumulation):
    alone = batches(folder, 7, micro=8)
    parts = [
        batches(folder, 7 * accumulation, rank=r, world_size=world, micro=micro, accumulation=accumulation)
        for r in range(world)
    ]
    for step, whole in enumerate(alone):
        micro_steps = range(step * accumulation, (step + 1) * accumulation)
        together = [row for k in micro_steps for part in parts for row in rows(part[k])]
        assert together == list(rows(whole))


def test_seed_changes_order_and_augmentation(folder):
    (a,), (b,) = batches(folder, 1, micro=COUNT), batches(folder, 1, micro=COUNT, seed=1)
    assert a.sample_ids != b.sample_ids
    first, second = dict(row[:2] for row in rows(a)), dict(row[:2] for row in rows(b))
    assert sum(first[name] == second[name] for name in first) < 3


def test_augmentation_does_not_depend_on_the_neighbours(folder):
    small = {row[0]: row for batch in batches(folder, COUNT, micro=1) for row in rows(batch)}
    (large,) = batches(folder, 1, micro=COUNT, shuffle_shards=1)
    assert {row[0]: row for row in rows(large)} == small


def raw(captions):
    return RawSample("k", "x.tar: sample k", memoryview(b""), tuple(captions), {})


def test_all_captions_have_their_turn():
    sample = raw("abcde")
    epochs = [chosen_captions(sample, 2, seed=0, epoch=e) for e in range(5)]
    assert Counter(itertools.chain(*epochs)) == dict.fromkeys("abcde", 2)
    assert all(len(set(chosen)) == 2 for chosen in epochs)
    assert sorted(itertools.chain(*(chosen_captions(sample, 1, seed=3, epoch=e) for e in range(5)))) == list("abcde")
    assert sorted(chosen_captions(raw("ab"), 5, seed=0, epoch=0)) in ([*"aaabb"], [*"aabbb"])


def test_without_tokenizer_and_labels(folder):
    (batch,) = batches(folder, 1, tokenizer=None, labels=None)
    assert batch.images.shape == (4, 3, 24, 24)
    assert batch.text_ids.shape == batch.text_lengths.shape == batch.caption_image.shape == (0,)
    assert batch.labels is None


def test_limit(folder):
    train = {"shards": str(folder / "set"), "limit": 6}
    ids = [name for batch in batches(folder, 3, micro=2, train=train) for name in batch.sample_ids]
    assert sorted(ids) == [f"sample-{n:04d}" for n in range(6)]
    assert train_facts(config(folder, train=train), seed=0, batch=2).samples == 6
    assert train_facts(config(folder), seed=0, batch=2).samples == COUNT


def evaluate(folder, *, batch_size=4, rank=0, world_size=1, **change):
    chosen = config(folder, **change)
    return eval_loader(
        chosen,
        shards=chosen.train,
        tokenizer=load_tokenizer(chosen.tokenizer),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
    )


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_evaluation_has_everything_in_order(folder, workers):
    loader = evaluate(folder, workers=workers)
    assert len(loader) == 7
    for _ in range(2):
        found = list(loader)
        assert len(found) == 7
        assert [name for batch in found for name in batch.sample_ids] == [f"sample-{n:04d}" for n in range(COUNT)]
        assert [len(batch.text_lengths) for batch in found] == [12] * 6 + [3]
        assert found[0].caption_image.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    tokenizer = load_tokenizer(config(folder).tokenizer)
    expected, _ = tokenizer.encode_batch([text for n in range(COUNT) for text in captions_of(n)])
    assert torch.cat([batch.text_ids for batch in found]).tolist() == expected.tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 7, 40])
def test_ranks_evaluate_every_image_once(folder, world):
    parts = [
        [n for b in evaluate(folder, rank=r, world_size=world, workers=0) for n in b.sample_ids] for r in range(world)
    ]
    assert [name for part in parts for name in part] == [f"sample-{n:04d}" for n in range(COUNT)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_evaluation_of_a_limited_set(folder):
    train = {"shards": str(folder / "set"), "limit": 5}
    assert [len(batch) for batch in evaluate(folder, train=train)] == [4, 1]


def test_training_loader_has_no_length(folder):
    chosen = config(folder, tokenizer=None)
    loader = train_loader(chosen, seed=0, tokenizer=None, rank=0, world_size=1, micro_batch_size=2)
    with pytest.raises(TypeError, match="never ends"):
        len(loader)


def test_workers_end_with_the_iteration(folder):
    before = len(multiprocessing.active_children())
    iterator = iter(evaluate(folder, workers=2))
    next(iterator)
    assert len(multiprocessing.active_children()) == before + 2
    del iterator
    gc.collect()
    assert len(multiprocessing.active_children()) == before


def test_a_killed_worker_is_a_clear_error(folder):
    iterator = iter(evaluate(folder, workers=1, batch_size=1))
    next(iterator)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(UserError, match=r"a loader process died .*data\.workers"):
        list(iterator)


def test_the_pipeline_can_be_sent_to_a_spawned_process(folder):
    loader = evaluate(folder)
    again = pickle.loads(pickle.dumps(loader._loader.dataset))
    assert all(same_text(a, b) for a, b in zip(again, loader, strict=True))


def same_text(a, b):
    return a.sample_ids == b.sample_ids and torch.equal(a.text_ids, b.text_ids) and torch.equal(a.images, b.images)


# ------------------------------------------------------------------------------------- bad input

META = b'{"captions": ["one", "two"], "vector": [1.0]}'


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.jpg", encoded(0)[:100]), ("k.json", META)], "the image does not decode"),
        ([("k.jpg", encoded(0))], r"no \.json and no \.txt"),
        ([("k.json", META)], "no image member"),
        ([("k.jpg", encoded(0)), ("k.json", b'{"captions": [""]}')], "caption 0 is empty"),
        ([("k.jpg", encoded(0)), ("k.json", b'{"captions": ["x"]}')], "data.labels names 'vector'"),
        ([("k.jpg", encoded(0)), ("k.json", b'{"captions": ["x"], "vector": "1"}')], "found a str"),
    ],
)
def test_a_bad_sample_is_one_clear_error(folder, tmp_path, workers, members, message):
    path = write_tar(tmp_path / "bad.tar", [("good.jpg", encoded(0)), ("good.json", META), *members])
    with pytest.raises(UserError, match=message) as caught:
        batches(folder, 4, micro=1, workers=workers, classes=1, train={"shards": str(path)})
    assert str(caught.value).startswith(f"{path}: sample k: ")
    assert "Traceback" not in str(caught.value) and "worker" not in str(caught.value)


@pytest.mark.parametrize(
    ("vector", "message"),
    [(b"[1.0, 2.0]", "has 2 numbers, expected 1"), (b"[NaN]", "not finite"), (b"[1e39]", "not finite in float32")],
)
def test_labels_that_are_no_labels(folder, tmp_path, vector, message):
    members = [("b.jpg", encoded(0)), ("b.json", META.replace(b"[1.0]", vector))]
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=message):
        batches(folder, 1, micro=1, classes=1, train={"shards": str(path)})
    (batch,) = batches(folder, 1, micro=1, classes=1, train={"shards": str(path)}, damage={"limit": 1})
    assert batch.labels.tolist() == [[0.0]] and batch.weights.tolist() == [0.0]


def test_shard_that_vanishes_or_shrinks(folder, tmp_path):
    make_shards(tmp_path / "set", 8, 4)
    path = tmp_path / "set/shard-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:3000])
    with pytest.raises(UserError, match=r"shard-000001\.tar: found 3,000 bytes"):
        batches(folder, 8, micro=1, workers=1, train={"shards": str(tmp_path / "set")})
    path.unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar"):
        batches(folder, 8, train={"shards": [str(tmp_path / "set/shard-000000.tar"), str(path)]})


def test_position_inside_a_step(folder):
    with pytest.raises(UserError, match="expected a multiple of the 8 samples of a step"):
        batches(folder, 1, micro=4, accumulation=2, start=4)


def test_real_captions_and_images(shared, tmp_path):
    from mmd2v.data.packing import pack

    source = shared / "flickr8k"
    pack(
        source / "flickr8k_val.json", tmp_path / "val", images=source / "flickr8k_val_images_160px.tar", shard_size=100
    )
    tokenizer_config = TokenizerConfig(path=str(shared / "teachers/minilm_l6_v2"))
    chosen = DataConfig(
        train={"shards": str(tmp_path / "val")}, tokenizer=tokenizer_config, image={"size": 160}, workers=2
    )
    tokenizer = load_tokenizer(tokenizer_config)
    loader = eval_loader(chosen, shards=ShardsConfig(shards=str(tmp_path / "val")), tokenizer=tokenizer, batch_size=300)
    found = list(loader)
    assert sum(map(len, found)) == 1000 and sum(len(batch.text_lengths) for batch in found) == 5000
    train = train_loader(chosen, seed=0, tokenizer=tokenizer, rank=0, world_size=1, micro_batch_size=250)
    ids = {name for batch in itertools.islice(train, 4) for name in batch.sample_ids}
    assert len(ids) == 1000
