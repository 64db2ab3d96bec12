"""Two parts of a config that cannot both be meant are an error that names the key."""

import pytest
from pydantic import ValidationError
from small import small_config

EXPERT = {"kind": "mome", "joint_expert": True}
NO_CLS = {"kind": "patch", "patch_size": 8, "cls": False}
TEXT = {"kind": "tokens"}
TEACHER = {"t": {"name": "timm:test_vit"}}


def encoders(image=NO_CLS, text=TEXT):
    return {"image": image, "text": text}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__layers": [EXPERT]}, "model.layers.0.joint_expert: found true, but model.joint_from is null"),
        (
            {"model__layers": [{"kind": "shared"}, {**EXPERT, "count": 3}], "model__joint_from": 2},
            "model.layers.1.joint_expert: found true in a group that begins with layer 1, before model.joint_from 2",
        ),
        (
            {"model__encoders": encoders()},
            r"model.pooling.image: found cls \(the default\), but model.encoders.image.cls is false; expected mean",
        ),
        (
            {"model__encoders": encoders(), "model__pooling": {"image": "cls"}},
            "model.pooling.image: found cls, but model.encoders.image.cls is false",
        ),
        (
            {"model__encoders": encoders(), "objectives": [{"kind": "contrastive", "layers": [1]}]},
            "model.pooling.image: found cls",
        ),
        (
            {
                "model__encoders": encoders(),
                "model__pooling": {"image": "mean"},
                "teachers": TEACHER,
                "objectives": [{"kind": "layer_results", "teacher": "t", "modality": "image", "keep": 0.5}],
            },
            "objectives.0.keep: found 0.5, which takes the tokens that a CLS attends to, but model.encoders.image.cls",
        ),
        (
            {"model__pooling": {"image": "mean_padded"}},
            "model.pooling.image: found mean_padded, but model.encoders.image has no rows of padding; expected mean",
        ),
        (
            {"model__pooling": {"text": "mean_padded"}},
            "model.pooling.text: found mean_padded, but model.encoders.text has no rows of padding",
        ),
        (
            {"model__encoders": encoders(text={**TEXT, "init": "mmd2v:a", "weights": "mmd2v:b"})},
            "init: found 'mmd2v:a' beside weights 'mmd2v:b'; expected one of the two",
        ),
        (
            {"model__encoders": encoders({**NO_CLS, "init": "mmd2v:a", "weights": "mmd2v:b"})},
            "init: found 'mmd2v:a' beside weights 'mmd2v:b'; expected one of the two",
        ),
    ],
)
def test_contradictions(changes, message):
    with pytest.raises(ValidationError, match=message):
        small_config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__layers": [{"kind": "shared", "count": 2}, {**EXPERT, "count": 2}], "model__joint_from": 2},
        {"model__encoders": encoders(), "model__pooling": {"image": "mean"}},
        # A text has its tokenizer's, whatever `cls` says.
        {"model__encoders": encoders({"kind": "patch"}, {**TEXT, "cls": False})},
        {
            "model__encoders": encoders({"kind": "patch"}, {**TEXT, "padding": "longest"}),
            "model__pooling": {"text": "mean_padded"},
        },
        # A backbone is built from its own weights first: without them it would be downloaded.
        {
            "model__encoders": encoders(
                {"kind": "timm", "name": "resnet10t", "frozen": True, "weights": "a", "init": "mmd2v:b"}
            )
        },
    ],
)
def test_what_is_no_contradiction(changes):
    small_config(**changes)
