"""Stored outputs of teachers: what is written is read back, and nothing else is taken for it."""

import json
import pickle
import shutil

import numpy as np
import psutil
import pytest
import torch
from data_samples import make_shards
from safetensors.torch import load_file, save_file

from mmd2v.config.schema import DataConfig, TeacherConfig, TokenizerConfig
from mmd2v.data.annotation_files import (
    ANY_EPOCH,
    ShardWriter,
    id_hash,
    is_finished,
    shard_names,
    stored_file,
    stored_shards,
)
from mmd2v.data.annotation_record import Annotation, SetRecord, read_record, teacher_folder, write_record
from mmd2v.data.annotation_settings import captions_fixed, differences, image_settings, is_fixed, listed, text_settings
from mmd2v.data.cursor import Cursor, Position
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.shards import ShardSet
from mmd2v.data.stored_outputs import StoredOutputs, tokens_key
from mmd2v.data.tokenizers import load_tokenizer, train_tokenizer
from mmd2v.errors import UserError
from mmd2v.models.teachers.identity import teacher_settings

PATHS = ["/set/a.tar", "/set/b.tar"]
CPU = torch.device("cpu")


def annotation(**change) -> Annotation:
    return Annotation(
        **{"settings": {"seed": 3}, "width": 5, "captions": None, "tokens": None, "dtype": "fp32", **change}
    )


def ids(shard: int, rows: int) -> list[str | None]:
    return [f"{shard}-{row}" for row in range(rows)]


def write(folder, what, shard, epoch, cls, *, names=None, tokens=None, set_name=""):
    path = stored_file(folder, set_name, epoch, shard_names(PATHS)[shard])
    writer = ShardWriter(path, what, len(names or ids(shard, len(cls))))
    names = names or ids(shard, len(cls))
    each = len(cls) // len(names)
    for start in range(0, len(names), 3):  # in parts, as batches come
        part = slice(start, start + 3)
        writer.add(names[part], cls[start * each : (start + 3) * each], None if tokens is None else tokens[part])
    writer.write()
    return path


def stored(folder, what, files=4, sets=None) -> StoredOutputs:
    return StoredOutputs("resnet", folder, what, sets or {"": PATHS}, files=files)


# ------------------------------------------------------------------------------------- write and read


def test_rows_come_back_by_epoch_shard_and_row(tmp_path):
    what = annotation()
    written = {(epoch, shard): torch.randn(7, 5) for epoch in range(2) for shard in range(2)}
    for (epoch, shard), cls in written.items():
        write(tmp_path, what, shard, epoch, cls)
    places = [Position(1, 0, 6), Position(0, 1, 2), None, Position(1, 1, 0), Position(0, 0, 6)]
    found = stored(tmp_path, what).read(places)
    assert list(found) == ["resnet"] and found["resnet"].dtype == torch.float32
    for row, place in zip(found["resnet"], places, strict=True):
        expected = torch.zeros(5) if place is None else written[place.epoch, place.shard][place.row]
        assert torch.equal(row, expected)


def test_rows_of_a_text_teacher_are_captions(tmp_path):
    what = annotation(captions=2)
    cls = torch.randn(14, 5)
    write(tmp_path, what, 0, 0, cls, names=ids(0, 7))
    found = stored(tmp_path, what).read([Position(0, 0, 4), Position(0, 0, 1)])["resnet"]
    assert torch.equal(found, cls[[8, 9, 2, 3]])
    assert stored(tmp_path, what).zeros(3)["resnet"].shape == (6, 5)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_tokens_and_number_formats(tmp_path, name, dtype):
    what = annotation(tokens=(3, 4), dtype=name)
    cls, tokens = torch.randn(4, 5), torch.randn(4, 3, 4)
    write(tmp_path, what, 1, 0, cls, tokens=tokens)
    found = stored(tmp_path, what).read([Position(0, 1, 3), None])
    assert torch.equal(found["resnet"][0], cls[3].to(dtype))
    assert torch.equal(found[tokens_key("resnet")][0], tokens[3].to(dtype))
    assert found[tokens_key("resnet")].shape == (2, 3, 4) and not found[tokens_key("resnet")][1].any()


def test_damaged_samples_are_zeros_without_an_id(tmp_path):
    names = [*ids(0, 3), None, "0-4"]
    path = write(tmp_path, annotation(tokens=(1, 2)), 0, 0, torch.ones(5, 5), names=names, tokens=torch.ones(5, 1, 2))
    file = load_file(path)
    assert file["ids"].tolist() == [0 if name is None else id_hash(name) for name in names]
    assert file["cls"].sum(1).tolist() == [5, 5, 5, 0, 5] and file["tokens"].sum((1, 2)).tolist() == [2, 2, 2, 0, 2]


