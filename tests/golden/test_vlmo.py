"""A VLMo checkpoint in our layers against the original multiway transformer."""

import numpy as np
import pytest
import torch
from originals import FP32, AsGiven, Golden

from mmd2v.config.schema import LayerConfig
from mmd2v.errors import UserError
from mmd2v.evaluation.models import open_model
from mmd2v.evaluation.models.vlmo import VLMo, image_index, table_rows, text_index, word_pieces
from mmd2v.models.biased_layer import BiasedLayer, BiasedLayout
from mmd2v.models.checkpoints.vlmo import USUAL_TEXT_DISTANCES, read_vlmo

WORDS = 30_522
SIDE, LENGTH = 4, 10


@pytest.fixture(scope="module")
def golden(shared):
    return Golden(shared, "vlmo")


@pytest.fixture(scope="module")
def payload(golden):
    """The golden blocks with the other parts of a published file, drawn at random."""
    draw = torch.Generator().manual_seed(5)

    def some(*shape):
        return torch.randn(*shape, generator=draw)

    blocks = {f"transformer.{key.removeprefix('w/')}": golden[key] for key in golden.tensors if key.startswith("w/")}
    return {
        **blocks,
        "relative_position_bias_table": some(table_rows(SIDE, USUAL_TEXT_DISTANCES), 8),
        "text_embeddings.position_ids": torch.arange(LENGTH)[None],
        "text_embeddings.word_embeddings.weight": some(WORDS, 32),
        "text_embeddings.position_embeddings.weight": some(LENGTH, 32),
        "text_embeddings.token_type_embeddings.weight": some(2, 32),
        "text_embeddings.LayerNorm.weight": some(32),
        "text_embeddings.LayerNorm.bias": some(32),
        "token_type_embeddings.weight": some(2, 32),
        "pooler.dense.weight": some(32, 32),
        "itc_text_proj.fc.weight": some(32, 32),
        "itc_image_proj.fc.weight": some(32, 32),
        "logit_scale": some(1)[0],
    }


@pytest.fixture
def checkpoint(payload, tmp_path):
    return read_vlmo({"state_dict": payload}, tmp_path / "golden.pt")


@pytest.fixture
def model(checkpoint):
    return VLMo(checkpoint, "here").eval()


def give_biases(layers, bias_lHLL):
    """Put the given biases in place of the table's; return the index that finds them."""
    tokens = bias_lHLL.shape[-1]
    for layer, bias_HLL in zip(layers, bias_lHLL, strict=True):
        layer.bias_table = torch.nn.Parameter(bias_HLL.flatten(1).T.contiguous())
    return torch.arange(tokens * tokens).view(tokens, tokens)


def layout_of(lengths, index, keys=None, joint=False):
    return BiasedLayout(
        {name: np.full(2, length) for name, length in lengths.items()},
        torch.device("cpu"),
        keys or {},
        joint=joint,
        bias_index=index,
    )


def test_sizes_are_read_from_the_shapes(checkpoint):
    assert (checkpoint.width, checkpoint.depth, checkpoint.heads) == (32, 2, 4)
    assert (checkpoint.image_size, checkpoint.patch_size, checkpoint.max_length) == (64, 16, LENGTH)
    assert checkpoint.relative and checkpoint.text_distances == USUAL_TEXT_DISTANCES


@torch.no_grad()
def test_images_equal_the_original(golden, model):
    model.normalize = AsGiven()
    index = give_biases(model.layers, golden["in/bias_image"])
    embed_BTD = golden["out/image_embed"]
    x_TD = embed_BTD.flatten(0, 1)
    layout = layout_of({"image": 17}, index)
    for i, layer in enumerate(model.layers):
        x_TD = layer(x_TD, layout)
        torch.testing.assert_close(x_TD.view(2, 17, 32), golden[f"out/image_block{i}.x"], **FP32)
    torch.testing.assert_close(model.norm(x_TD).view(2, 17, 32), golden["out/image_final"], **FP32)
    # From the pixels on, without the vector that tells an image from a text, which the golden blocks did not see.
    model.kind["image"].zero_()
    model.image_index = index
    expected = golden["out/image_final"][:, 0] @ model.heads["image"].weight.T
    torch.testing.assert_close(model.embed_images(golden["in/image"]), expected, **FP32)


