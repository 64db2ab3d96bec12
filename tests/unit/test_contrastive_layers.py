"""The contrastive objective at chosen layers, and between named modalities."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from small import StubTokenizer, random_batch, small_config

from mmd2v.errors import UserError
from mmd2v.models.student import build_student
from mmd2v.objectives import build_objectives
from mmd2v_kernels import contrastive


def build(term=None, **changes):
    config = small_config(objectives=[{"kind": "contrastive", **(term or {})}], **changes)
    student = build_student(config, StubTokenizer()).eval()
    return student, build_objectives(config, student, {})


def run(student, objectives, batch):
    return objectives(student(batch, wanted=objectives.wanted), {}, batch)


def test_each_layer_has_a_loss_a_head_and_a_temperature():
    student, objectives = build({"layers": [0, 2], "dim": 5, "temperature": 0.05})
    term, batch = objectives.terms[0], random_batch(captions=2)
    with torch.no_grad():
        term.log_scale.add_(torch.tensor([0.0, 0.5, 1.0]))
    assert objectives.wanted.layers == {0, 2}
    output = student(batch, wanted=objectives.wanted)
    losses = objectives(output, {}, batch)
    names = ["contrastive_loss", "contrastive_loss/layer0", "contrastive_loss/layer2"]
    assert list(losses) == ["loss", *names]
    torch.testing.assert_close(losses["loss"], sum(losses[name] for name in names))
    scales = [objectives.metrics()[name.replace("loss", "scale")].item() for name in names]
    assert scales == pytest.approx([20, 20 * 2.718282**0.5, 20 * 2.718282])
    for layer, scale in ((0, scales[1]), (2, scales[2])):
        image, text = (
            F.normalize(term.heads[f"layer{layer}"][name](output.layer_cls[layer][name]), dim=-1)
            for name in ("image", "text")
        )
        assert image.shape == (4, 5)
        owner = batch.caption_image
        expected = contrastive(image, text, image, text, owner, owner, 0, torch.tensor(scale))
        torch.testing.assert_close(losses[f"contrastive_loss/layer{layer}"], expected)


def test_the_cls_of_a_layer_is_what_the_next_one_sees():
    student, objectives = build({"layers": [2], "final": False})
    batch = random_batch()
    output = student(batch, wanted=objectives.wanted)
    torch.testing.assert_close(student.norm(output.layer_cls[2]["text"]), output.pooled["text"])
    assert list(objectives(output, {}, batch)) == ["loss", "contrastive_loss/layer2"]


def test_heads_are_shared_where_the_projection_is():
    _, objectives = build({"layers": [1]}, model__projection={"shared": True, "dim": 6})
    assert list(objectives.terms[0].heads["layer1"]) == ["shared"]
    assert objectives.terms[0].heads["layer1"]["shared"][1].weight.shape == (6, 16)


def test_the_gradient_reaches_the_layers_below_alone():
    student, objectives = build({"layers": [0], "final": False})
    run(student, objectives, random_batch())["loss"].backward()
    assert student.layers[0].mlp["image"].fc1.weight.grad is not None
    assert student.layers[1].mlp["image"].fc1.weight.grad is None


def test_levels_that_cannot_be():
    with pytest.raises(UserError, match=r"objectives.0.layers: found 3, expected an index below 3"):
        build({"layers": [3]})
    layers = [{"kind": "separate", "modalities": ["image"]}, {"kind": "shared"}]
    with pytest.raises(UserError, match=r"found 0, which 'text' does not pass; expected a layer of both"):
        build({"layers": [0]}, model__layers=layers)
    with pytest.raises(ValidationError, match="found false without `layers`"):
        build({"final": False})
    with pytest.raises(ValidationError, match=r"found \[1, 1\], expected each layer once"):
        build({"layers": [1, 1]})
    with pytest.raises(UserError, match=r"needs the CLS of 'image', but model.pooling.image is mean"):
        build({"layers": [1]}, model__pooling={"image": "mean"})


THREE = {
    "photo": {"kind": "patch", "patch_size": 8},
    "depth": {"kind": "patch", "patch_size": 16},
    "caption": {"kind": "tokens"},
}


def test_rows_without_text_are_paired_one_to_one():
    student, objectives = build({"between": ["photo", "depth"]}, model__encoders=THREE)
    whole = random_batch(captions=3)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    for batch, kept in ((whole, [0, 1, 2, 3]), (replace(whole, weights=weights), [0, 2, 3])):
        output = student(batch)
        a, b = output.embedding["photo"][kept], output.embedding["depth"][kept]
        logits = a @ b.T / 0.07
        labels = torch.arange(len(kept))
        expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        loss = objectives(output, {}, batch)["contrastive_loss"]
        torch.testing.assert_close(loss, expected * len(kept) / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("between", [["caption", "depth"], ["depth", "caption"]])
def test_a_text_is_a_caption_wherever_it_is_named(between):
    student, objectives = build({"between": between}, model__encoders=THREE)
    batch = random_batch(captions=2)
    output = student(batch)
    image, text, owner = output.embedding["depth"], output.embedding["caption"], batch.caption_image
    expected = contrastive(image, text, image, text, owner, owner, 0, torch.tensor(1 / 0.07))
    torch.testing.assert_close(objectives(output, {}, batch)["contrastive_loss"], expected)


def test_two_texts_are_paired_caption_by_caption():
    encoders = {"a": {"kind": "tokens"}, "b": {"kind": "tokens"}}
    student, objectives = build({"between": ["a", "b"]}, model__encoders=encoders)
    batch = replace(random_batch(captions=2), weights=torch.ones(4))
    output = student(batch)
    logits, labels = output.embedding["a"] @ output.embedding["b"].T / 0.07, torch.arange(8)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(objectives(output, {}, batch)["contrastive_loss"], expected, rtol=1e-5, atol=1e-6)


def test_modalities_must_be_clear():
    with pytest.raises(UserError, match=r"objectives.0.between: missing, but there are 3 modalities"):
        build(model__encoders=THREE)
    with pytest.raises(UserError, match=r"contrastive needs an image and a text modality.*name any two under"):
        build(model__encoders={name: THREE[name] for name in ("photo", "depth")})
    with pytest.raises(ValidationError, match=r"objectives.0.between: 'phot' is no modality"):
        build({"between": ["phot", "depth"]}, model__encoders=THREE)
    with pytest.raises(ValidationError, match="found depth twice"):
        build({"between": ["depth", "depth"]}, model__encoders=THREE)


def test_two_terms_of_one_kind_are_told_apart():
    config = small_config(
        model__encoders=THREE,
        objectives=[
            {"kind": "contrastive", "between": ["photo", "caption"], "layers": [1, 2]},
            {"kind": "contrastive", "between": ["depth", "caption"], "layers": [1, 2]},
        ],
    )
    student = build_student(config, StubTokenizer())
    names = list(run(student, build_objectives(config, student, {}), random_batch()))
    first = ["contrastive_loss", "contrastive_loss/layer1", "contrastive_loss/layer2"]
    assert names == ["loss", *first, *(f"{name}_2" for name in first)]
