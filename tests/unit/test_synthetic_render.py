"""Drawing: deterministic, antialiased, and every attribute shows in the pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmd2v.data.synthetic import SPLITS, attributes, render, scene
from mmd2v.data.synthetic.attributes import ATTRIBUTE_NAMES
from mmd2v.data.synthetic.world import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, TEXTURES


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SPLITS), st.integers(0, 10**6), st.integers(16, 97))
def test_picture_is_deterministic_and_of_the_asked_size(seed, split, index, size):
    picture = render(scene(seed, split, index), size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture, render(scene(seed, split, index), size))


def test_sizes_show_the_same_scene():
    for index in range(20):
        found = scene(0, "train", index)
        large = render(found, 256).astype(float).reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(large - render(found, 64)).mean() < 2.5


@pytest.mark.parametrize(
    ("field", "values"), [("colour", COLOURS), ("shape", SHAPES), ("texture", TEXTURES), ("size", None)]
)
def test_every_object_attribute_shows(field, values):
    base = next(found for i in range(99) if len((found := scene(0, "train", i)).objects) == 1)
    [thing] = base.objects
    thing = replace(thing, size="large", radius=0.17, x=0.5, y=0.5)
    if field == "size":
        variants = [replace(thing, radius=radius) for radius in (0.1, 0.135, 0.17)]
    else:
        variants = [replace(thing, **{field: value}) for value in values]
    pictures = [render(replace(base, objects=(variant,)), 64).astype(float) for variant in variants]
    for number, picture in enumerate(pictures):
        assert all(np.abs(picture - other).mean() > 0.5 for other in pictures[:number])


def test_every_background_shows():
    base = scene(0, "train", 0)
    grounds = [(ground, pattern) for ground in BACKGROUNDS for pattern in PATTERNS]
    pictures = [render(replace(base, background=g, pattern=p), 64).astype(float) for g, p in grounds]
    for number, picture in enumerate(pictures):
        assert all(np.abs(picture - other).mean() > 0.5 for other in pictures[:number])


def test_edges_are_antialiased():
    base = next(found for i in range(99) if len((found := scene(0, "train", i)).objects) == 1)
    disc = replace(base.objects[0], shape="circle", texture="solid", colour="red", brightness=1.0, x=0.5, y=0.5)
    picture = render(replace(base, objects=(disc,), background="black", pattern="plain"), 64)
    between = (picture[..., 0] > 40) & (picture[..., 0] < 200)
    assert between.sum() > 20


@given(st.integers(0, 10**6), st.sampled_from(SPLITS), st.integers(0, 10**6))
def test_attributes_are_those_of_the_scene(seed, split, index):
    found = scene(seed, split, index)
    vector = attributes(found)
    assert vector.shape == (len(ATTRIBUTE_NAMES),) and vector.dtype == np.float32 and set(vector) <= {0, 1}
    told = {name for name, on in zip(ATTRIBUTE_NAMES, vector, strict=True) if on}
    assert {name for name in told if name.startswith("background")} == {f"background={found.background}"}
    assert f"count={len(found.objects)}" in told and f"pattern={found.pattern}" in told
    for thing in found.objects:
        assert {f"shape={thing.shape}", f"shape={thing.shape} colour={thing.colour}"} <= told
    pairs = {f"shape={thing.shape} size={thing.size}" for thing in found.objects}
    assert {name for name in told if name.startswith("shape=") and " size=" in name} == pairs


def test_attribute_names_are_unique():
    assert len(set(ATTRIBUTE_NAMES)) == len(ATTRIBUTE_NAMES)


@pytest.mark.parametrize("size", [15, 0, -64, 64.0, True])
def test_bad_size(size):
    with pytest.raises(ValueError, match=rf"size: found {size}, expected an integer of at least 16 \(pixels\)"):
        render(scene(0, "train", 0), size)
