"""Every kind of damage, on real broken files: counted by kind and shard, its slot kept with weight 0, a clear stop."""

import itertools
import json
import struct
import zlib
from collections import Counter

import pytest
import torch
from data_samples import captions_of, encoded, make_shards, write_tar

from mmd2v.config.schema import DataConfig
from mmd2v.data.batch import Batch
from mmd2v.data.damage import DamagedSample, DamageKind, DamageTally, damage_allowed
from mmd2v.data.loader import Loader
from mmd2v.data.stream import eval_loader, train_facts, train_loader
from mmd2v.data.tokenizers import load_tokenizer, train_tokenizer
from mmd2v.errors import UserError

GOOD_META = json.dumps({"captions": ["one thing", "another thing"]}).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    train_tokenizer([text for n in range(9) for text in captions_of(n)], "wordlevel", 200).save(
        str(folder / "tokenizer.json")
    )
    return folder


def config(folder, shards, **change) -> DataConfig:
    base = {
        "train": {"shards": str(shards)},
        "image": {"size": 16},
        "tokenizer": {"path": str(folder / "tokenizer.json"), "max_length": 12},
        "workers": 0,
        "damage": {"limit": 0.9},
    }
    return DataConfig.model_validate({**base, **change})


def loader(config: DataConfig, micro: int = 4, **change) -> Loader:
    tokenizer = load_tokenizer(config.tokenizer)
    settings = {"rank": 0, "world_size": 1, "micro_batch_size": micro, **change}
    return train_loader(config, seed=0, tokenizer=tokenizer, **settings)


