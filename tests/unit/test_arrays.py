"""Arrays beside a sample's image and captions: from a member of a shard to a batch, whole and damaged."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_samples import encoded, write_tar
from pydantic import ValidationError
from small import StubTokenizer, small_config

from mmd2v.config.schema import ArrayConfig, Config, DataConfig, ShardsConfig
from mmd2v.data.array_members import ArrayMembers, parse_array
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.handover import Parcel, Ring
from mmd2v.data.shards import ShardIndex, ShardSet
from mmd2v.data.stream import eval_loader, train_loader
from mmd2v.errors import UserError
from mmd2v.train.mock import mock_batch

ARRAY = ArrayConfig(key="npy", shape=(3, 2))


def npy(values, **kwargs) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **kwargs)
    return file.getvalue()


def values_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((3, 2)).astype(np.float32)


def members(number: int, first: bytes | None = None, order: str = "jpg json npy mel.npy") -> list[tuple[str, bytes]]:
    meta = {"id": f"s{number}", "captions": [f"caption of {number}"]}
    data = {
        "jpg": encoded(number),
        "json": json.dumps(meta).encode(),
        "npy": npy(values_of(number)) if first is None else first,
        "mel.npy": npy(values_of(100 + number).astype(np.float64)),
    }
    return [(f"s{number}.{suffix}", data[suffix]) for suffix in order.split()]


def settings(shards, **changes) -> DataConfig:
    values = {
        "train": {"shards": str(shards)},
        "image": {"size": 16},
        "workers": 0,
        "damage": {"limit": 1.0},
        "arrays": {"audio": {"key": "npy", "shape": [3, 2]}, "mel": {"key": "mel.npy", "shape": [3, 2]}},
    }
    return DataConfig.model_validate({**values, **changes})


def first_batch(config: DataConfig, count: int, **options):
    loader = train_loader(
        config, seed=0, tokenizer=None, rank=0, world_size=1, micro_batch_size=count, arrays=config.arrays, **options
    )
    return next(iter(loader))


# ------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("order", ["jpg json npy mel.npy", "mel.npy npy json jpg", "npy jpg mel.npy json"])
@pytest.mark.parametrize("indexed", [False, True])
def test_arrays_are_found_wherever_they_stand_in_their_sample(tmp_path, order, indexed):
    path = write_tar(tmp_path / "x.tar", [m for n in range(4) for m in members(n, order=order)])
    if indexed:
        ShardIndex.scan(str(path)).write()
    data = ShardSet(str(path))
    assert len(data) == 4
    for row, sample in enumerate(data.read_many([(0, r) for r in range(4)], arrays=["npy", "mel.npy"])):
        assert torch.equal(parse_array(sample.arrays["npy"], ARRAY, "x"), torch.from_numpy(values_of(row)))
        mel = parse_array(sample.arrays["mel.npy"], ARRAY, "x")
        assert torch.equal(mel, torch.from_numpy(values_of(100 + row)))
        assert bytes(sample.image) == encoded(row) and sample.captions == (f"caption of {row}",)
    assert data.read(0, 1).arrays == {}
    only = data.read(0, 1, images=False, arrays=["npy"])
    assert only.image is None and list(only.arrays) == ["npy"]


def test_an_index_of_a_shard_without_arrays_is_what_it_was(tmp_path):
    path = write_tar(tmp_path / "x.tar", members(0, order="jpg json"))
    index = ShardIndex.scan(str(path))
    assert index.arrays.tensors() == {} and b"arrays" not in index.to_bytes()


def test_arrays_of_no_sample_are_left_alone(tmp_path):
    stray = [("lost.npy", b"x"), *members(0), ("lost.npy", b"y"), *members(1), ("end.npy", b"z")]
    data = ShardSet(str(write_tar(tmp_path / "x.tar", stray)))
    assert len(data) == 2
    for row in range(2):
        found = data.read(0, row, arrays=["npy"]).arrays["npy"]
        assert torch.equal(parse_array(found, ARRAY, "x"), torch.from_numpy(values_of(row)))


def test_a_damaged_table_of_an_index_is_refused():
    good = {"arrays": np.array([[0, 0, 512, 4], [1, 0, 1024, 4]]), "array_keys": np.frombuffer(b"npy", np.uint8)}
    assert ArrayMembers.of_tensors(good, 2).of(1) == {"npy": (1024, 4)}
    for bad in ([[0, 1, 5, 4]], [[2, 0, 5, 4]], [[0, 0, -5, 4]], [[1, 0, 5, 4], [0, 0, 5, 4]], [[0, 0, 5]]):
        with pytest.raises(ValueError, match=r"version|shard|order"):
            ArrayMembers.of_tensors({**good, "arrays": np.array(bad)}, 2)
    with pytest.raises(ValueError, match="version"):
        ArrayMembers.of_tensors({**good, "arrays": np.zeros((1, 4))}, 2)


def test_a_missing_array_names_shard_sample_and_member(tmp_path):
    data = ShardSet(str(write_tar(tmp_path / "x.tar", [*members(0, order="jpg json mel.npy"), *members(1)])))
    with pytest.raises(Damage, match=r"x\.tar: sample s0: no \.npy member \(data\.arrays\), found arrays: \.mel\.npy"):
        data.read(0, 0, arrays=["npy"])


# ------------------------------------------------------------------------------------------ parsing

BAD = {
    "no array": (b"hello", "is no NumPy array"),
    "empty": (b"", "is no NumPy array"),
    "cut": (npy(values_of(0))[:-1], "has 23 bytes of values, expected 24: incomplete copy"),
    "longer": (npy(values_of(0)) + b"x", "has 25 bytes of values"),
    "shape": (npy(np.zeros((2, 3), np.float32)), r"has shape \[2, 3\], expected \[3, 2\]"),
    "integers": (npy(np.zeros((3, 2), np.int64)), "is of type int64, expected floats"),
    "pickle": (npy(np.array([[{}] * 2] * 3), allow_pickle=True), "is of type object, expected floats"),
    "nan": (npy(np.full((3, 2), np.nan, np.float32)), "not finite in float32"),
    "too large": (npy(np.full((3, 2), 1e300)), "not finite in float32"),
    "huge": (npy(values_of(0)).replace(b"(3, 2), ", b"(3**9)  "), "is no NumPy array"),
    "version": (b"\x93NUMPY\x09\x00" + npy(values_of(0))[8:], "is no NumPy array"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_damage(case):
    data, message = BAD[case]
    with pytest.raises(Damage, match=f"^here: its .npy .*{message}") as error:
        parse_array(memoryview(bytearray(data)), ARRAY, "here")
    assert error.value.kind is DamageKind.BAD_ARRAY


def test_every_float_type_and_order_is_taken():
    for values in (values_of(1), np.asfortranarray(values_of(1)), values_of(1).astype(">f4"), values_of(1).astype("d")):
        found = parse_array(memoryview(npy(values)), ARRAY, "x")
        assert found.dtype == torch.float32 and torch.equal(found, torch.from_numpy(values_of(1)))
    assert parse_array(memoryview(npy(values_of(1).astype(np.float16))), ARRAY, "x").dtype == torch.float32


# ------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("workers", [0, 1])
def test_training_batches_carry_arrays(tmp_path, workers):
    path = write_tar(tmp_path / "x.tar", [m for n in range(4) for m in members(n)])
    batch = first_batch(settings(path, workers=workers), 4)
    assert set(batch.arrays) == {"audio", "mel"}
    for row, name in enumerate(batch.sample_ids):
        number = int(name.removeprefix("s"))
        assert torch.equal(batch.arrays["audio"][row], torch.from_numpy(values_of(number)))
        assert torch.equal(batch.arrays["mel"][row], torch.from_numpy(values_of(100 + number)))
    moved = batch.to(torch.device("meta"))
    assert all(array.is_meta for array in moved.arrays.values())
    batch.record_stream(None)


def test_what_no_encoder_sees_is_not_read(tmp_path):
    path = write_tar(tmp_path / "x.tar", members(0, order="jpg json"))
    config = settings(path)
    loader = train_loader(config, seed=0, tokenizer=None, rank=0, world_size=1, micro_batch_size=1)
    batch = next(iter(loader))
    assert batch.arrays == {} and batch.weights.tolist() == [1]


def test_damaged_arrays_have_weight_0_zeros_and_a_kind_of_their_own(tmp_path):
    path = write_tar(
        tmp_path / "x.tar", [*members(0), *members(1, b"broken"), *members(2, order="jpg json mel.npy"), *members(3)]
    )
    batch = first_batch(settings(path), 4)
    assert batch.weights.sum() == 2
    assert sorted(one.kind.value for one in batch.damaged) == ["bad_array", "no_array"]
    lost = batch.weights == 0
    assert not batch.images[lost].any() and not any(array[lost].any() for array in batch.arrays.values())
    assert all(array[~lost].any() for array in batch.arrays.values())
    with pytest.raises(UserError, match=r"sample s[12]: "):
        first_batch(settings(path, damage={"limit": 0.0}), 4)


def test_evaluation_gives_arrays_and_stops_at_damage(tmp_path):
    path = write_tar(tmp_path / "x.tar", [*members(0), *members(1, b"broken")])
    config = settings(path)
    arrays = {"mel": config.arrays["mel"]}
    options = {"shards": ShardsConfig(shards=str(path)), "tokenizer": None, "batch_size": 2}
    (batch,) = eval_loader(config, **options, arrays=arrays)
    assert torch.equal(batch.arrays["mel"][1], torch.from_numpy(values_of(101)))
    with pytest.raises(UserError, match=r"sample s1: its \.npy is no NumPy array"):
        list(eval_loader(config, **options, arrays=config.arrays))
    (batch,) = eval_loader(config, **options)
    assert batch.arrays == {}


def test_arrays_travel_from_a_loader_process(tmp_path):
    path = write_tar(tmp_path / "x.tar", members(0))
    batch = first_batch(settings(path), 1)
    batch = replace(batch, arrays={**batch.arrays, "large": torch.randn(1, 600, 600)})
    opened = Parcel.of(batch, Ring(1, 1, (1, 16))).open()
    assert all(torch.equal(opened.arrays[name], batch.arrays[name]) for name in batch.arrays)


# ------------------------------------------------------------------------------------------- config


def with_array(**changes) -> Config:
    return small_config(data__arrays={"audio": {"shape": [3, 2]}}, **changes)


def test_config_says_what_an_array_may_be():
    for bad in ({"shape": []}, {"shape": [0]}, {"key": "wav", "shape": [1]}, {"key": "X.npy", "shape": [1]}):
        with pytest.raises(ValidationError):
            ArrayConfig.model_validate(bad)
    with pytest.raises(ValidationError, match="'text' is an input of its own"):
        small_config(data__arrays={"text": {"shape": [1]}})
    assert with_array().array_inputs == {}  # no encoder sees it


def test_a_mock_batch_has_only_what_is_seen():
    assert mock_batch(with_array(), StubTokenizer(), 2).arrays == {}
