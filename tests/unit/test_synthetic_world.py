"""The world: the same name gives the same scene, and the test split's combinations are unseen in training."""

from __future__ import annotations

import hashlib
import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmd2v.data.synthetic import SPLITS, held_out, scene
from mmd2v.data.synthetic.world import COLOURS, MAX_OBJECTS, SHAPES, TEXTURES

SEEDS = st.integers(0, 2**40)
INDICES = st.integers(0, 2**40)
SPLIT = st.sampled_from(SPLITS)


def kinds(scene_):
    return [(thing.colour, thing.shape, thing.texture) for thing in scene_.objects]


@given(SEEDS, SPLIT, INDICES)
def test_same_name_same_scene(seed, split, index):
    assert scene(seed, split, index) == scene(seed, split, index)


def test_scenes_differ_between_seeds_splits_and_indices():
    names = list(product((0, 1), SPLITS, range(200)))
    drawn = {repr((found := scene(*name)).objects) + found.background for name in names}
    assert len(drawn) == len(names)


def test_the_world_is_frozen():
    """Shards written by another version must describe the same scenes: change this only with a changelog line."""
    told = "".join(repr(scene(3, split, index)) for split in SPLITS for index in range(50))
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "46718d80cc799b56"


@given(SEEDS, SPLIT, INDICES)
def test_objects_are_inside_and_apart(seed, split, index):
    things = scene(seed, split, index).objects
    assert 1 <= len(things) <= MAX_OBJECTS
    for number, a in enumerate(things):
        assert a.radius <= a.x <= 1 - a.radius and a.radius <= a.y <= 1 - a.radius
        assert all(math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius for b in things[:number])
        assert all((a.row, a.column) != (b.row, b.column) for b in things[:number])


@given(SEEDS, st.sampled_from(("train", "val")), INDICES)
def test_no_held_out_combination_outside_the_test_split(seed, split, index):
    assert not any(held_out(*kind) for kind in kinds(scene(seed, split, index)))


@given(SEEDS, INDICES)
def test_every_test_scene_has_a_held_out_combination(seed, index):
    assert any(held_out(*kind) for kind in kinds(scene(seed, "test", index)))


def test_every_value_and_pair_is_seen_in_training_and_test():
    a_fifth = sum(held_out(*kind) for kind in product(COLOURS, SHAPES, TEXTURES))
    assert a_fifth * 5 == len(COLOURS) * len(SHAPES) * len(TEXTURES)
    for split in ("train", "test"):
        seen = {kind for index in range(6000) for kind in kinds(scene(0, split, index))}
        assert {(c, s) for c, s, _ in seen} == set(product(COLOURS, SHAPES))
        assert {(c, t) for c, _, t in seen} == set(product(COLOURS, TEXTURES))
        assert {(s, t) for _, s, t in seen} == set(product(SHAPES, TEXTURES))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "dev", 0), r"split: found 'dev', expected one of train, val, test"),
        ((-1, "train", 0), r"seed: found -1, expected an integer of at least 0"),
        ((0, "train", -3), r"index: found -3, expected an integer of at least 0"),
        ((0, "train", 1.5), r"index: found 1.5, expected an integer"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        scene(*arguments)
