"""Opening models to measure by name, the random one, the Data2Vec2 pair, and open_clip where it is installed."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from mmd2v.errors import UserError
from mmd2v.evaluation.models import MODELS, open_model
from mmd2v.evaluation.retrieval import retrieval_metrics
from mmd2v.models.checkpoints.convert import convert

FP32 = {"rtol": 0, "atol": 1e-5}
HAS_OPEN_CLIP = importlib.util.find_spec("open_clip") is not None


def test_unknown_kinds_name_the_nearest():
    with pytest.raises(UserError, match=r"unknown name 'hf-clp'. Did you mean 'hf-clip'\?"):
        open_model("hf-clp:openai/clip-vit-base-patch32")
    with pytest.raises(UserError, match=r"no folder 'beit',.*KIND:PATH.*Did you mean 'beit3'\?"):
        open_model("beit")
    with pytest.raises(UserError, match="expected vlmo:PATH"):
        open_model("vlmo")
    with pytest.raises(UserError, match="expected vlmo:PATH"):
        open_model("vlmo:")
    with pytest.raises(UserError, match="precision: found 'fp8', expected fp32 or bf16"):
        open_model("random", precision="fp8")
    with pytest.raises(UserError, match="device: found 'tpuu'"):
        open_model("random", device="tpuu")


def test_a_folder_near_the_name_is_suggested(tmp_path):
    (tmp_path / "my-encoder").mkdir()
    with pytest.raises(UserError, match="Did you mean 'my-encoder'"):
        open_model(tmp_path / "my-encodre")


def test_options_are_checked():
    with pytest.raises(UserError, match=r"found 'wide' .*expected beit3:PATH with any of ,tokenizer="):
        open_model("beit3:x.pth,wide")
    with pytest.raises(UserError, match="heads=many"):
        open_model("vlmo:x.pt,heads=many")
    with pytest.raises(UserError, match="expected data2vec2:PATH,PATH"):
        open_model("data2vec2:one.pt")
    with pytest.raises(UserError, match=r"resize: unknown name 'squish'. Did you mean 'squash'"):
        open_model("data2vec2:one.pt,two.pt,resize=squish")


def test_random_model_depends_on_the_content_alone(tmp_path):
    model = open_model("random:32")
    assert (model.name, model.width) == ("random:32", 32) and open_model("random").width == 512
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    other = tensor.clone()
    other[0, 0, 0] ^= 1
    image_BE = model.encode_image([tmp_path / "one.png", Image.fromarray(pixels), tensor, other], batch_size=3)
    assert torch.equal(image_BE[0], image_BE[1]) and torch.equal(image_BE[0], image_BE[2])
    assert not torch.allclose(image_BE[0], image_BE[3], atol=0.1)
    text_NE = open_model("random:32").encode_text(["a dog", "a cat", "a dog"])
    assert torch.equal(text_NE[0], text_NE[2]) and not torch.allclose(text_NE[0], text_NE[1], atol=0.1)
    assert torch.allclose(text_NE.norm(dim=1), torch.ones(3))
    for wrong in ("random:0", "random:wide", "random:-3", "random:99999999"):
        with pytest.raises(UserError, match=r"random:WIDTH"):
            open_model(wrong)


def test_random_model_scores_at_chance():
    """Within four standard errors of the chance that the evaluation prints beside it."""
    images, each = 800, 5
    model = open_model("random:64")
    image_BE = model.encode_image([torch.full((3, 2, 2), 0, dtype=torch.uint8) + _digits(i) for i in range(images)])
    text_NE = model.encode_text([f"caption {k} of picture {i}" for i in range(images) for k in range(each)])
    metrics = retrieval_metrics(image_BE, text_NE, torch.arange(images).repeat_interleave(each))
    for direction, queries in (("i2t", images), ("t2i", images * each)):
        for k in (1, 5, 10):
            chance = metrics[f"chance_{direction}_R@{k}"]
            error = (chance * (1 - chance) / queries) ** 0.5
            assert abs(metrics[f"{direction}_R@{k}"] - chance) < 4 * error
        assert 0.8 < metrics[f"{direction}_median_rank"] / {"i2t": 520, "t2i": 400}[direction] < 1.2


def _digits(number: int) -> torch.Tensor:
    return torch.tensor([number % 256, number // 256, 7], dtype=torch.uint8)[:, None, None]


@pytest.fixture(scope="module")
def pair(shared, tmp_path_factory):
    """The golden files beside a tokenizer whose ids their table has rows for."""
    folder = tmp_path_factory.mktemp("pair")
    for name in ("d2v2_image.pt", "d2v2_text.pt"):
        shutil.copy(shared / "golden" / name, folder)
    small = folder / "tokenizer"
    small.mkdir()
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(shared / "tokenizers/gpt2_fairseq" / name, small)
    lines = (shared / "tokenizers/gpt2_fairseq/dict.txt").read_text().splitlines()
    (small / "dict.txt").write_text("\n".join(lines[:80]) + "\n")
    return folder


def test_data2vec2_pair_is_the_cls_of_each(pair, tmp_path):
    image, text, options = pair / "d2v2_image.pt", pair / "d2v2_text.pt", f"tokenizer={pair / 'tokenizer'}"
    model = open_model(f"data2vec2:{image},{text},{options}")
    size = model.transform.size
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    texts = ["the of and", "a man"]
    image_BE, text_NE = model.encode_image(pixels), model.encode_text(texts)
    assert image_BE.shape[1] == text_NE.shape[1] == model.width
    from mmd2v import teachers
    from mmd2v.data.batch import Batch

    for path, family in ((image, "data2vec2-image"), (text, "data2vec2-text")):
        convert(path, tmp_path / family)
    teacher = teachers.load(f"data2vec2-image:{tmp_path}/data2vec2-image", precision="fp32", modality="image")
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = Batch(pixels, nothing.int(), nothing.int(), nothing)
    torch.testing.assert_close(image_BE, F.normalize(teacher(batch).cls_BD, dim=-1), **FP32)
    converted = open_model(
        f"data2vec2:{tmp_path}/data2vec2-image,{tmp_path}/data2vec2-text,{options},resize=squash,max_length=9"
    )
    torch.testing.assert_close(converted.encode_text(texts), text_NE, **FP32)
    assert "centre crop" in model.preprocessing()
    assert "squashed" in converted.preprocessing() and "at most 9" in converted.preprocessing()


def test_data2vec2_pair_refuses(pair, shared, tmp_path):
    image, text, options = pair / "d2v2_image.pt", pair / "d2v2_text.pt", f"tokenizer={pair / 'tokenizer'}"
    with pytest.raises(UserError, match="is a data2vec2-text checkpoint, expected data2vec2-image"):
        open_model(f"data2vec2:{text},{image},{options}")
    with pytest.raises(UserError, match=r"found no dict\.txt.*,tokenizer=FOLDER"):
        open_model(f"data2vec2:{image},{text}")
    with pytest.raises(UserError, match=r"has 502\d\d ids, .*do not belong together"):
        open_model(f"data2vec2:{image},{text},tokenizer={shared / 'tokenizers/gpt2_fairseq'}")
    with pytest.raises(UserError, match=r"max_length=999"):
        open_model(f"data2vec2:{image},{text},{options},max_length=999")


@pytest.mark.skipif(HAS_OPEN_CLIP, reason="open_clip is installed")
def test_without_open_clip_it_is_said_what_to_install():
    with pytest.raises(UserError, match="pip install --no-deps open_clip_torch"):
        open_model("open_clip:ViT-B-32")


@pytest.mark.skipif(not HAS_OPEN_CLIP, reason="open_clip is not installed")
def test_open_clip_models(tmp_path):
    import open_clip

    tower = {"width": 32, "layers": 1}
    config = {
        "embed_dim": 16,
        "vision_cfg": {**tower, "image_size": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {**tower, "context_length": 12, "vocab_size": 49408, "heads": 2},
    }
    name = "smallest-vit"
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    model = open_model(f"open_clip:{name}")
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 60, 3), np.uint8)) for i in range(3)]
    texts = ["two dogs in the snow", "a man"]
    pixels = torch.stack([model.transform(image) for image in images])
    with torch.no_grad():
        image_BE = F.normalize(model.model.encode_image(pixels), dim=-1)
        text_NE = F.normalize(model.model.encode_text(open_clip.get_tokenizer(name)(texts)), dim=-1)
    torch.testing.assert_close(model.encode_image(images), image_BE, **FP32)
    torch.testing.assert_close(model.encode_text(texts), text_NE, **FP32)
    assert "arithmetic: fp32" in model.preprocessing() and " at 0x" not in model.preprocessing()
    weights = {key: value.contiguous() * 1.5 for key, value in model.model.state_dict().items()}
    save_file(weights, tmp_path / "own.safetensors")
    assert not torch.allclose(open_model(f"open_clip:{name}/{tmp_path}/own.safetensors").encode_text(texts), text_NE)
    torch.save(weights, tmp_path / "own.pt")
    with pytest.raises(UserError, match="expected safetensors"):
        open_model(f"open_clip:{name}/{tmp_path}/own.pt")
    with pytest.raises(UserError, match="Did you mean 'ViT-B-32'"):
        open_model("open_clip:ViT-B32")
    with pytest.raises(UserError, match="Did you mean 'openai'"):
        open_model("open_clip:ViT-B-32/opnai")
    del weights["logit_scale"]
    save_file(weights, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match="cannot open it"):
        open_model(f"open_clip:{name}/{tmp_path}/less.safetensors")


def test_every_kind_is_one_that_opens():
    """A line of the registry that names a module or an opener that is not there would fail only when it is used."""
    for kind in MODELS:
        with pytest.raises(UserError):
            open_model(f"{kind}:/nowhere/at-all,x=y", "cpu")


def test_images_known_by_their_ids_alone_are_points_too():
    model = open_model("random:16")
    rows = model.encode_ids(["a", "b", "a"])
    assert rows.shape == (3, 16) and torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))


def test_encoders_of_texts_alone_are_no_models_of_retrieval():
    with pytest.raises(UserError, match="'hf-text:somewhere' encodes texts alone; expected a model of images"):
        open_model("hf-text:somewhere")
