"""Every key of a config is described, and values that no run can mean are refused."""

import typing

import pytest
from pydantic import BaseModel, ValidationError
from small import small_config

from mmd2v.config import schema
from mmd2v.config.schema import Config


def _models(annotation: object) -> set[type[BaseModel]]:
    """Every section that can be reached from a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}.union(*(_models(field.annotation) for field in annotation.model_fields.values()))
    return set().union(*map(_models, typing.get_args(annotation)))


MODELS = sorted(_models(Config), key=lambda model: model.__name__)


def test_walk_reaches_every_section():
    shared = {schema.Section, schema.EncoderConfig, schema.ObjectiveConfig}  # bases, reached through what they are for
    declared = {m for m in vars(schema).values() if isinstance(m, type) and issubclass(m, schema.Section)}
    assert set(MODELS) == declared - shared


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_and_section_is_described(model):
    assert model.__doc__
    assert [name for name, field in model.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model__layers", [{"kind": "shared", "drop_path": 1.0}]),
        ("model__layers", [{"kind": "shared", "dropout": 1.0}]),
        ("model__projection", {"dropout": 1.0}),
        ("model__encoders__text__dropout", 1.0),
        ("model__encoders__image__token_drop", 1.0),
        ("data__image__crop_ratio", [0.0, 1.0]),
        ("data__image__crop_ratio", [1.5, 1.0]),
        ("data__image__crop_scale", [0.0, 1.0]),
        ("data__image__crop_scale", [0.9, 0.6]),
        ("optimizer__betas", [0.9, 1.0]),
        ("objectives", [{"kind": "contrastive", "temperature": 0.001}]),
        ("objectives", [{"kind": "contrastive", "temperature": 2}]),
    ],
)
def test_values_out_of_bounds(path, value):
    with pytest.raises(ValidationError):
        small_config(**{path: value})


def test_bounds_are_inside():
    small_config(
        data__image__crop_scale=[1.0, 1.0],
        data__image__crop_ratio=[1.0, 1.0],
        objectives=[{"kind": "contrastive", "temperature": 0.01}],
        model__layers=[{"kind": "shared", "drop_path": 0.99}],
    )