def test_one_file_may_stand_for_every_epoch(tmp_path):
    cls = torch.randn(2, 5)
    write(tmp_path, annotation(), 0, ANY_EPOCH, cls)
    write(tmp_path, annotation(), 1, 7, cls + 1)
    reader = stored(tmp_path, annotation())
    found = reader.read([Position(epoch, 0, 1) for epoch in (0, 7, 12345)] + [Position(7, 1, 1)])["resnet"]
    assert torch.equal(found, torch.stack([cls[1]] * 3 + [cls[1] + 1]))
    with pytest.raises(UserError, match=r"epoch-0008.b\.safetensors is missing; run `mmd2v data annotate` again"):
        reader.read([Position(8, 1, 1)])


def test_a_file_of_the_epoch_comes_before_one_of_every_epoch(tmp_path):
    """The first 2 samples had one caption each; of the 4 that are stored later, one has several."""
    write(tmp_path, annotation(), 0, ANY_EPOCH, torch.ones(2, 5))
    write(tmp_path, annotation(), 0, 0, torch.ones(4, 5))
    stored(tmp_path, annotation()).check(Position(0, 0, 3), "0-3")


def test_sets_of_a_mixture_lie_in_folders_of_their_own(tmp_path):
    sets = {"coco": PATHS, "visual/genome": PATHS}
    for number, name in enumerate(sets):
        write(tmp_path, annotation(), 0, 0, torch.full((2, 5), float(number)), set_name=name)
    reader = stored(tmp_path, annotation(), sets=sets)
    found = reader.read([Position(0, 0, 1, 1), Position(0, 0, 1, 0)])["resnet"]
    assert found[:, 0].tolist() == [1, 0]
    assert stored_shards(tmp_path, "visual/genome", 0) == {"a"} and stored_shards(tmp_path, "", 0) == set()


def test_a_file_that_lacks_samples_is_not_written(tmp_path):
    writer = ShardWriter(tmp_path / "x.safetensors", annotation(), 3)
    writer.add(ids(0, 2), torch.ones(2, 5))
    with pytest.raises(UserError, match="found outputs of 2 samples, expected 3"):
        writer.write()
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------- what must not be used


def test_a_sample_is_known_by_its_id(tmp_path):
    write(tmp_path, annotation(), 0, 0, torch.ones(4, 5), names=["0-0", None, "0-2", "0-3"])
    reader = stored(tmp_path, annotation())
    reader.check(Position(0, 0, 2), "0-2")
    with pytest.raises(
        UserError, match=r"/set/a\.tar: sample 'other' \(row 2\) is another one .* was replaced"
    ) as error:
        reader.check(Position(0, 0, 2), "other")
    assert not isinstance(error.value, Damage)  # it is no damage that a run may put up with
    with pytest.raises(UserError, match=r"\(row 4\) is beyond the 4 samples of .*a\.safetensors: .* run it again"):
        reader.check(Position(0, 0, 4), "0-4")
    with pytest.raises(Damage, match="was damaged when") as damage:
        reader.check(Position(0, 0, 1), "0-1")
    assert damage.value.kind == DamageKind.NOT_ANNOTATED


def test_files_of_another_annotation_or_cut_ones_are_refused(tmp_path):
    path = write(tmp_path, annotation(settings={"seed": 4}), 0, 0, torch.ones(4, 5))
    with pytest.raises(UserError, match="belongs to another annotation"):
        stored(tmp_path, annotation()).read([Position(0, 0, 0)])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        stored(tmp_path, annotation(settings={"seed": 4})).read([Position(0, 0, 0)])


def test_what_counts_as_finished(tmp_path):
    path = write(tmp_path, annotation(), 0, 0, torch.ones(4, 5))
    assert is_finished(path, annotation(), 4) and is_finished(path, annotation(), 3)
    assert not is_finished(path, annotation(), 5)
    assert not is_finished(path, annotation(dtype="fp16"), 4)
    assert not is_finished(path.with_name("none.safetensors"), annotation(), 4)
    path.write_bytes(path.read_bytes()[:-9])
    assert not is_finished(path, annotation(), 4)


# ------------------------------------------------------------------------------------------- economy


def test_few_files_are_open_and_none_travels_to_another_process(tmp_path):
    for epoch in range(5):
        write(tmp_path, annotation(), 0, epoch, torch.full((2, 5), float(epoch)))
    reader = stored(tmp_path, annotation(), files=2)
    for epoch in (0, 1, 2, 1, 4, 3, 0):
        assert reader.read([Position(epoch, 0, 1)])["resnet"][0, 0] == epoch
        assert len(reader._open) <= 2
    copy = pickle.loads(pickle.dumps(reader))
    assert len(copy._open) == 0 and copy.read([Position(3, 0, 1)])["resnet"][0, 0] == 3


