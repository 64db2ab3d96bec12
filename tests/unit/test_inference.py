"""encode_image and encode_text: every kind of input, the preprocessing of evaluation, batches, errors."""

import io
import math

import numpy as np
import pytest
import torch
from export_samples import CAPTIONS, photo, small_export
from PIL import Image

import mmd2v
from mmd2v.data.transforms import decode_image, eval_transform
from mmd2v.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_export(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoder(folder):
    return mmd2v.load(folder)


def test_every_kind_of_image_gives_one_embedding(encoder, tmp_path):
    picture = photo(1)
    picture.save(tmp_path / "a.png")
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), picture, pixels]
    rows = encoder.encode_image(kinds)
    assert rows.shape == (4, 16) and rows.dtype == torch.float32
    assert (rows - rows[0]).abs().max() <= 1e-6
    assert torch.allclose(rows.norm(dim=1), torch.ones(4))
    assert torch.allclose(encoder.encode_image(pixels[None]), rows[:1], atol=1e-6)


def test_preprocessing_is_that_of_evaluation(encoder, tmp_path):
    photo(2, (90, 50)).save(tmp_path / "a.jpg", quality=95)
    data = (tmp_path / "a.jpg").read_bytes()
    square = eval_transform(decode_image(data), encoder.config.data.image)
    assert torch.equal(encoder.preprocess(tmp_path / "a.jpg"), square)
    with torch.no_grad():
        assert torch.allclose(encoder.encode_image([tmp_path / "a.jpg"]), encoder.student.encode_image(square[None]))


def test_orientation_transparency_and_depth_of_pil_images(encoder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(3).save(tmp_path / "turned.png", exif=exif)
    photo(3).convert("RGBA").save(tmp_path / "alpha.png")
    photo(3).convert("L").save(tmp_path / "grey.png")
    grey16 = np.asarray(photo(3).convert("L")).astype(np.uint16) << 8
    Image.fromarray(grey16 + 200).save(tmp_path / "grey16.png")
    for name in ("turned.png", "alpha.png", "grey.png", "grey16.png"):
        with Image.open(tmp_path / name) as opened:
            assert torch.equal(encoder.preprocess(opened), encoder.preprocess(tmp_path / name)), name


def test_batches_change_nothing(encoder):
    pictures = [photo(i) for i in range(5)]
    whole = encoder.encode_image(pictures)
    assert torch.allclose(encoder.encode_image(pictures, batch_size=2), whole, atol=1e-6)
    texts = [*CAPTIONS, "red", "a small blue cross"]
    assert torch.allclose(encoder.encode_text(texts, batch_size=2), encoder.encode_text(texts), atol=1e-6)


def test_empty_lists_give_no_rows(encoder):
    assert encoder.encode_image([]).shape == encoder.encode_text([]).shape == (0, 16)
    assert encoder.encode_image(torch.zeros(0, 3, 8, 8, dtype=torch.uint8)).shape == (0, 16)


def test_bf16_is_near_fp32(folder, encoder):
    fast = mmd2v.load(folder, precision="bf16")
    pictures = [photo(i) for i in range(3)]
    rows = fast.encode_image(pictures)
    assert rows.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(rows, encoder.encode_image(pictures)).min() > 0.99
    assert not torch.equal(rows, encoder.encode_image(pictures))
    assert "bf16" in fast.preprocessing() and "32 px" in fast.preprocessing()


def broken_file(tmp_path):
    data = io.BytesIO()
    photo(1).save(data, "png")
    (tmp_path / "cut.png").write_bytes(data.getvalue()[:60])
    return tmp_path / "cut.png"


def test_bad_images_are_named(encoder, tmp_path):
    with pytest.raises(UserError, match=r"cut\.png: the image does not decode"):
        encoder.encode_image([photo(1), broken_file(tmp_path)])
    with pytest.raises(UserError, match=r"none\.jpg: No such file"):
        encoder.encode_image([tmp_path / "none.jpg"])
    with pytest.raises(UserError, match=r"image 1 is torch.float32 \[3, 8, 8\], expected a path"):
        encoder.encode_image([photo(1), torch.zeros(3, 8, 8)])
    with pytest.raises(UserError, match="image 0 is int"):
        encoder.encode_image([7])
    for single in ("a.jpg", photo(1), torch.zeros(3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(UserError, match="found a single image, expected a list"):
            encoder.encode_image(single)


def test_bad_texts_are_named(encoder):
    with pytest.raises(UserError, match="found a single text"):
        encoder.encode_text("a red circle")
    with pytest.raises(UserError, match="item 1 is ' '"):
        encoder.encode_text(["red", " "])
    with pytest.raises(UserError, match=f"item 0 is {math.nan}"):
        encoder.encode_text([math.nan])


def test_absent_modality_device_and_precision(folder, tmp_path):
    only_image = {"image": {"kind": "patch", "patch_size": 8}}
    objectives = [{"kind": "attributes", "classes": 4}]
    changes = {"model__encoders": only_image, "objectives": objectives, "data__labels": "attributes"}
    encoder = mmd2v.load(small_export(tmp_path, **changes))
    with pytest.raises(UserError, match="has no text modality, only image"):
        encoder.encode_text(["red"])
    with pytest.raises(UserError, match="device: found 'gpu'"):
        mmd2v.load(folder, device="gpu")
    with pytest.raises(UserError, match="precision is 'int8', expected fp32 or bf16"):
        mmd2v.load(folder, precision="int8")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees 0 CUDA devices"):
            mmd2v.load(folder, device="cuda")
        assert mmd2v.load(folder, device="auto").device.type == "cpu"
