"""Teachers: frozen whatever an engine does, their own normalisation and size, names that do not exist."""

import io
import tarfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import random_batch

import mmd2v.teachers
from mmd2v.data.batch import Batch
from mmd2v.data.transforms import decode_image
from mmd2v.errors import UserError


@pytest.fixture
def weights(tmp_path):
    import timm

    path = tmp_path / "resnet10t.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", drop_rate=0.5).state_dict(), path)
    return path


def test_a_teacher_stays_in_eval_mode_and_gives_no_gradient(weights):
    teacher = mmd2v.teachers.load(f"timm:resnet10t@{weights}", kwargs={"drop_rate": 0.5, "drop_path_rate": 0.5})
    batch = random_batch(size=64)
    first = teacher(batch)
    teacher.train()
    second = teacher(batch)
    assert torch.equal(first.cls_BD, second.cls_BD) and not first.cls_BD.requires_grad
    assert first.cls_BD.shape == (4, teacher.width) and first.cls_BD.dtype == torch.float32
    assert first.tokens_BTD.shape == (4, 4, teacher.width)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_precision_is_the_teachers_own_under_autocast(weights):
    teacher = mmd2v.teachers.load(f"timm:resnet10t@{weights}", precision="fp32")
    batch = random_batch(size=64)
    plain = teacher(batch).cls_BD
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher(batch).cls_BD, plain)
    half = mmd2v.teachers.load(f"timm:resnet10t@{weights}", precision="bf16")(batch).cls_BD
    assert not torch.equal(half, plain)
    torch.testing.assert_close(half, plain, rtol=0.1, atol=0.05)


def test_own_input_size_and_normalisation(weights):
    batch = random_batch(size=64)
    name = f"timm:resnet10t@{weights}"
    small = mmd2v.teachers.load(name, image_size=64, precision="fp32")
    resized = mmd2v.teachers.load(name, precision="fp32", **{"mean": (0.0,) * 3, "std": (1.0,) * 3})
    assert not torch.allclose(small(batch).cls_BD, resized(batch).cls_BD)
    from mmd2v.config.schema import TeacherConfig
    from mmd2v.models.teachers.timm import TimmTeacher

    config = TeacherConfig(name=name, image_size=96, precision="fp32")
    teacher = TimmTeacher(f"resnet10t@{weights}", config, 64, "here").freeze(torch.device("cpu"))
    assert teacher(batch).tokens_BTD.shape[1] == 9


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tim:resnet10t", "unknown name 'tim'. Did you mean 'timm'"),
        ("timm:resnet10tt@x", "unknown name 'resnet10tt'. Did you mean 'resnet10t'"),
        ("timm:resnet10t@nowhere.safetensors", "no weights at nowhere.safetensors"),
        ("hf:no-such-folder", "no Hugging Face encoder 'no-such-folder'"),
        ("mmd2v:no-such-folder", "no-such-folder is no export"),
    ],
)
def test_a_teacher_that_does_not_exist(name, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        mmd2v.teachers.load(name)


def test_wrong_arguments_of_a_backbone_are_named(weights):
    with pytest.raises(UserError, match="does not take these arguments"):
        mmd2v.teachers.load(f"timm:resnet10t@{weights}", kwargs={"drop_pth_rate": 0.1})


def test_text_teacher_pools_real_tokens_only(shared):
    from transformers import AutoModel, AutoTokenizer

    folder = str(shared / "teachers" / "minilm_l6_v2")
    encoded = AutoTokenizer.from_pretrained(folder)(["a dog", "two men play chess in a park"], padding=True)
    mask = torch.tensor(encoded["attention_mask"]).bool()
    ids = torch.tensor(encoded["input_ids"])
    batch = Batch(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), ids[mask].int(), mask.sum(1).int(), torch.arange(2))
    with torch.no_grad():
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    for pooling in ("mean", "cls"):
        teacher = mmd2v.teachers.load(f"hf:{folder}", modality="text", pooling=pooling, precision="fp32")
        expected = hidden[:, 0] if pooling == "cls" else (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        torch.testing.assert_close(teacher(batch).cls_BD, expected, rtol=0, atol=1e-5)


def test_mobilenet_features_separate_pictures_as_published(shared):
    """The real teacher, its real weights: with its own normalisation it is surer of a picture's class than without."""
    import timm

    folder = shared / "teachers" / "mobilenetv2_100"
    name = f"timm:mobilenetv2_100@{folder / 'model.safetensors'}"
    half = (128 / 255,) * 3
    options = {"kwargs": {"pad_type": "same"}, "mean": half, "std": half, "precision": "fp32", "image_size": 160}
    teacher = mmd2v.teachers.load(name, **options)
    with tarfile.open(shared / "flickr8k" / "flickr8k_val_images_160px.tar") as tar:
        members = [tar.extractfile(m) for m in tar.getmembers()[:8]]
        images = torch.stack([decode_image(io.BytesIO(m.read()).getvalue()) for m in members])
    batch = Batch(images, torch.zeros(0).int(), torch.zeros(0).int(), torch.zeros(0).long())
    plain = timm.create_model("mobilenetv2_100", pad_type="same").eval()
    plain.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    with torch.no_grad():
        expected = plain.forward_head(plain.forward_features((images.float() - 128) / 128), pre_logits=True)
    torch.testing.assert_close(teacher(batch).cls_BD, expected, rtol=1e-3, atol=1e-3)
