"""A BEiT-3 retrieval checkpoint in our layers against torchscale's trunk."""

import shutil

import numpy as np
import pytest
import torch
from originals import FP32, AsGiven, Golden, image_batch, text_batch
from PIL import Image
from torch.nn import functional as F

from mmd2v.config.schema import TokenizerConfig
from mmd2v.errors import UserError
from mmd2v.evaluation.models import open_model
from mmd2v.evaluation.models.beit3 import BEiT3, XLMRobertaPieces
from mmd2v.models.checkpoints.beit3 import read_beit3
from mmd2v.models.packed import Layout

VOCABULARY = 64_010
PAIR = torch.Generator().manual_seed(3)
HEADS = {
    "vision_head.weight": torch.randn(24, 32, generator=PAIR),
    "language_head.weight": torch.randn(24, 32, generator=PAIR),
}


@pytest.fixture(scope="module")
def golden(shared):
    return Golden(shared, "torchscale_beit3")


@pytest.fixture(scope="module")
def payload(golden):
    weights = {f"beit3.{key.removeprefix('w/')}": golden[key] for key in golden.tensors if key.startswith("w/")}
    return {**weights, **HEADS, "logit_scale": torch.tensor(2.6)}


@pytest.fixture(scope="module")
def model(payload, tmp_path_factory):
    checkpoint = read_beit3({"model": payload}, tmp_path_factory.mktemp("none") / "golden.pth", heads=4)
    model = BEiT3(checkpoint, 38, "here").eval()
    model.trunk.encoders["image"].normalize = AsGiven()
    return model


@pytest.fixture(scope="module")
def public_file(payload, tmp_path_factory):
    """The golden weights as the published files are, with a table for the tokenizer's 64,002 ids."""
    path = tmp_path_factory.mktemp("beit3") / "beit3_base_patch16_64_coco_retrieval.pth"
    table = torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(4))
    torch.save({"model": {**payload, "beit3.text_embed.weight": table}}, path)
    return path


def normed(rows_BTD, model, name):
    return model.norms[name](rows_BTD)


def test_sizes_are_read_from_the_shapes(payload, tmp_path):
    checkpoint = read_beit3({"model": payload}, tmp_path / "x.pth", heads=4)
    assert (checkpoint.width, checkpoint.depth, checkpoint.image_size, checkpoint.patch_size) == (32, 2, 64, 16)
    assert (checkpoint.vocab_size, checkpoint.position_rows, checkpoint.embedding_width) == (200, 40, 24)


@torch.no_grad()
def test_images_alone_equal_torchscale(golden, model):
    output = model.trunk(image_batch(golden["in/image"]), ("image",))
    rows_BTD = normed(output.tokens.x_TD.view(2, 17, 32), model, "image")
    torch.testing.assert_close(rows_BTD, golden["out/image"], **FP32)
    expected = golden["out/image"][:, 0] @ HEADS["vision_head.weight"].T
    torch.testing.assert_close(model(image_batch(golden["in/image"]), "image"), expected, **FP32)


@torch.no_grad()
def test_texts_alone_equal_torchscale(golden, model):
    is_pad_BT = golden["in/text_padding"]
    batch = text_batch(golden["in/ids"], is_pad_BT)
    rows_RD = normed(model.trunk(batch, ("text",)).tokens.x_TD, model, "text")
    torch.testing.assert_close(rows_RD, golden["out/text"][~is_pad_BT], **FP32)
    expected = golden["out/text"][:, 0] @ HEADS["language_head.weight"].T
    torch.testing.assert_close(model(batch, "text"), expected, **FP32)


@torch.no_grad()
def test_image_and_text_as_one_sequence_equal_torchscale(golden, model):
    is_pad_BT = golden["in/text_padding"]
    trunk = model.trunk
    images = trunk(image_batch(golden["in/image"]), ("image",)).encoded["image"]
    everything = text_batch(golden["in/ids"], torch.zeros_like(is_pad_BT))
    texts = trunk(everything, ("text",)).encoded["text"].view(2, 9, 32).masked_fill(is_pad_BT[..., None], 0)
    layout = Layout(
        {"image": np.full(2, 17), "text": np.full(2, 9)},
        torch.device("cpu"),
        key_masks={"text": ~is_pad_BT},
        joint=True,
    )
    x_TD = torch.cat([images, texts.flatten(0, 1)])
    for layer in trunk.layers:
        x_TD = layer(x_TD, layout)
    parts = layout.split(x_TD)
    found = torch.cat([normed(parts[name].view(2, -1, 32), model, name) for name in ("image", "text")], dim=1)
    real = torch.cat([torch.ones(2, 17, dtype=torch.bool), ~is_pad_BT], dim=1)
    torch.testing.assert_close(found[real], golden["out/both"][real], **FP32)