@torch.no_grad()
def test_texts_equal_the_original(golden, model):
    index = give_biases(model.layers, golden["in/bias_text"])
    lengths_N = golden["in/text_mask"].sum(dim=1).numpy()
    layout = layout_of({"text": LENGTH}, index, {"text": lengths_N})
    x_TD = model.run(golden["in/text_emb"].flatten(0, 1), layout)
    torch.testing.assert_close(x_TD.view(2, LENGTH, 32), golden["out/text_final"], **FP32)


@torch.no_grad()
def test_pairs_equal_the_original(golden, model):
    layers = []
    for i, layer in enumerate(model.layers):
        config = LayerConfig(kind="mome", eps=1e-6, layer_scale=1.0, joint_expert=i == 1)
        pair = BiasedLayer(config, 32, 4, ("text", "image"), table_rows=1)
        state = {key: value for key, value in layer.state_dict().items() if key != "bias_table"}
        if i == 1:
            for ours, theirs in {"norm": "norm2_vl", "fc1": "mlp_vl.fc1", "fc2": "mlp_vl.fc2"}.items():
                for kind in ("weight", "bias"):
                    state[f"mlp.joint.{ours}.{kind}"] = golden[f"w/blocks.1.{theirs}.{kind}"]
            state["mlp.joint.layer_scale"] = golden["w/blocks.1.gamma_2"]
        pair.load_state_dict({**state, "bias_table": torch.zeros(1, 4)})
        layers.append(pair.eval())
    index = give_biases(layers, golden["in/bias_vl"])
    keys = {"text": golden["in/text_mask"].sum(dim=1).numpy()}
    layout = layout_of({"text": LENGTH, "image": 17}, index, keys, joint=True)
    x_TD = torch.cat([golden["in/text_emb"].flatten(0, 1), golden["out/image_embed"].flatten(0, 1)])
    for layer in layers:
        x_TD = layer(x_TD, layout)
    parts = layout.split(model.norm(x_TD))
    found = torch.cat([parts[name].view(2, -1, 32) for name in ("text", "image")], dim=1)
    torch.testing.assert_close(found, golden["out/vl_final"], **FP32)


def test_rows_of_the_table():
    """The published layout, pair by pair."""
    side, longest = 3, 6
    index, distances = image_index(side), (2 * side - 1) ** 2
    for a in range(side * side):
        for b in range(side * side):
            down, across = a // side - b // side, a % side - b % side
            expected = (down + side - 1) * (2 * side - 1) + across + side - 1
            assert index[a + 1, b + 1] == expected
    assert index[0, 1:].tolist() == [distances] * 9 and index[1:, 0].tolist() == [distances + 1] * 9
    assert index[0, 0] == distances + 2
    total = table_rows(side, longest)
    texts = text_index(5, side, longest)
    for a in range(4):
        for b in range(4):
            assert texts[a + 1, b + 1] == (b - a) - (2 - longest) + (distances + 3) + 2
    assert texts[0, 1] == total - 3 and texts[1, 0] == total - 2 and texts[0, 0] == total - 1


