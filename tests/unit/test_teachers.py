"""Teachers: frozen whatever an engine does, their own normalisation and size, names that do not exist."""

import io
import json
import tarfile

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small import random_batch

import mmd2v.teachers
from mmd2v.data.batch import Batch
from mmd2v.data.transforms import decode_image
from mmd2v.errors import UserError
from mmd2v.models.teachers import base
from mmd2v.models.timm_backbone import feature_shape


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "resnet10t.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", drop_rate=0.5).state_dict(), path)
    return path


def test_a_teacher_stays_in_eval_mode_and_gives_no_gradient(weights):
    teacher = mmd2v.teachers.load(
        f"timm:resnet10t@{weights}", image_size=64, kwargs={"drop_rate": 0.5, "drop_path_rate": 0.5}
    )
    batch = random_batch(size=64)
    first = teacher(batch)
    teacher.train()
    second = teacher(batch)
    assert torch.equal(first.cls_BD, second.cls_BD) and not first.cls_BD.requires_grad
    assert first.cls_BD.shape == (4, teacher.width) and first.cls_BD.dtype == torch.float32
    assert first.tokens_BTD.shape == (4, 4, teacher.width)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_precision_is_the_teachers_own_under_autocast(weights):
    teacher = mmd2v.teachers.load(f"timm:resnet10t@{weights}", image_size=64, precision="fp32")
    batch = random_batch(size=64)
    plain = teacher(batch).cls_BD
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher(batch).cls_BD, plain)
    half = mmd2v.teachers.load(f"timm:resnet10t@{weights}", image_size=64, precision="bf16")(batch).cls_BD
    assert not torch.equal(half, plain)
    torch.testing.assert_close(half, plain, rtol=0.1, atol=0.05)


def test_own_input_size_and_normalisation(weights):
    batch = random_batch(size=64)
    name, options = f"timm:resnet10t@{weights}", {"mean": (0.1, 0.2, 0.3), "std": (1.0, 0.5, 0.2), "precision": "fp32"}
    large = mmd2v.teachers.load(name, image_size=96, **options)
    pixels = F.interpolate(batch.images.float(), size=(96, 96), mode="bicubic", antialias=True).clamp(0, 255) / 255
    mean, std = (torch.tensor(options[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        plain = timm.create_model("resnet10t").eval()
        plain.load_state_dict(load_file(weights))
        expected = plain.forward_head(plain.forward_features((pixels - mean) / std), pre_logits=True)
    torch.testing.assert_close(large(batch).cls_BD, expected, rtol=1e-4, atol=1e-4)
    assert large(batch).tokens_BTD.shape[1] == 9


def test_without_a_size_the_published_one_is_used(weights):
    teacher = mmd2v.teachers.load(f"timm:resnet10t@{weights}")
    assert teacher.normalize.size == timm.get_pretrained_cfg("resnet10t").input_size[-1]


@pytest.mark.parametrize(
    ("model", "kwargs", "tokens"),
    [
        ("test_vit", {}, 100),  # CLS pooling, fixed size
        ("test_vit2", {}, 100),  # average pooling with its own norm
        ("mobilenetv3_small_050", {}, 4),  # a convolution after pooling
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "embed_dim": 12, "depths": (1, 1)}, 64),
    ],
)
def test_backbones_of_every_kind(tmp_path, model, kwargs, tokens):
    """The CLS is what timm itself would classify, and tokens are positions whatever the order of the axes."""
    torch.manual_seed(0)
    plain = timm.create_model(model, **kwargs).eval()
    save_file(plain.state_dict(), tmp_path / "w.safetensors")
    options = {} if kwargs or "vit" in model else {"image_size": 64}
    teacher = mmd2v.teachers.load(
        f"timm:{model}@{tmp_path / 'w.safetensors'}", kwargs=kwargs, precision="fp32", **options
    )
    batch = random_batch(size=teacher.normalize.size)
    found = teacher(batch)
    with torch.no_grad():
        raw = plain.forward_features(teacher.normalize(batch.images))
        expected = plain.forward_head(raw, pre_logits=True)
    torch.testing.assert_close(found.cls_BD, expected, rtol=1e-4, atol=1e-4)
    assert found.cls_BD.shape == (4, teacher.width) and found.tokens_BTD.shape[:2] == (4, tokens)
    if raw.ndim == 4 and raw.shape[-1] == found.tokens_BTD.shape[-1]:
        torch.testing.assert_close(found.tokens_BTD, raw.flatten(1, 2), rtol=1e-4, atol=1e-4)


def test_a_size_the_model_cannot_take_is_named():
    with pytest.raises(UserError, match="gives no feature map -1 for images of 72 pixels"):
        feature_shape(timm.create_model("test_vit"), 72, -1, "here")


def test_damaged_weights_are_named(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(UserError, match="is no readable safetensors file"):
        mmd2v.teachers.load(f"timm:resnet10t@{tmp_path / 'w.safetensors'}")


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory):
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    return folder


def test_a_hugging_face_vision_teacher_uses_its_own_statistics(vision_folder):
    name = f"hf:{vision_folder}"
    (vision_folder / "preprocessor_config.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="publishes no image mean and deviation"):
        mmd2v.teachers.load(name)
    record = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3]}
    (vision_folder / "preprocessor_config.json").write_text(json.dumps(record))
    batch = random_batch(size=32)
    own = mmd2v.teachers.load(name, precision="fp32")(batch).cls_BD
    given = {"mean": tuple(record["image_mean"]), "std": tuple(record["image_std"])}
    torch.testing.assert_close(own, mmd2v.teachers.load(name, precision="fp32", **given)(batch).cls_BD)
    other = mmd2v.teachers.load(name, precision="fp32", mean=(0.5,) * 3, std=(0.5,) * 3)(batch).cls_BD
    assert not torch.allclose(own, other, atol=1e-3)


@pytest.mark.parametrize(("half", "expected"), [(torch.bfloat16, torch.bfloat16), (None, torch.float32)])
def test_automatic_precision_is_what_the_device_has(half, expected, weights, monkeypatch):
    monkeypatch.setattr(base, "half_of", lambda device: half)
    teacher = mmd2v.teachers.load(f"timm:resnet10t@{weights}")
    assert teacher.dtype == expected and next(teacher.parameters()).dtype == expected


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
