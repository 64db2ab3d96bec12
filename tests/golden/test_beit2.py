"""BEiT-2 from its original file format against tensors of the original implementation."""

import pytest
import torch
from safetensors.torch import load_file

import mmd2v.teachers
from mmd2v.data.batch import Batch
from mmd2v.models.checkpoints.convert import convert
from mmd2v.models.checkpoints.converted import block, read_architecture


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "beit2"
    convert(shared / "golden" / "beit2.pth", out)
    return out


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared / "golden" / "beit2.safetensors")


def load(folder, **options):
    return mmd2v.teachers.load(f"beit2:{folder}", precision="fp32", **options)


def test_every_block_gives_the_originals_output(folder, golden):
    teacher = load(folder)
    found = []
    for one in teacher.model.blocks:
        one.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        final_BTD = teacher.model.forward_features(golden["in/image"])
        bias_HTT = teacher.model.rel_pos_bias()
    assert len(found) == 4
    for index, x_BTD in enumerate(found):
        torch.testing.assert_close(x_BTD, golden[f"out/block{index}.x"], rtol=0, atol=1e-5)
    torch.testing.assert_close(final_BTD, golden["out/final_x"], rtol=0, atol=1e-5)
    torch.testing.assert_close(bias_HTT, golden["out/rel_pos_bias"], rtol=0, atol=1e-6)


def test_in_float64_it_is_the_originals_float64_run(folder, golden):
    teacher = load(folder).double()
    with torch.no_grad():
        final_BTD = teacher.model.forward_features(golden["in/image"].double())
    torch.testing.assert_close(final_BTD, golden["out64/final_x"], rtol=0, atol=1e-6)


def test_a_batch_gives_cls_and_tokens_after_the_final_norm(folder):
    nothing = torch.zeros(0, dtype=torch.int64)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = Batch(images, nothing.int(), torch.zeros(0, dtype=torch.int32), nothing)
    teacher = load(folder)
    targets = teacher(batch)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = teacher.model.forward_features((images / 255 - mean) / std)
    torch.testing.assert_close(targets.tokens_BTD, expected, rtol=0, atol=1e-5)
    assert torch.equal(targets.cls_BD, targets.tokens_BTD[:, 0]) and targets.cls_BD.shape == (2, teacher.width)
    teacher.train()
    assert torch.equal(teacher(batch).cls_BD, targets.cls_BD)
    other = load(folder, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert not torch.allclose(other(batch).cls_BD, targets.cls_BD, atol=1e-3)


def test_a_block_in_our_names_is_the_same_function(folder, golden):
    weights = {name: value.double() for name, value in block(folder, "beit2", 1, "here").items()}
    heads = read_architecture(folder, "beit2", "here").heads
    x_BTD = golden["out/block0.x"].double()

    def norm(x: torch.Tensor, part: str) -> torch.Tensor:
        parameters = weights[f"{part}.norm.weight"], weights[f"{part}.norm.bias"]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], *parameters, eps=1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    qkv = linear(norm(x_BTD, "attention"), "attention.qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    bias = golden["out/rel_pos_bias"].double()
    out = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=bias).transpose(1, 2).flatten(2)
    x_BTD = x_BTD + weights["attention.layer_scale"] * linear(out, "attention.proj")
    hidden = torch.nn.functional.gelu(linear(norm(x_BTD, "mlp"), "mlp.fc1"))
    x_BTD = x_BTD + weights["mlp.layer_scale"] * linear(hidden, "mlp.fc2")
    torch.testing.assert_close(x_BTD.float(), golden["out/block1.x"], rtol=0, atol=1e-5)