def test_a_public_file_is_opened_by_name(payload, shared, tmp_path):
    path = tmp_path / "vlmo_base_patch16_64_coco.pt"
    torch.save({"module": {f"module.{key}": value for key, value in payload.items()}}, path)
    words = shared / "tokenizers/bert_uncased/vocab.txt"
    model = open_model(f"vlmo:{path},tokenizer={words}")
    assert (model.name, model.width) == (path.stem, 32)
    assert "squashed to 64 × 64 px" in model.preprocessing() and "at most 10" in model.preprocessing()
    texts = ["Two dogs in the snow", "a man", "two dogs " * 30]
    torch.testing.assert_close(
        model.encode_text(texts), torch.cat([model.encode_text([text]) for text in texts]), **FP32
    )
    images = torch.randint(0, 256, (3, 3, 50, 70), dtype=torch.uint8)
    image_BE = model.encode_image(images, batch_size=2)
    torch.testing.assert_close(image_BE, torch.cat([model.encode_image([image]) for image in images]), **FP32)
    assert torch.allclose(image_BE.norm(dim=1), torch.ones(3))
    half = open_model(f"vlmo:{path},tokenizer={words}", precision="bf16")
    for found, exact in ((half.encode_image(images), image_BE), (half.encode_text(texts), model.encode_text(texts))):
        assert found.dtype == torch.float32 and 0 < (found - exact).abs().max() < 0.05


def test_tokens_are_those_of_bert(shared):
    words = shared / "tokenizers/bert_uncased/vocab.txt"
    lines = words.read_text(encoding="utf-8").split("\n")
    encoding = word_pieces(words, 6, "here").encode("Two unaffable Café dogs, running far away")
    assert [lines[row] for row in encoding.ids] == ["[CLS]", "two", "una", "##ffa", "##ble", "[SEP]"]


@torch.no_grad()
def test_absolute_positions(payload, shared, tmp_path):
    """The base-plus models have no table and no scales."""
    other = {k: v for k, v in payload.items() if "gamma" not in k and k != "relative_position_bias_table"}
    other["transformer.pos_embed"] = torch.randn(1, 17, 32)
    checkpoint = read_vlmo({"model": other}, tmp_path / "plus.pt", heads=4)
    assert not checkpoint.relative and not checkpoint.layer_scale and checkpoint.image_size == 64
    model = VLMo(checkpoint, "here").eval()
    ids = torch.tensor([[101, 7, 8, 102]])
    swapped = torch.tensor([[101, 8, 7, 102]])
    lengths = np.array([4])
    assert not torch.allclose(model.embed_texts(ids, lengths), model.embed_texts(swapped, lengths), atol=1e-3)
    with pytest.raises(UserError, match=r"add ,heads=NUMBER"):
        read_vlmo({"model": other}, tmp_path / "plus.pt")


def test_wrong_files_are_refused(payload, shared, tmp_path):
    words = shared / "tokenizers/bert_uncased/vocab.txt"

    def refused(content, *found):
        path = tmp_path / "wrong.pt"
        torch.save(content, path)
        with pytest.raises(UserError) as caught:
            open_model(f"vlmo:{path},tokenizer={words}")
        assert all(part in str(caught.value) for part in found), str(caught.value)

    refused({k: v for k, v in payload.items() if k != "itc_text_proj.fc.weight"}, "itc_text_proj.fc.weight")
    refused({"a": torch.ones(1)}, "are not a VLMo's")
    refused([1, 2], "are not a VLMo's")
    key = "transformer.blocks.1.mlp_imag.fc2.weight"
    refused({k: v for k, v in payload.items() if k != key}, key)
    refused({**payload, key: payload[key].T}, key, "(32, 128)")
    refused({**payload, "transformer.blocks.0.extra": torch.ones(2)}, "transformer.blocks.0.extra")
    refused({**payload, "relative_position_bias_table": torch.zeros(500, 8)}, "500 rows", "image_size")
    refused({**payload, "text_embeddings.word_embeddings.weight": torch.zeros(9, 32)}, "30522 words", "9 rows")
    for malicious in sorted((shared / "golden/malicious").glob("*.pt")):
        with pytest.raises(UserError, match="refused"):
            open_model(f"vlmo:{malicious}")
    with pytest.raises(UserError, match=r"vocab.txt"):
        torch.save(payload, tmp_path / "right.pt")
        open_model(f"vlmo:{tmp_path / 'right.pt'}")
