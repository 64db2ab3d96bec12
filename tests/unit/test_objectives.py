"""Objectives: which rows meet which targets, heads, weights, and the student's own encoder as a teacher."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file
from small import StubTokenizer, random_batch, small_config

from mmd2v.errors import UserError
from mmd2v.models.student import build_student
from mmd2v.models.teachers import Targets, build_teachers
from mmd2v.objectives import build_objectives, numbered
from mmd2v.objectives.pairs import paired
from mmd2v.train.module import TrainModule


class StubTeacher:
    def __init__(self, width: int, modality: str) -> None:
        self.width, self.modality = width, modality


def build(objectives, teacher=None, **changes):
    config = small_config(
        objectives=objectives, teachers={"t": {"name": "timm:resnet10t"}} if teacher else {}, **changes
    )
    student = build_student(config, StubTokenizer()).eval()
    return student, build_objectives(config, student, {"t": teacher} if teacher else {})


@pytest.mark.parametrize("modality", ["image", "text"])
def test_each_row_is_compared_with_its_own_samples_target(modality):
    term = {"kind": "cls_regression", "teacher": "t", "head": "none"}
    student, objectives = build([term], StubTeacher(16, modality))
    batch = random_batch(captions=3)
    output = student(batch)
    target = torch.randn(4 if modality == "image" else 12, 16)
    losses = objectives(output, {"t": Targets(target)}, batch)
    image, text = output.pooled["image"], output.pooled["text"]
    if modality == "image":
        expected = F.mse_loss(image, target), F.mse_loss(text, target.repeat_interleave(3, 0))
    else:
        expected = F.mse_loss(image.repeat_interleave(3, 0), target), F.mse_loss(text, target)
    torch.testing.assert_close(losses["cls_regression_loss/image"], expected[0])
    torch.testing.assert_close(losses["cls_regression_loss/text"], expected[1])
    torch.testing.assert_close(losses["loss"], sum(expected))


@pytest.mark.parametrize(
    ("normalize", "function"), [("l2", F.normalize), ("layer_norm", lambda x: F.layer_norm(x, (16,)))]
)
@pytest.mark.parametrize("loss", ["mse", "smooth_l1", "cosine"])
def test_normalised_targets_and_distances(normalize, function, loss):
    term = {"kind": "cls_regression", "teacher": "t", "head": "none", "modalities": ["image"]}
    student, objectives = build([{**term, "normalize": normalize, "loss": loss}], StubTeacher(16, "image"))
    batch, raw = random_batch(), torch.randn(4, 16) * 3
    output = student(batch)
    prediction, target = output.pooled["image"], function(raw)
    expected = {
        "mse": F.mse_loss(prediction, target),
        "smooth_l1": F.smooth_l1_loss(prediction, target),
        "cosine": 1 - F.cosine_similarity(prediction, target).mean(),
    }[loss]
    torch.testing.assert_close(objectives(output, {"t": Targets(raw)}, batch)["loss"], expected)


def test_weights_and_names_of_equal_terms():
    term = {"kind": "cls_regression", "teacher": "t", "modalities": ["text"]}
    student, objectives = build([{**term, "weight": 0.5}, {**term, "weight": 2.0}], StubTeacher(7, "image"))
    losses = objectives(student(random_batch()), {"t": Targets(torch.randn(4, 7))}, random_batch())
    first, second = losses["cls_regression_loss/text"], losses["cls_regression_loss/text_2"]
    torch.testing.assert_close(losses["loss"], 0.5 * first + 2 * second)


def test_metrics_of_equal_terms_are_numbered_as_their_losses():
    terms = [{"kind": "contrastive", "temperature": 0.1}, {"kind": "contrastive", "temperature": 0.05, "layers": [1]}]
    student, objectives = build(terms)
    found = {name: value.item() for name, value in objectives.metrics().items()}
    expected = {"contrastive_scale": 10, "contrastive_scale_2": 20, "contrastive_scale/layer1": 20}
    assert found == pytest.approx(expected)
    losses = objectives(student(random_batch(), wanted=objectives.wanted), {}, random_batch())
    assert set(losses) == {"loss"} | {name.replace("scale", "loss") for name in expected}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a", "a", "a"), ["a", "a_2", "a_3"]),
        (("a_2", "a", "a", "a"), ["a_2", "a", "a_3", "a_4"]),
        (("a", "a", "a_2", "a_2"), ["a", "a_2", "a_2_2", "a_2_3"]),
        (("a_b", "a"), ["a_b", "a"]),  # a longer name is another one
    ],
)
def test_no_number_takes_the_place_of_another_scalar(names, expected):
    found = numbered({name: torch.tensor(i)} for i, name in enumerate(names))
    assert list(found) == expected and [int(value) for value in found.values()] == list(range(len(names)))


@pytest.mark.parametrize("texts", [(False, False), (False, True), (True, False), (True, True)])
def test_paired_rows_are_of_one_sample(texts):
    batch = replace(random_batch(captions=3), weights=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    rows = {False: torch.arange(4), True: torch.arange(4).repeat_interleave(3)}
    own, target, weights = paired(rows[texts[0]], rows[texts[1]], *texts, batch)
    assert torch.equal(own, target) and len(own) == (12 if any(texts) else 4)
    assert torch.equal(weights == 0, own == 1)
    assert paired(rows[texts[0]], rows[texts[1]], *texts, replace(batch, weights=None))[2] is None


def test_widths_that_differ_need_a_head():
    with pytest.raises(UserError, match="width 16 is not the teacher's 7; expected linear, norm_linear or mlp"):
        build([{"kind": "cls_regression", "teacher": "t", "head": "none"}], StubTeacher(7, "image"))


def test_temperature_is_clamped_and_reported():
    _, objectives = build([{"kind": "contrastive", "temperature": 0.05}])
    term = objectives.terms[0]
    assert objectives.metrics()["contrastive_scale"].item() == pytest.approx(20)
    with torch.no_grad():
        term.log_scale.fill_(9.0)
    assert term.scale().item() == pytest.approx(100)
    with torch.no_grad():
        term.log_scale.fill_(-3.0)
    assert term.scale().item() == pytest.approx(1)


@pytest.mark.parametrize(("start", "inward"), [(9.0, 1.0), (-3.0, -1.0)])
def test_a_temperature_outside_its_bounds_can_return(start, inward):
    """Descent follows minus the gradient: only the sign that leads back in may pass the clamp."""
    _, objectives = build([{"kind": "contrastive"}])
    term = objectives.terms[0]
    with torch.no_grad():
        term.log_scale.fill_(start)
    (back,) = torch.autograd.grad((term.scale() * inward).sum(), term.log_scale)
    (out,) = torch.autograd.grad((term.scale() * -inward).sum(), term.log_scale)
    assert back.item() * inward > 0 and out.item() == 0


def test_contrastive_needs_two_modalities():
    with pytest.raises(UserError, match="contrastive needs an image and a text modality"):
        build([{"kind": "contrastive"}], model__encoders={"image": {"kind": "patch", "patch_size": 8}})


def test_attributes_are_classified():
    term = {"kind": "attributes", "classes": 5, "prior": 0.1}
    student, objectives = build([term], data__labels="attributes")
    batch = random_batch()
    with pytest.raises(UserError, match=r"objectives.0.classes: samples carry none labels, expected 5"):
        objectives(student(batch), {}, batch)
    labels = torch.randint(0, 2, (4, 5)).float()
    batch = type(batch)(batch.images, batch.text_ids, batch.text_lengths, batch.caption_image, (), labels)
    output = student(batch)
    probability = torch.sigmoid(objectives.terms[0].head(output.pooled["image"]) + torch.logit(torch.tensor(0.1)))
    expected = F.binary_cross_entropy(probability, labels)
    torch.testing.assert_close(objectives(output, {}, batch)["attributes_loss"], expected)


def test_the_frozen_encoder_is_the_teacher_without_a_second_pass(tmp_path):
    weights = tmp_path / "w.safetensors"
    save_file(timm.create_model("resnet10t").state_dict(), weights)
    encoder = {"kind": "timm", "name": "resnet10t", "weights": str(weights), "frozen": True}
    names = {"own": "encoder:image", "outside": "t"}
    config = small_config(
        data__image__size=64,
        model__encoders__image=encoder,
        # The statistics of the data, as the encoder uses them.
        teachers={
            "t": {
                "name": f"timm:resnet10t@{weights}",
                "precision": "fp32",
                "image_size": 64,
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
            }
        },
        objectives=[{"kind": "cls_regression", "teacher": name} for name in names.values()],
    )
    student = build_student(config, StubTokenizer()).eval()
    teachers = build_teachers(config, torch.device("cpu"))
    module = TrainModule(student, build_objectives(config, student, teachers), autocast=False)
    module.objectives.terms[1].load_state_dict(module.objectives.terms[0].state_dict())
    batch = random_batch(size=64)
    losses = module(batch, {name: teacher(batch) for name, teacher in teachers.items()})
    for modality in ("image", "text"):
        own, outside = (losses[f"cls_regression_loss/{modality}{suffix}"] for suffix in ("", "_2"))
        torch.testing.assert_close(own, outside)


def test_an_encoder_that_is_not_frozen_is_no_teacher():
    with pytest.raises(ValidationError, match="needs a frozen timm encoder"):
        small_config(objectives=[{"kind": "cls_regression", "teacher": "encoder:image"}])
    with pytest.raises(ValidationError, match="is not among teachers"):
        small_config(objectives=[{"kind": "cls_regression", "teacher": "nobody"}])


def test_regression_knows_the_kind_of_a_modality_by_its_encoder():
    term = {"kind": "cls_regression", "teacher": "t", "head": "none", "modalities": ["photo", "caption"]}
    encoders = {"photo": {"kind": "patch", "patch_size": 8}, "caption": {"kind": "tokens"}}
    student, objectives = build([term], StubTeacher(16, "image"), model__encoders=encoders)
    batch, target = random_batch(captions=3), torch.randn(4, 16)
    output = student(batch)
    losses = objectives(output, {"t": Targets(target)}, batch)
    expected = F.mse_loss(output.pooled["caption"], target.repeat_interleave(3, 0))
    torch.testing.assert_close(losses["cls_regression_loss/caption"], expected)


def parts_of(batch, sizes):
    """The batch cut into micro-batches of these numbers of samples, as batches of tokens are."""
    first, start, parts = 0, 0, []
    for size in sizes:
        last = first + size
        tokens = int(batch.text_lengths[first:last].sum())
        parts.append(
            replace(
                batch,
                images=batch.images[first:last],
                text_ids=batch.text_ids[start : start + tokens],
                text_lengths=batch.text_lengths[first:last],
                caption_image=torch.arange(size),
                labels=batch.labels[first:last],
                weights=batch.weights[first:last],
                mean_over=len(batch) / len(sizes),
            )
        )
        first, start = last, start + tokens
    return parts


def test_micro_batches_of_different_sizes_average_to_the_mean_over_all_samples():
    terms = [
        {"kind": "cls_regression", "teacher": "t", "head": "none"},
        {"kind": "attributes", "modality": "text", "classes": 3},
        {"kind": "attributes", "classes": 3},
    ]
    student, objectives = build(terms, StubTeacher(16, "text"), data__labels="facts")
    labels, weights, target = (
        torch.randint(0, 2, (6, 3)).float(),
        torch.tensor([1, 1, 0, 1, 1, 1.0]),
        torch.randn(6, 16),
    )
    batch = replace(random_batch(6), labels=labels, weights=weights)
    whole = objectives(student(batch), {"t": Targets(target)}, batch)
    losses = [
        objectives(student(part), {"t": Targets(rows)}, part)
        for part, rows in zip(parts_of(batch, [1, 2, 3]), target.split([1, 2, 3]), strict=True)
    ]
    assert len(whole) == 5
    for name, expected in whole.items():
        mean = sum(loss[name] for loss in losses) / 3
        torch.testing.assert_close(mean, expected)
        assert not torch.isclose(losses[0][name], expected)


def test_attributes_of_texts_are_those_of_their_sample():
    term = {"kind": "attributes", "modality": "text", "classes": 3}
    student, objectives = build([term], data__labels="facts")
    labels = torch.randint(0, 2, (4, 3)).float()
    batch = replace(random_batch(captions=2), labels=labels)
    output = student(batch)
    logits = objectives.terms[0].head(output.pooled["text"])
    expected = F.binary_cross_entropy_with_logits(logits, labels.repeat_interleave(2, 0))
    torch.testing.assert_close(objectives(output, {}, batch)["attributes_loss"], expected)


def test_contrastive_refuses_batches_of_tokens():
    student, objectives = build([{"kind": "contrastive"}])
    batch = replace(random_batch(), mean_over=3.5)
    with pytest.raises(UserError, match=r"contrastive: the ranks must have equally many samples"):
        objectives(student(batch), {}, batch)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_classification_is_cross_entropy_of_the_pooled_output(modality):
    term = {"kind": "classification", "modality": modality, "classes": 3}
    student, objectives = build([term], data__labels="label")
    batch = random_batch(captions=2)
    with pytest.raises(UserError, match=r"objectives.0.classes: samples carry none labels, expected 3"):
        objectives(student(batch), {}, batch)
    classes = torch.tensor([2, 0, 1, 2])
    weights = torch.tensor([1.0, 0, 1, 1])
    batch = replace(batch, labels=F.one_hot(classes, 3).float(), weights=weights)
    if modality == "text":  # two captions a sample
        classes, weights = classes.repeat_interleave(2), weights.repeat_interleave(2)
    output = student(batch)
    logits = objectives.terms[0].head(output.pooled[modality])
    expected = (F.cross_entropy(logits, classes, reduction="none") * weights).mean()
    torch.testing.assert_close(objectives(output, {}, batch)["classification_loss"], expected)
    accuracy = objectives.metrics()["classification_accuracy"]
    torch.testing.assert_close(accuracy, (logits.argmax(1) == classes).float().mean())


def test_classification_needs_labels_of_its_own_classes():
    term = {"kind": "classification", "classes": 3}
    with pytest.raises(ValueError, match="the classification objective needs"):
        build([term])
    with pytest.raises(ValueError, match=r"objectives.1.classes: found 4.* as 3 classes"):
        build([term, {**term, "classes": 4}], data__labels="label")