def test_a_row_is_read_and_not_its_file(tmp_path):
    megabytes = 128
    rows = megabytes * 1024 * 1024 // (4 * 1024)
    what = annotation(width=1024)
    path = stored_file(tmp_path, "", 0, "a")
    path.parent.mkdir(parents=True)
    cls = torch.zeros(rows, 1024)
    save_file(
        {"cls": cls, "ids": torch.from_numpy(np.ones(rows, np.uint64))},
        path,
        metadata={"fingerprint": what.fingerprint},
    )
    del cls
    reader, process = stored(tmp_path, what), psutil.Process()

    def own() -> float:
        return process.memory_full_info().uss / 2**20

    before = own()
    reader.read([Position(0, 0, row) for row in range(0, rows, rows // 8)])
    assert own() - before < megabytes / 4


# --------------------------------------------------------------------------------------------- names


def test_shards_are_named_by_what_tells_them_apart():
    assert shard_names(["/data/x/000.tar", "/data/x/001.tar"]) == ["000", "001"]
    assert shard_names(["/data/x/000.tar", "/data/y/000.tar"]) == ["x~000", "y~000"]
    assert shard_names(["/mnt/x/000.tar", "/mnt/y/000.tar"]) == ["x~000", "y~000"]  # wherever the data lies
    assert shard_names(["https://user:secret@h/s/0.tar?key=1", "https://h/s/1.tar"]) == ["0", "1"]
    same = shard_names(["pipe:cat /a/0.tar", "pipe:cat /a/1.tar"])
    assert len(set(same)) == 2 and not any("/" in name for name in same)


def test_hash_of_an_id():
    assert len({id_hash(str(number)) for number in range(1000)} | {0}) == 1001
    assert all(0 < id_hash(str(number)) < 2**64 for number in range(100))
    assert id_hash("sample-1") == id_hash("sample-1")


# ------------------------------------------------------------------------------------------ settings


def data_config(**change) -> DataConfig:
    return DataConfig.model_validate({"train": {"shards": "nowhere"}, **change})


@pytest.mark.parametrize(
    "image",
    [
        {"size": 32},
        {"crop_scale": (0.5, 1.0)},
        {"crop_ratio": (0.8, 1.2)},
        {"flip": 0.4},
        {"interpolation": "bilinear"},
    ],
)
def test_what_changes_an_image_changes_the_settings(image):
    key = f"data.image.{next(iter(image))}"
    (found,) = differences(image_settings(data_config(), 3), image_settings(data_config(image=image), 3))
    assert found.startswith(f"{key} differs: stored ")


def test_what_a_teacher_does_not_see_changes_nothing():
    own = image_settings(data_config(), 3)
    assert own == image_settings(data_config(image={"mean": (0, 0, 0), "eval_resize": "squash"}, workers=7), 3)
    assert differences(own, image_settings(data_config(), 4)) == ["seed differs: stored 3, now 4"]
    for fixed in ({"crop_scale": (1.0, 1.0), "flip": 0.0}, {"crop_scale": (1.0, 1.0), "flip": 1.0}):
        config = data_config(image=fixed)
        assert is_fixed(config.image) and image_settings(config, 3) == image_settings(config, 4)
    assert not is_fixed(data_config(image={"crop_scale": (1.0, 1.0), "flip": 0.5}).image)
    assert not is_fixed(data_config(image={"crop_scale": (0.9, 1.0), "flip": 0.0}).image)


def test_differences_are_listed_in_short():
    stored = {"a": 1, "b": [1, 2], "weights": "0" * 64, "d": 4}
    found = differences(stored, {"a": 2, "b": [1, 2], "weights": "f" * 64, "e": None})
    assert found == [
        "a differs: stored 1, now 2",
        "weights differs: stored 000000000000…, now ffffffffffff…",
        "d differs: stored 4, now null",
    ]
    assert listed([*found, "x", "y"]) == "; ".join(found) + "; and 2 more"


def test_text_settings_follow_the_vocabulary_and_not_its_path(tmp_path):
    texts = ["a red square", "two blue rings"]
    train_tokenizer(texts, "wordlevel", 50).save(str(tmp_path / "one.json"))
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "one.json", tmp_path / "moved" / "tokenizer.json")
    train_tokenizer([*texts, "green"], "wordlevel", 50).save(str(tmp_path / "other.json"))

    def settings(name, seed=3, **change):
        config = data_config(tokenizer={"path": str(tmp_path / name), "max_length": 9}, **change)
        assert isinstance(config.tokenizer, TokenizerConfig)
        return text_settings(config, load_tokenizer(config.tokenizer), seed)

    own = settings("one.json")
    assert own == settings("moved") == settings("one.json", image={"flip": 0.1})
    assert len(differences(own, settings("other.json"))) == 1
    assert differences(own, settings("one.json", captions_per_image=2)) == [
        "data.captions_per_image differs: stored 1, now 2"
    ]
    assert differences(own, settings("one.json", seed=5)) == ["seed differs: stored 3, now 5"]


def test_a_teacher_is_known_by_its_weights_and_not_their_path(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "moved" / "model.safetensors")
    save_file({"w": torch.zeros(3)}, tmp_path / "b.safetensors")

    def settings(name, **change):
        return teacher_settings(TeacherConfig(name=name, precision="fp32", **change), CPU, "here")

    own = settings(f"timm:resnet18@{tmp_path / 'a.safetensors'}")
    assert own == settings(f"timm:resnet18@{tmp_path / 'moved'}", outputs="anywhere")
    for other in (
        settings(f"timm:resnet18@{tmp_path / 'b.safetensors'}"),
        settings(f"timm:resnet34@{tmp_path / 'a.safetensors'}"),
        settings(f"timm:resnet18@{tmp_path / 'a.safetensors'}", image_size=96),
        settings(f"timm:resnet18@{tmp_path / 'a.safetensors'}", mean=(0.1, 0.2, 0.3)),
        settings(f"timm:resnet18@{tmp_path / 'a.safetensors'}", kwargs={"drop_rate": 0.1}),
    ):
        assert len(differences(own, other)) == 1
    with pytest.raises(UserError, match=r"here: no file .*none\.safetensors"):
        settings(f"timm:resnet18@{tmp_path / 'none.safetensors'}")
    assert str(tmp_path) not in json.dumps(own)


def test_files_of_a_hugging_face_folder_decide(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({"w": torch.ones(3)}, tmp_path / name / "model.safetensors")

    def settings(name, **change):
        return teacher_settings(TeacherConfig(name=f"hf:{tmp_path / name}", modality="text", **change), CPU, "here")

    assert settings("one") == settings("two") != settings("one", pooling="mean")
    (tmp_path / "two" / "config.json").write_text('{"hidden_act": "relu"}')
    assert len(differences(settings("one"), settings("two"))) == 1
    hub = teacher_settings(TeacherConfig(name="hf:owner/name", precision="bf16"), CPU, "here")
    assert hub["the teacher's name"] == "hf:owner/name" and hub["the teacher's precision"] == "bfloat16"


# -------------------------------------------------------------------------------------------- record


def test_record_comes_back(tmp_path):
    what = annotation(settings={"crop": [0.5, 1.0], "mean": None}, tokens=(3, 4), sets={"": SetRecord(2, {"a": 7})})
    folder = teacher_folder(tmp_path, "res/net")
    assert read_record(folder) is None
    write_record(folder, what, "0.1")
    assert read_record(folder) == what and read_record(folder).fingerprint == what.fingerprint
    assert folder.parent == tmp_path  # whatever the teacher is called
    values = json.loads((folder / "annotation.json").read_text())
    assert values["fingerprint"] == what.fingerprint
    for wrong in (values | {"format": 99}, {k: v for k, v in values.items() if k != "width"}, [1]):
        (folder / "annotation.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"annotation\.json: (found format|not a record)"):
            read_record(folder)
    (folder / "annotation.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_record(folder)


def test_the_fingerprint_is_of_what_decides_the_outputs():
    own = annotation().fingerprint
    assert own == annotation(sets={"": SetRecord(2, {"a": 7})}).fingerprint
    for change in ({"settings": {"seed": 4}}, {"width": 6}, {"captions": 1}, {"tokens": (1, 5)}, {"dtype": "fp16"}):
        assert annotation(**change).fingerprint != own


# ------------------------------------------------------------------------------- what a run goes through


def test_captions_that_every_epoch_takes(tmp_path):
    make_shards(tmp_path / "set", 6, 3)
    shards = ShardSet(str(tmp_path / "set"))
    numbers = {len(shards.read(shard, row).captions) for shard in range(2) for row in range(3)}
    multiple = int(np.lcm.reduce(list(numbers)))
    assert captions_fixed(shards, 0, multiple) and captions_fixed(shards, 1, 2 * multiple)
    assert not captions_fixed(shards, 0, multiple + 1)


@pytest.mark.parametrize(("lanes", "batch", "drop"), [(1, 1, False), (1, 8, True), (2, 8, False), (4, 8, True)])
def test_shards_that_an_unfinished_epoch_gets_to(lanes, batch, drop):
    counts = np.array([5, 0, 9, 3, 4, 8, 1])
    cursor = Cursor(counts, seed=1, window=2, lanes=lanes, batch=batch, drop_last=drop)
    for epoch in (0, 3):
        start = epoch * cursor.epoch_length
        for samples in range(cursor.epoch_length + 1):
            expected = {cursor[start + offset].shard for offset in range(samples)}
            assert cursor.shards_until(epoch, samples) == expected, (epoch, samples)