def epoch(config: DataConfig, samples: int, micro: int = 4, **change) -> list[Batch]:
    return list(itertools.islice(loader(config, micro, **change), -(-samples // micro)))


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few kilobytes that unpacks to gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + bytes(side // 8)
    packer = zlib.compressobj(9)
    pixels = b"".join([packer.compress(row * 500) for _ in range(side // 500)] + [packer.flush()])
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


CASES = {
    DamageKind.IMAGE_UNDECODABLE: [("bad.jpg", encoded(1)[:150]), ("bad.json", GOOD_META)],
    DamageKind.IMAGE_TOO_LARGE: [("bad.png", bomb(8_000)), ("bad.json", GOOD_META)],
    DamageKind.NO_IMAGE: [("bad.json", GOOD_META)],
    DamageKind.NO_CAPTION: [("bad.jpg", encoded(1)), ("bad.json", b'{"captions": ["  "]}')],
    DamageKind.BAD_META: [("bad.jpg", encoded(1)), ("bad.json", b'{"captions": [')],
    DamageKind.BAD_ENCODING: [("bad.jpg", encoded(1)), ("bad.txt", "schöner Tag".encode("latin-1"))],
    DamageKind.CAPTION_TOO_LONG: [("bad.jpg", encoded(1)), ("bad.txt", b"word " * 400)],
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", CASES)
def test_damage_keeps_its_slot_with_weight_0(folder, tmp_path, kind, workers):
    good = [member for n in range(4) for member in ((f"g{n}.jpg", encoded(n)), (f"g{n}.json", GOOD_META))]
    path = write_tar(tmp_path / "a.tar", [*good[:4], *CASES[kind], *good[4:]])
    damage = {"limit": 0.9, "max_pixels": 10_000_000, "max_caption_length": 1_000}
    batches = epoch(config(folder, path, workers=workers, damage=damage), 5, micro=5)
    (batch,) = batches
    assert len(batch) == 5 and len(batch.text_lengths) == 5
    (place,) = (batch.weights == 0).nonzero()[:, 0].tolist()
    assert batch.weights.sum() == 4
    (found,) = batch.damaged
    assert (found.kind, found.shard) == (kind, str(path))
    assert found.message.startswith(f"{path}: sample bad")
    assert batch.images[place].count_nonzero() == 0
    assert batch.sample_ids[place] == f"{path}#2"


def test_a_bomb_is_refused_by_its_header_in_no_time(folder, tmp_path):
    data = bomb()
    assert len(data) < 600_000  # and would need 10 GB as RGB
    path = write_tar(
        tmp_path / "a.tar", [("x.png", data), ("x.json", GOOD_META), ("g.jpg", encoded(0)), ("g.json", GOOD_META)]
    )
    (batch,) = epoch(config(folder, path), 2, micro=2)
    assert [sample.kind for sample in batch.damaged] == [DamageKind.IMAGE_TOO_LARGE]
    assert "60,000 × 60,000 pixels, expected at most 100,000,000" in batch.damaged[0].message


def test_a_truncated_shard_loses_what_is_behind_the_cut_alone(folder, tmp_path):
    make_shards(tmp_path / "set", 12, 4)
    path = tmp_path / "set" / "shard-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:5_000])
    batches = epoch(config(folder, tmp_path / "set"), 12)
    damaged = [sample for batch in batches for sample in batch.damaged]
    assert 1 <= len(damaged) < 4
    assert {(sample.kind, sample.shard) for sample in damaged} == {(DamageKind.SHARD_TRUNCATED, str(path))}
    assert sum(float(batch.weights.sum()) for batch in batches) == 12 - len(damaged)


def test_a_shard_that_vanishes_in_training_is_damage_of_its_samples(folder, tmp_path):
    make_shards(tmp_path / "set", 12, 4)
    opened = loader(config(folder, tmp_path / "set"))
    (tmp_path / "set" / "shard-000002.tar").unlink()
    batches = list(itertools.islice(opened, 3))
    kinds = Counter(sample.kind for batch in batches for sample in batch.damaged)
    assert kinds == {DamageKind.SHARD_UNREADABLE: 4}


def test_the_second_of_two_equal_keys_is_damage(folder, tmp_path):
    members = [member for n in (0, 1, 0, 2) for member in ((f"k{n}.jpg", encoded(n)), (f"k{n}.json", GOOD_META))]
    path = write_tar(tmp_path / "a.tar", members)
    (batch,) = epoch(config(folder, path), 4)
    assert [sample.kind for sample in batch.damaged] == [DamageKind.DUPLICATE_KEY]
    assert "k0" in batch.damaged[0].message


def test_labels_of_a_damaged_sample_are_zero(folder, tmp_path):
    labelled = json.dumps({"captions": ["x"], "vector": [1.0, 2.0]}).encode()
    odd = json.dumps({"captions": ["x"], "vector": "no"}).encode()
    members = [("a.jpg", encoded(0)), ("a.json", labelled), ("b.jpg", encoded(1)), ("b.json", odd)]
    chosen = config(folder, write_tar(tmp_path / "a.tar", members), labels="vector")
    (batch,) = epoch(chosen, 2, micro=2, label_classes=2)
    assert [sample.kind for sample in batch.damaged] == [DamageKind.BAD_LABELS]
    assert sorted(batch.labels.sum(1).tolist()) == [0.0, 3.0]
    for batch in epoch(chosen, 2, micro=1, label_classes=2):  # one batch has nothing else
        assert batch.labels.shape == (1, 2)


def test_good_samples_do_not_depend_on_damaged_neighbours(folder, tmp_path):
    make_shards(tmp_path / "set", 12, 4)
    shards = sorted((tmp_path / "set").glob("*.tar"))
    before = epoch(config(folder, tmp_path / "set"), 12)
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:5_000])
    after = epoch(config(folder, tmp_path / "set"), 12)
    for a, b in zip(before, after, strict=True):
        kept = b.weights == 1
        assert torch.equal(a.images[kept], b.images[kept])
        assert [name for name, keep in zip(a.sample_ids, kept, strict=True) if keep] == [
            name for name, keep in zip(b.sample_ids, kept, strict=True) if keep
        ]


def test_evaluation_stops_at_the_first(folder, tmp_path):
    path = write_tar(tmp_path / "a.tar", [("x.jpg", encoded(0)[:99]), ("x.json", GOOD_META)])
    chosen = config(folder, path)
    with pytest.raises(UserError, match="the image does not decode"):
        list(eval_loader(chosen, shards=chosen.train.named_sets[""], tokenizer=None, batch_size=2))


def test_a_limit_of_0_stops_at_the_first(folder, tmp_path):
    path = write_tar(tmp_path / "a.tar", [("x.jpg", encoded(0)[:99]), ("x.json", GOOD_META)])
    with pytest.raises(UserError, match="the image does not decode"):
        epoch(config(folder, path, damage={"limit": 0}), 1, micro=1)


def test_how_many_are_allowed(folder):
    chosen = config(folder, "x", damage={}).damage
    assert damage_allowed(chosen, 999) == 0 and damage_allowed(chosen, 5_000) == 5


def test_a_cut_or_missing_shard_does_not_keep_a_run_from_starting(folder, tmp_path):
    make_shards(tmp_path / "set", 12, 4)
    shards = sorted((tmp_path / "set").glob("*.tar"))
    shards[1].write_bytes(shards[1].read_bytes()[:5_000])
    shards[2].unlink()
    assert train_facts(config(folder, tmp_path / "set"), seed=0, batch=4).samples == 12
    with pytest.raises(UserError, match="shard-000002"):
        train_facts(config(folder, tmp_path / "set", damage={"limit": 0}), seed=0, batch=4)


def test_the_tally_names_kinds_shards_and_the_first():
    tally = DamageTally(allowed=2)
    for row, shard in enumerate("ab"):
        sample = DamagedSample(DamageKind.NO_CAPTION, shard, row, f"{shard}: sample {row}: no caption")
        assert tally.add(sample) and not tally.add(sample)  # met again in the next epoch
    tally.check()
    assert tally.add(DamagedSample(DamageKind.IMAGE_UNDECODABLE, "b", 9, "b: sample 9: broken"))
    assert tally.by_kind() == {"no_caption": 2, "image_undecodable": 1}
    with pytest.raises(UserError) as caught:
        tally.check()
    message = str(caught.value)
    assert (
        "data.damage.limit: found 3 damaged samples (no_caption 2, image_undecodable 1), expected at most 2" in message
    )
    assert "b (2), a (1)" in message and "The first: a: sample 0: no caption" in message


def test_a_lone_surrogate_is_no_text(folder, tmp_path):
    path = write_tar(tmp_path / "a.tar", [("x.jpg", encoded(0)), ("x.json", b'{"captions": ["half \\ud83d"]}')])
    (batch,) = epoch(config(folder, path, damage={"limit": 1.0}), 1, micro=1)
    assert [sample.kind for sample in batch.damaged] == [DamageKind.BAD_ENCODING]
    assert len(batch.text_ids) == int(batch.text_lengths.sum()) >= 1