def test_a_public_file_is_opened_by_name(public_file, shared, tmp_path):
    pieces = shared / "tokenizers/kosmos2_spm64k/sentencepiece.bpe.model"
    model = open_model(f"beit3:{public_file},tokenizer={pieces},heads=4")
    assert (model.name, model.width, model.tokenizer.max_length) == (public_file.stem, 24, 38)
    assert "squashed to 64 × 64 px" in model.preprocessing() and "at most 38" in model.preprocessing()
    texts = ["two dogs in the snow", "a man", "two dogs in the snow " * 30]
    text_NE = model.encode_text(texts, batch_size=2)
    torch.testing.assert_close(text_NE, torch.cat([model.encode_text([text]) for text in texts]), **FP32)
    assert torch.allclose(text_NE.norm(dim=1), torch.ones(3))
    pixels = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    image_BE = model.encode_image([pixels, Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((90, 70))])
    normalised = pixels[None] / 127.5 - 1
    model.model.trunk.encoders["image"].normalize = AsGiven()
    expected = F.normalize(model.model(image_batch(normalised), "image"), dim=-1)
    torch.testing.assert_close(image_BE[:1], expected, **FP32)
    half = open_model(f"beit3:{public_file},tokenizer={pieces},heads=4", precision="bf16")
    for found, exact in ((half.encode_image([pixels]), image_BE[:1]), (half.encode_text(texts), text_NE)):
        assert found.dtype == torch.float32 and 0 < (found - exact).abs().max() < 0.05


def test_ids_are_those_of_xlm_r(shared, tmp_path):
    """Whose tokenizer its authors' code takes, with their own pieces."""
    from transformers import XLMRobertaTokenizer

    pieces = shared / "tokenizers/kosmos2_spm64k/sentencepiece.bpe.model"
    shutil.copy(pieces, tmp_path)
    theirs = XLMRobertaTokenizer.from_pretrained(tmp_path)
    ours = XLMRobertaPieces(TokenizerConfig(kind="sentencepiece", path=str(pieces), max_length=12))
    texts = ["A brown dog.", "☃ unknown \U0001f9ff", "many words " * 20, "  two   spaces, Émile's naïve café "]
    ids_S, lengths_N = ours.encode_batch(texts)
    rows = np.split(ids_S, np.cumsum(lengths_N)[:-1])
    for text, row in zip(texts, rows, strict=True):
        assert row.tolist() == theirs(text, truncation=True, max_length=12)["input_ids"]
    assert 3 in rows[1] and len(rows[2]) == 12
    assert ours.vocab_size == len(theirs)


def test_wrong_files_are_refused(payload, public_file, shared, tmp_path):
    pieces = shared / "tokenizers/kosmos2_spm64k/sentencepiece.bpe.model"

    def refused(content, *words):
        path = tmp_path / "wrong.pth"
        torch.save(content, path)
        with pytest.raises(UserError) as caught:
            open_model(f"beit3:{path},tokenizer={pieces},heads=4")
        assert all(word in str(caught.value) for word in words), str(caught.value)

    without = {key: value for key, value in payload.items() if key != "language_head.weight"}
    refused({"model": without}, "wrong.pth", "language_head.weight", "retrieval")
    refused({"model": {"blocks.0.norm.weight": torch.ones(3)}}, "not a BEiT-3's")
    refused({"weights": payload}, "'model'")
    key = "beit3.encoder.layers.1.ffn.B.fc2.weight"
    refused({"model": {k: v for k, v in payload.items() if k != key}}, key)
    refused({"model": {**payload, key: payload[key].T}}, key, "(128, 32)")
    refused({"model": {**payload, key: payload[key] * float("nan")}}, key, "not finite")
    refused({"model": {**payload, "beit3.extra": torch.ones(1)}}, "beit3.extra")
    refused({"model": payload}, "64002 ids", "200 rows")
    for malicious in sorted((shared / "golden/malicious").glob("*.pt")):
        with pytest.raises(UserError, match="refused"):
            open_model(f"beit3:{malicious}")
    with pytest.raises(UserError, match="no such file"):
        open_model("beit3:nowhere.pth")
    with pytest.raises(UserError, match=r"heads=7, which do not divide its width 32"):
        open_model(f"beit3:{public_file},heads=7")
    with pytest.raises(UserError, match=r"add ,heads=NUMBER"):
        open_model(f"beit3:{public_file}")
    with pytest.raises(UserError, match=r"found 0 SentencePiece models beside"):
        open_model(f"beit3:{public_file},heads=4")
    with pytest.raises(UserError, match=r"unknown name 'tokeniser'. Did you mean 'tokenizer'"):
        open_model(f"beit3:{public_file},tokeniser=x")
