"""Images that travel encoded: the same batch as the loader's, decoded where the model is."""

import io
import itertools
import json

import pytest
import torch
from data_samples import encoded, make_shards, picture, write_tar
from PIL import Image

from mmd2v.config.schema import DataConfig
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.device import DeviceCopy
from mmd2v.data.device_decode import _warn_of_slow_decoding
from mmd2v.data.stream import train_loader

META = json.dumps({"captions": ["x"]}).encode()


def batches(shards, count, micro=4, **change):
    base = {"train": {"shards": str(shards)}, "image": {"size": 24}, "workers": 0, "shuffle_shards": 1}
    config = DataConfig.model_validate({**base, **change})
    loader = train_loader(config, seed=1, tokenizer=None, rank=0, world_size=1, micro_batch_size=micro)
    return list(itertools.islice(loader, count)), config.image


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("device") / "set", 12, 12)


def turned(number: int, before: bytes = b"") -> bytes:
    """A JPEG whose EXIF says that it lies on its side; ``before`` is a segment's content in front of it."""
    image, data = Image.fromarray(picture(number)), io.BytesIO()
    exif = image.getexif()
    exif[274] = 6
    image.save(data, "JPEG", exif=exif)
    segment = b"\xff\xed" + (2 + len(before)).to_bytes(2, "big") + before if before else b""
    return data.getvalue()[:2] + segment + data.getvalue()[2:]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batch_is_the_loaders(shards, workers):
    expected, image = batches(shards, 6)
    found, _ = batches(shards, 6, decode="device", workers=workers)
    copy = DeviceCopy(torch.device("cpu"), image)
    for theirs, ours in zip(expected, found, strict=True):
        assert len(ours.encoded.sizes) == 4
        moved = copy(ours)
        assert moved.encoded is None and moved.sample_ids == theirs.sample_ids
        assert torch.equal(moved.images, theirs.images)


def test_what_is_no_upright_jpeg_stays_with_the_loader(tmp_path):
    files = {"a.jpg": encoded(0), "b.png": encoded(1, "PNG"), "c.jpg": turned(2), "d.webp": encoded(3, "WEBP")}
    files["e.jpg"] = turned(4, before=bytes(5_000))
    members = [m for name, data in files.items() for m in ((name, data), (f"{name[0]}.json", META))]
    path = write_tar(tmp_path / "mixed.tar", members)
    (expected,), image = batches(path, 1, micro=5)
    (found,), _ = batches(path, 1, micro=5, decode="device")
    assert found.sample_ids[found.encoded.rows.item()] == "a"
    assert torch.equal(DeviceCopy(torch.device("cpu"), image)(found).images, expected.images)


def test_one_that_does_not_decode_gets_weight_0(tmp_path):
    broken = bytearray(encoded(1))
    broken[300:] = bytes(len(broken) - 300)
    members = [("a.jpg", encoded(0)), ("a.json", META), ("b.jpg", bytes(broken)), ("b.json", META)]
    path = write_tar(tmp_path / "broken.tar", members)
    (batch,), image = batches(path, 1, micro=2, decode="device", damage={"limit": 0.5})
    moved = DeviceCopy(torch.device("cpu"), image)(batch)
    assert dict(zip(moved.sample_ids, moved.weights.tolist(), strict=True)) == {"a": 1.0, "b": 0.0}
    assert [(sample.kind, sample.shard) for sample in moved.damaged] == [(DamageKind.IMAGE_UNDECODABLE, str(path))]
    assert moved.damaged[0].message.startswith("b: ")
    (strict,), _ = batches(path, 1, micro=2, decode="device", damage={"limit": 0})
    with pytest.raises(Damage, match="does not decode"):
        DeviceCopy(torch.device("cpu"), image)(strict)


def test_a_device_that_decodes_no_batch_is_told_of_once(shards, monkeypatch, caplog):
    expected, image = batches(shards, 2)
    found, _ = batches(shards, 2, decode="device")

    def no_decoder(*_, **__):
        raise RuntimeError("no nvJPEG here\nmore")

    monkeypatch.setattr("mmd2v.data.device_decode.decode_jpeg", no_decoder)
    _warn_of_slow_decoding.cache_clear()
    copy = DeviceCopy(torch.device("cpu"), image)
    for theirs, ours in zip(expected, found, strict=True):
        assert torch.equal(copy(ours).images, theirs.images)
    (record,) = caplog.records
    assert "(no nvJPEG here)" in record.getMessage() and "`data.decode: loader`" in record.getMessage()


def test_a_device_without_memory_for_the_pixels_stops(shards, monkeypatch):
    (batch,), image = batches(shards, 1, decode="device")

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mmd2v.data.device_decode.decode_jpeg", no_memory)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        DeviceCopy(torch.device("cpu"), image)(batch)


@pytest.mark.parametrize("decode", ["loader", "device"])
def test_the_limit_of_pixels_holds_behind_a_segment_without_length(tmp_path, decode):
    hidden = b"\xff\xd8\xff\xfe\x00\x00" + encoded(1)[2:]
    members = [("a.jpg", encoded(0, width=10, height=10)), ("a.json", META), ("b.jpg", hidden), ("b.json", META)]
    path = write_tar(tmp_path / "hidden.tar", members)
    (batch,), _ = batches(path, 1, micro=2, decode=decode, damage={"limit": 0.5, "max_pixels": 100})
    assert [sample.kind for sample in batch.damaged] == [DamageKind.IMAGE_TOO_LARGE]
    assert batch.damaged[0].message.endswith("expected at most 100 pixels (data.damage.max_pixels)")


@pytest.mark.gpu
def test_on_a_gpu_pixels_are_the_loaders_up_to_rounding(shards):
    expected, image = batches(shards, 3)
    found, _ = batches(shards, 3, decode="device", workers=2)
    copy = DeviceCopy(torch.device("cuda"), image)
    for theirs, ours in zip(expected, found, strict=True):
        difference = (copy(ours).images.cpu().int() - theirs.images.int()).abs()
        assert difference.float().mean() < 1.5 and difference.max() < 40  # other JPEG decoders round otherwise


@pytest.mark.gpu
def test_a_copy_on_the_side_stream_is_whole_when_the_step_reads_it(shards):
    (batch,), image = batches(shards, 1, micro=12)
    copy = DeviceCopy(torch.device("cuda"), image)
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        for _ in range(5):
            busy = busy @ busy / 64
        moved = copy(batch.pin_memory())
        assert torch.equal(moved.images.cpu(), batch.images)
