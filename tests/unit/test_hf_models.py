"""CLIP, SigLIP and FLAVA as measured models against transformers' own forward passes, processors and tokenizers."""

import json
import shutil

import numpy as np
import pytest
import small_hub
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, FlavaForPreTraining, SiglipModel

from mmd2v.errors import UserError
from mmd2v.evaluation.models import open_model

FP32 = {"rtol": 0, "atol": 1e-5}
TEXTS = ["Two dogs in the snow", "a man on a bicycle .", "the red ball", "unheard words and a dog " * 5]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    return {
        "hf-clip": small_hub.clip(root / "clip"),
        "hf-siglip": small_hub.siglip(root / "siglip"),
        "hf-flava": small_hub.flava(root / "flava", pretraining=True),
    }


@pytest.fixture(scope="module")
def images():
    """Pictures of several shapes, the last no larger than a patch."""
    draw = np.random.default_rng(1)
    shapes = [(50, 70), (90, 40), (32, 32), (33, 31), (5, 3)]
    return [Image.fromarray(draw.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]


def theirs(folder, images, texts, padding):
    processor, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    return pixels, tokenizer(texts, padding=padding, truncation=True, return_tensors="pt")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hf-clip", "hf-siglip"])
def test_logits_are_those_of_the_library(kind, folders, images):
    pixels, tokens = theirs(folders[kind], images, TEXTS, {"hf-clip": True, "hf-siglip": "max_length"}[kind])
    model = {"hf-clip": CLIPModel, "hf-siglip": SiglipModel}[kind].from_pretrained(folders[kind]).eval()
    expected = model(pixel_values=pixels, **tokens)
    ours = open_model(f"{kind}:{folders[kind]}")
    image_BE, text_NE = ours.encode_image(images, batch_size=2), ours.encode_text(TEXTS, batch_size=3)
    assert image_BE.shape[1] == text_NE.shape[1] == ours.width
    torch.testing.assert_close(image_BE, F.normalize(expected.image_embeds, dim=-1), **FP32)
    torch.testing.assert_close(text_NE, F.normalize(expected.text_embeds, dim=-1), **FP32)
    logits = image_BE @ text_NE.T * model.logit_scale.exp() + getattr(model, "logit_bias", torch.zeros(1))
    torch.testing.assert_close(logits, expected.logits_per_image, rtol=1e-5, atol=1e-4)
    assert logits.std() > 0.1  # else anything would agree


@torch.no_grad()
def test_flava_compares_what_its_contrastive_loss_does(folders, images):
    folder = folders["hf-flava"]
    images = images[: len(TEXTS)]
    pixels, tokens = theirs(folder, images, TEXTS, True)
    model = FlavaForPreTraining.from_pretrained(folder).eval()
    given = {**tokens, "input_ids_masked": tokens["input_ids"], "pixel_values": pixels}
    expected = model(**given, skip_unmasked_multimodal_encoder=True, return_loss=False)
    ours = open_model(f"hf-flava:{folder}")
    logits = ours.encode_image(images) @ ours.encode_text(TEXTS).T * model.flava.logit_scale.exp()
    torch.testing.assert_close(logits, expected.contrastive_logits_per_image, rtol=1e-5, atol=1e-4)
    assert logits.std() > 0.1


@pytest.mark.parametrize("kind", ["hf-clip", "hf-siglip", "hf-flava"])
def test_preprocessing_is_the_processors_own(kind, folders, images, tmp_path):
    ours = open_model(f"{kind}:{folders[kind]}")
    pixels, _ = theirs(folders[kind], images, TEXTS, True)
    seen = []
    ours.embed_images = lambda prepared: seen.append(prepared) or torch.ones(len(prepared), ours.width)
    as_tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    images[0].save(tmp_path / "image.png")
    ours.encode_image([tmp_path / "image.png", *images[1:3], *as_tensors[3:]])
    torch.testing.assert_close(seen[0], pixels, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("hf-clip", ["shortest side to 32 px, bicubic", "centre crop 32 × 32", "at most 12 tokens", "mean 0.4815"]),
        ("hf-siglip", ["squashed to 32 × 32 px, bicubic", "always 10 tokens", "mean 0.5 0.5 0.5"]),
        ("hf-flava", ["squashed to 32 × 32 px, bicubic", "at most 20 tokens"]),
    ],
)
def test_preprocessing_is_said(kind, said, folders):
    model = open_model(f"{kind}:{folders[kind]}", precision="bf16")
    line = model.preprocessing()
    assert all(part in line for part in [*said, "arithmetic: bf16"]), line
    assert model.name == f"{kind}:{folders[kind].name}"


def test_half_precision_is_near(folders, images):
    spec = f"hf-clip:{folders['hf-clip']}"
    exact, half = open_model(spec), open_model(spec, precision="bf16")
    image_BE = half.encode_image(images)
    assert image_BE.dtype == torch.float32
    difference = (image_BE - exact.encode_image(images)).abs().max()
    assert 0 < difference < 0.05
    assert (half.encode_text(TEXTS) - exact.encode_text(TEXTS)).abs().max() < 0.05


def test_nothing_and_wrong_inputs(folders, tmp_path):
    model = open_model(f"hf-clip:{folders['hf-clip']}")
    assert model.encode_image([]).shape == (0, 16) and model.encode_text([]).shape == (0, 16)
    with pytest.raises(UserError, match="item 1 is ' '"):
        model.encode_text(["a dog", " "])
    with pytest.raises(UserError, match=r"image 1 is torch\.float32"):
        model.encode_image([torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4)])
    with pytest.raises(UserError, match=r"nowhere\.jpg"):
        model.encode_image([tmp_path / "nowhere.jpg"])


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)


def test_another_kind_of_model_is_named(folders):
    with pytest.raises(UserError, match=r"type 'siglip', expected 'clip'. Did you mean 'hf-siglip:"):
        open_model(f"hf-clip:{folders['hf-siglip']}")


def test_weights_that_lack_a_tensor_are_refused(folders, tmp_path):
    """The library would draw them at random, and say so in a warning."""
    folder = copied(folders["hf-clip"], tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 of .*visual_projection.weight"):
        open_model(f"hf-clip:{folder}")


def test_pickles_are_not_read(folders, tmp_path):
    folder = copied(folders["hf-clip"], tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"found no weights, expected weights of transformers as safetensors"):
        open_model(f"hf-clip:{folder}")


def test_damaged_and_foreign_files(folders, tmp_path):
    folder = copied(folders["hf-siglip"], tmp_path)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="found no weights"):
        open_model(f"hf-siglip:{folder}")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    shutil.copy(folders["hf-siglip"] / "model.safetensors", folder)
    changed = settings | {"size": {"height": 48, "width": 48}}
    (folder / "preprocessor_config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"makes 48 × 48 px, but its model takes 32 × 32"):
        open_model(f"hf-siglip:{folder}")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="found no tokenizer"):
        open_model(f"hf-siglip:{folder}")
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="found no configuration"):
        open_model(f"hf-siglip:{folder}")


def test_code_of_a_folder_is_not_run(folders, tmp_path):
    folder = copied(folders["hf-clip"], tmp_path)
    trace = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="found no configuration"):
        open_model(f"hf-clip:{folder}")
    assert not trace.exists()
