"""Layers on pairs of an image and a text as one sequence, layer results, sub-LN, CLS attention and padded text."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import StubTokenizer, random_batch, small_config

from mmd2v.config.schema import LayerConfig
from mmd2v.errors import UserError
from mmd2v.models.initialisation import init_random
from mmd2v.models.layers import JOINT, SHARED, Layer
from mmd2v.models.packed import Layout
from mmd2v.models.student import Wanted, build_student

CPU = torch.device("cpu")


def make_layer(**settings) -> Layer:
    layer = Layer(LayerConfig(**settings), 16, 4, ("image", "text")).double()
    init_random(layer, 0, deviation=0.3)
    for name, parameter in layer.named_parameters():  # norms and biases that do something
        if parameter.ndim == 1:
            parameter.data.uniform_(-0.5, 1.0, generator=torch.Generator().manual_seed(len(name)))
    return layer.eval()


def norm(x, module):
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)


def one_sequence(layer: Layer, image_ID, text_JD, joint: bool = True):
    """The layer on one image and one text, written out with plain matrices."""
    parts = {"image": image_ID, "text": text_JD}

    def weights(half, name):
        modules = getattr(layer, half)
        if half == "mlp" and joint and JOINT in modules:
            return modules[JOINT]
        return modules[SHARED] if SHARED in modules else modules[name]

    qkv = {}
    for name, x in parts.items():
        w = weights("attention", name)
        qkv[name] = (norm(x, w.norm) if layer.norm == "pre" else x) @ w.qkv.weight.T + w.qkv.bias
    groups = [list(parts)] if joint else [[name] for name in parts]
    out = {}
    for group in groups:
        rows = torch.cat([qkv[name] for name in group])
        heads = []
        for q, k, v in zip(*(m.view(len(rows), layer.heads, -1).unbind(1) for m in rows.chunk(3, 1)), strict=True):
            heads.append((q @ k.T / k.shape[1] ** 0.5).softmax(-1) @ v)
        attended = torch.cat(heads, dim=1)
        out |= dict(zip(group, attended.split([len(parts[name]) for name in group]), strict=True))
    after, results = {}, {}
    for name, x in parts.items():
        w, m = weights("attention", name), weights("mlp", name)
        y = out[name] if w.inner_norm is None else norm(out[name], w.inner_norm)
        branch = y @ w.proj.weight.T + w.proj.bias
        x = x + (branch if w.layer_scale is None else branch * w.layer_scale)
        x = x if layer.norm == "pre" else norm(x, w.norm)
        h = F.gelu((norm(x, m.norm) if layer.norm == "pre" else x) @ m.fc1.weight.T + m.fc1.bias)
        h = h if m.inner_norm is None else norm(h, m.inner_norm)
        results[name] = h @ m.fc2.weight.T + m.fc2.bias
        x = x + (results[name] if m.layer_scale is None else results[name] * m.layer_scale)
        after[name] = x if layer.norm == "pre" else norm(x, m.norm)
    return after, results


@pytest.mark.parametrize("place", ["pre", "post"])
@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "separate"},
        {"kind": "mome", "joint_expert": True},
        {"kind": "shared", "layer_scale": 0.3},
        {"attention": "separate", "mlp": "shared", "sub_norm": True},
    ],
)
def test_joint_sequences_equal_the_formula_pair_by_pair(place, settings):
    layer = make_layer(norm=place, **settings)
    generator = torch.Generator().manual_seed(1)
    image_SID = torch.randn(3, 5, 16, dtype=torch.float64, generator=generator)
    text_SJD = torch.randn(3, 4, 16, dtype=torch.float64, generator=generator)
    lengths = [4, 2, 3]
    is_key = torch.arange(4)[None] < torch.tensor(lengths)[:, None]
    layout = Layout({"image": np.full(3, 5), "text": np.full(3, 4)}, CPU, key_masks={"text": is_key}, joint=True)
    out_TD, result_TD = layer(torch.cat([image_SID.flatten(0, 1), text_SJD.flatten(0, 1)]), layout, with_result=True)
    found, results = layout.split(out_TD), layout.split(result_TD)
    for i, length in enumerate(lengths):
        after, result = one_sequence(layer, image_SID[i], text_SJD[i, :length])
        for got, want in ((found, after), (results, result)):
            torch.testing.assert_close(got["image"].view(3, 5, 16)[i], want["image"], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(got["text"].view(3, 4, 16)[i, :length], want["text"], rtol=1e-10, atol=1e-10)


def test_sequences_that_are_not_joint_do_not_use_the_joint_expert():
    layer = make_layer(kind="mome", joint_expert=True)
    image, text = (torch.randn(1, n, 16, dtype=torch.float64) for n in (5, 3))
    layout = Layout.build({"image": [5], "text": [3]}, CPU)
    found = layout.split(layer(torch.cat([image[0], text[0]]), layout))
    after, _ = one_sequence(layer, image[0], text[0], joint=False)
    for name in after:
        torch.testing.assert_close(found[name], after[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("place", ["pre", "post"])
def test_cls_attention_is_the_first_row_of_the_softmax(place):
    layer = make_layer(kind="separate", norm=place)
    x_SLD = torch.randn(2, 6, 16, dtype=torch.float64)
    layout = Layout.build({"image": [6, 6], "text": []}, CPU)
    found = layer.cls_attention(x_SLD.flatten(0, 1), layout, "image")
    w = layer.attention["image"]
    for i in range(2):
        rows = (norm(x_SLD[i], w.norm) if place == "pre" else x_SLD[i]) @ w.qkv.weight.T + w.qkv.bias
        q, k, _ = (m.view(6, 4, 4) for m in rows.chunk(3, 1))
        expected = torch.stack([(q[0, h] @ k[:, h].T / 2).softmax(-1) for h in range(4)]).mean(0)
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="different lengths"):
        layer.cls_attention(torch.zeros(5, 16, dtype=torch.float64), Layout.build({"image": [2, 3]}, CPU), "image")


def student_of(**changes):
    torch.manual_seed(0)
    return build_student(small_config(**changes), StubTokenizer()).double().eval()


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_rows_of_padding_change_no_real_token(padding):
    packed = student_of()
    padded = student_of(model__encoders__text={"kind": "tokens", "padding": padding})
    batch = random_batch()
    one, other = packed(batch), padded(batch)
    for name in ("image", "text"):
        torch.testing.assert_close(one.embedding[name], other.embedding[name])
    layout = other.tokens.layout
    assert len(other.tokens["text"]) > len(one.tokens["text"])
    torch.testing.assert_close(other.tokens["text"][layout.is_key("text").flatten()], one.tokens["text"])


def test_mean_over_real_tokens_and_over_padding_differ_by_the_padding():
    text = {"kind": "tokens", "padding": "longest"}
    batch = random_batch()
    real = student_of(model__pooling={"text": "mean"}, model__encoders__text=text)(batch).pooled["text"]
    packed = student_of(model__pooling={"text": "mean"})(batch).pooled["text"]
    torch.testing.assert_close(real, packed)
    padded = student_of(model__pooling={"text": "mean_padded"}, model__encoders__text=text)
    rows = padded(batch).tokens
    expected = padded.norm(rows["text"]).view(len(batch), -1, 16).mean(dim=1)
    torch.testing.assert_close(padded(batch).pooled["text"], expected)


def test_positions_may_start_later():
    from_2 = student_of(model__encoders__text={"kind": "tokens", "first_position": 2})
    assert from_2.encoders["text"].positions.weight.shape[0] == StubTokenizer.max_length + 2
    from_0 = student_of(model__encoders__text={"kind": "tokens", "position_rows": StubTokenizer.max_length + 2})
    from_0.load_state_dict(from_2.state_dict())
    with torch.no_grad():
        from_0.encoders["text"].positions.weight.copy_(from_2.encoders["text"].positions.weight.roll(-2, dims=0))
    batch = random_batch()
    torch.testing.assert_close(from_0(batch).pooled["text"], from_2(batch).pooled["text"])
    with pytest.raises(UserError, match=r"position_rows: found 10, expected at least 16 .* \+ 2"):
        student_of(model__encoders__text={"kind": "tokens", "first_position": 2, "position_rows": 10})


def test_kept_layers_and_results_are_those_of_the_layers():
    student = student_of()
    batch = random_batch()
    output = student(batch, wanted=Wanted(results=frozenset({"text"}), layers=frozenset({0, 2})))
    assert [len(output.results[name]) for name in output.results] == [3] and set(output.results) == {"text"}
    last = output.tokens
    for name in ("image", "text"):
        torch.testing.assert_close(output.layer_cls[2][name], last[name][last.layout.first_rows(name)])
    plain = student(batch)
    torch.testing.assert_close(output.embedding["text"], plain.embedding["text"])
    assert plain.results == {} and plain.layer_cls == {} and plain.pair is None


def test_token_types_are_added_before_the_first_layer_that_is_shared():
    plain, typed = student_of(), student_of(model__token_types="shared")
    assert typed.typed_layer == 1
    with torch.no_grad():
        typed.token_types.embedding.weight.zero_()
    batch = random_batch()
    torch.testing.assert_close(plain(batch).embedding["image"], typed(batch).embedding["image"])
    with torch.no_grad():
        typed.token_types.embedding.weight[1] = torch.linspace(-1, 1, 16)  # a constant would be normalised away
    assert torch.equal(plain(batch).embedding["image"], typed(batch).embedding["image"])
    assert not torch.allclose(plain(batch).embedding["text"], typed(batch).embedding["text"])
    with pytest.raises(UserError, match="no layer shares weights"):
        student_of(model__token_types="shared", model__layers=[{"kind": "separate"}])


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_pair_equals_its_image_and_caption_alone(first):
    layers = [
        {"kind": "separate"},
        {"kind": "mome", "joint_expert": first < 2},
        {"kind": "shared", "joint_expert": True},
    ]
    student = student_of(model__layers=layers, model__joint_from=first)
    batch = random_batch(images=4, captions=2)
    images, texts = torch.tensor([0, 3, 3, 1]), torch.tensor([5, 0, 7, 2])
    found = student(batch).pair(images, texts)
    encoded = student(batch).encoded
    layout = student(batch).tokens.layout
    for row, (i, j) in enumerate(zip(images.tolist(), texts.tolist(), strict=True)):
        image = encoded["image"].view(4, -1, 16)[i]
        starts = np.cumsum([0, *layout.lengths["text"]])
        text = encoded["text"][starts[j] : starts[j + 1]]
        for index, layer in enumerate(student.layers):
            after, _ = one_sequence(layer, image, text, joint=index >= first)
            image, text = after["image"], after["text"]
        torch.testing.assert_close(found[row], student.norm(text[0]), rtol=1e-9, atol=1e-9)


def test_joint_from_names_a_layer():
    with pytest.raises(UserError, match=r"model.joint_from: found 3, expected a layer's index below 3"):
        student_of(model__joint_from=3)
