"""Converted data2vec 2.0 checkpoints against the original's outputs, block by block."""

import pytest
import torch
from originals import FP32, FP64, AsGiven, Golden, converted, image_batch, rows, text_batch

import mmd2v
from mmd2v.models.checkpoints.student import converted_student
from mmd2v.models.student import Wanted


def run(model, batch, modality, depth):
    """Outputs of the encoder, of every block and of every block's MLP."""
    seen = {}

    def keep(name):
        return lambda module, inputs, output: seen.update({name: output})

    hooks = [layer.register_forward_hook(keep(f"block{i}")) for i, layer in enumerate(model.layers)]
    with torch.no_grad():
        output = model(batch, wanted=Wanted(results=frozenset({modality})))
    for hook in hooks:
        hook.remove()
    assert len(model.layers) == depth
    return output, [seen[f"block{i}"][0] for i in range(depth)]


@pytest.mark.parametrize(("name", "depth"), [("d2v2_image", 4), ("d2v2_image_prenet2", 4)])
def test_image_model_equals_the_original_block_by_block(shared, tmp_path_factory, name, depth):
    golden = Golden(shared, name)
    folder = converted(shared, tmp_path_factory.mktemp("converted"), f"{name}.pt")
    model, architecture = converted_student("data2vec2-image", str(folder), "here")
    assert (architecture.depth, architecture.eps) == (depth, 1e-6)
    model.encoders["image"].normalize = AsGiven()
    output, blocks = run(model, image_batch(golden["in/image"]), "image", depth)
    shape = golden["out/final_x"].shape
    # The original's encoder runs its prenet blocks; ours counts them as the first layers.
    before = depth - sum(key.startswith("out/block") and key.endswith(".x") for key in golden.tensors)
    entered = output.encoded["image"] if before == 0 else blocks[before - 1]
    torch.testing.assert_close(entered.view(shape), golden["out/encoder_out"], **FP32)
    for i in range(before, depth):
        torch.testing.assert_close(blocks[i].view(shape), golden[f"out/block{i - before}.x"], **FP32)
        torch.testing.assert_close(output.results["image"][i].view(shape), golden[f"out/block{i - before}.t"], **FP32)
    torch.testing.assert_close(output.tokens.x_TD.view(shape), golden["out/final_x"], **FP32)
    torch.testing.assert_close(output.pooled["image"], golden["out/final_x"][:, 0], **FP32)
    if "out64/final_x" in golden.tensors:
        exact = model.double()(image_batch(golden["in/image"]))
        torch.testing.assert_close(exact.tokens.x_TD.view(shape), golden["out64/final_x"], **FP64)


@pytest.mark.parametrize("file", ["d2v2_text.pt", "d2v2_text_namespace_fp16.pt"])
@pytest.mark.parametrize("padding", ["none", "longest"])
def test_text_model_equals_the_original_block_by_block(shared, tmp_path_factory, file, padding):
    golden = Golden(shared, "d2v2_text")
    folder = converted(shared, tmp_path_factory.mktemp("converted"), file)
    model, architecture = converted_student("data2vec2-text", str(folder), "here")
    assert architecture.eps == 1e-5
    is_pad = golden["in/padding_mask"]
    model.encoders["text"].padded = padding

    def ours(tensor):
        """Rows of ours for a rectangle of the original; of padding too where the encoder makes them."""
        return rows(tensor, is_pad) if padding == "none" else tensor.flatten(0, 1)

    batch = text_batch(golden["in/ids"], is_pad)
    output, blocks = run(model, batch, "text", 4)
    torch.testing.assert_close(output.encoded["text"], ours(golden["out/encoder_out"]), **FP32)
    for i in range(4):
        torch.testing.assert_close(blocks[i], ours(golden[f"out/block{i}.x"]), **FP32)
        torch.testing.assert_close(output.results["text"][i], ours(golden[f"out/block{i}.t"]), **FP32)
    torch.testing.assert_close(output.tokens.x_TD, ours(golden["out/final_x"]), **FP32)
    exact = model.double()(batch)
    torch.testing.assert_close(exact.tokens.x_TD, ours(golden["out64/final_x"]), **FP64)


def test_text_alone_equals_the_original_without_padding(shared, tmp_path):
    golden = Golden(shared, "d2v2_text")
    model, _ = converted_student("data2vec2-text", str(converted(shared, tmp_path, "d2v2_text.pt")), "here")
    ids = golden["in/ids"][:1]
    with torch.no_grad():
        found = model(text_batch(ids, torch.zeros_like(ids, dtype=torch.bool))).tokens.x_TD
    torch.testing.assert_close(found[None], golden["out_nopad_row0/final_x"], **FP32)


def test_public_entry_gives_the_teachers_targets(shared, tmp_path):
    golden = Golden(shared, "d2v2_image")
    folder = converted(shared, tmp_path, "d2v2_image.pt")
    teacher = mmd2v.teachers.load(f"data2vec2-image:{folder}", precision="fp32")
    teacher.model.encoders["image"].normalize = AsGiven()
    teacher.image_size = None
    targets = teacher(image_batch(golden["in/image"]))
    torch.testing.assert_close(targets.cls_BD, golden["out/final_x"][:, 0], **FP32)
    torch.testing.assert_close(targets.tokens_BTD, golden["out/final_x"], **FP32)
