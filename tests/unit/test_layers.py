"""Layers of every ownership against plain transformer blocks, and what is shared by whom."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from mmd2v.config.schema import LayerConfig
from mmd2v.models import layers
from mmd2v.models.initialisation import init_random
from mmd2v.models.layers import Layer
from mmd2v.models.packed import Layout

WIDTH, HEADS = 12, 3
LAYOUT = Layout.build({"image": [5, 5], "text": [3, 4]}, torch.device("cpu"))
OWNERS = {"separate": ("separate", "separate"), "mome": ("shared", "separate"), "shared": ("shared", "shared")}


def make(**options) -> Layer:
    torch.manual_seed(0)
    layer = Layer(LayerConfig(**options), WIDTH, HEADS, ("image", "text")).double()
    init_random(layer, seed=0, deviation=0.3)
    for name, parameter in layer.named_parameters():
        if "bias" in name or "scale" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return layer


def plain_block(x, attention, mlp, norm: str):
    """A textbook block over one sequence [T, D]."""

    def attend(v):
        q, k, w = attention.qkv(v).unflatten(1, (3, HEADS, -1)).unbind(1)
        out = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, w)))[0]
        out = attention.proj(out.transpose(0, 1).flatten(1))
        return out if attention.layer_scale is None else out * attention.layer_scale

    def feed_forward(v):
        out = mlp.fc2(F.gelu(mlp.fc1(v)))
        return out if mlp.layer_scale is None else out * mlp.layer_scale

    if norm == "pre":
        x = x + attend(attention.norm(x))
        return x + feed_forward(mlp.norm(x))
    x = attention.norm(x + attend(x))
    return mlp.norm(x + feed_forward(x))


@pytest.mark.parametrize("kind", ["separate", "mome", "shared"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_equals_a_plain_block_over_each_sequence(kind, norm, layer_scale):
    layer = make(kind=kind, norm=norm, layer_scale=layer_scale)
    x = torch.randn(LAYOUT.total, WIDTH, dtype=torch.float64)
    found = layer(x, LAYOUT)
    start = 0
    for modality, lengths in LAYOUT.lengths.items():
        attention = layer.attention["shared" if OWNERS[kind][0] == "shared" else modality]
        mlp = layer.mlp["shared" if OWNERS[kind][1] == "shared" else modality]
        for length in lengths:
            expected = plain_block(x[start : start + length], attention, mlp, norm)
            torch.testing.assert_close(found[start : start + length], expected)
            start += length


@pytest.mark.parametrize(("kind", "owners"), OWNERS.items())
def test_ownership_decides_the_weights(kind, owners):
    layer = make(kind=kind)
    assert set(layer.attention) == ({"shared"} if owners[0] == "shared" else {"image", "text"})
    assert set(layer.mlp) == ({"shared"} if owners[1] == "shared" else {"image", "text"})


def test_attention_and_mlp_are_owned_independently():
    layer = make(attention="separate", mlp="shared")
    assert set(layer.attention) == {"image", "text"} and set(layer.mlp) == {"shared"}


def test_drop_path_drops_whole_sequences_and_keeps_the_mean():
    layer = make(kind="shared", drop_path=0.5).train()
    layout = Layout.build({"image": [2] * 400}, torch.device("cpu"))
    x = torch.randn(2, WIDTH, dtype=torch.float64).repeat(400, 1)
    torch.manual_seed(0)
    found = layer(x, layout).unflatten(0, (400, 2))
    untouched = (found == x.unflatten(0, (400, 2))).all(-1)
    assert torch.equal(untouched[:, 0], untouched[:, 1])
    # Two branches, each dropped for half of the sequences: a quarter passes untouched.
    assert untouched[:, 0].double().mean().item() == pytest.approx(0.25, abs=0.06)
    layer.eval()
    assert torch.equal(layer(x, layout), layer(x, layout))


@pytest.mark.parametrize("joint", [False, True])
def test_rows_of_dropped_sequences_left_out_give_the_layer_that_multiplies_them_by_0(joint, monkeypatch):
    layer = make(kind="mome", drop_path=0.4).train()
    layout = Layout.build({"image": [3] * 8, "text": [2] * 8}, torch.device("cpu"))
    layout = dataclasses.replace(layout, joint=joint)
    x = torch.randn(layout.total, WIDTH, dtype=torch.float64)
    passed, found = [], {}
    compute = layers.expert_mlp
    monkeypatch.setattr(
        layers, "expert_mlp", lambda *args, **kwargs: passed.append(args[2][-1][1]) or compute(*args, **kwargs)
    )
    for pays in (False, True):
        monkeypatch.setattr(Layer, "_pays", lambda *_, pays=pays: pays)
        torch.manual_seed(0)
        own = x.clone().requires_grad_()
        out = layer(own, layout)
        found[pays] = [out, *torch.autograd.grad(out.square().sum(), [own, *layer.mlp.parameters()])]
    assert passed[0] == layout.total > passed[1] > 0
    for scaled, left_out in zip(*found.values(), strict=True):
        torch.testing.assert_close(left_out, scaled)


def test_dropout_is_off_outside_training():
    layer = make(kind="shared", dropout=0.5)
    x = torch.randn(LAYOUT.total, WIDTH, dtype=torch.float64)
    assert not torch.equal(layer.train()(x, LAYOUT), layer(x, LAYOUT))
    assert torch.equal(layer.eval()(x, LAYOUT), layer(x, LAYOUT))
