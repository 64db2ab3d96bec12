"""The ceiling: facts bind to objects, the fast matrix equals the plain definition, and retrieval by facts works."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmd2v.data.synthetic import (
    SPLITS,
    CountFact,
    Facts,
    ObjectFacts,
    RelationFact,
    captions,
    facts_match,
    facts_score_matrix,
    scene,
)
from mmd2v.data.synthetic.facts import OBJECT_FIELDS, RELATIONS
from mmd2v.data.synthetic.world import BACKGROUNDS, PATTERNS

TWO = next(found for i in range(99) if len((found := scene(0, "train", i)).objects) == 2)
RED_CIRCLE = replace(TWO.objects[0], colour="red", shape="circle", row="top", column="left")
BLUE_SQUARE = replace(TWO.objects[1], colour="blue", shape="square", row="bottom", column="left")
PAIR = replace(TWO, objects=(RED_CIRCLE, BLUE_SQUARE), background="navy", pattern="plain")


def test_objects_are_bound():
    red_circle, blue_square = ObjectFacts(shape="circle", colour="red"), ObjectFacts(shape="square", colour="blue")
    assert facts_match(Facts((red_circle, blue_square)), PAIR) == 1
    assert facts_match(Facts((blue_square, red_circle)), PAIR) == 1
    crossed = (ObjectFacts(shape="circle", colour="blue"), ObjectFacts(shape="square", colour="red"))
    assert facts_match(Facts(crossed), PAIR) == 0.5
    # Two named objects are two objects: one circle does not serve for both.
    assert facts_match(Facts((ObjectFacts(shape="circle"), ObjectFacts(shape="circle"))), PAIR) == 0.5
    assert facts_match(Facts((ObjectFacts(),) * 3, (RelationFact("above", 1, 2),)), PAIR) == 1


def test_relations_follow_the_binding():
    named = (ObjectFacts(colour="red"), ObjectFacts(colour="blue"))
    assert facts_match(Facts(named, (RelationFact("above", 0, 1),)), PAIR) == 1
    assert facts_match(Facts(named, (RelationFact("above", 1, 0),)), PAIR) == pytest.approx(2 / 3)
    assert facts_match(Facts(named, (RelationFact("left of", 0, 1),)), PAIR) == pytest.approx(2 / 3)


def test_counts_are_exact():
    assert facts_match(Facts(counts=(CountFact(2),)), PAIR) == 1
    assert facts_match(Facts(counts=(CountFact(1), CountFact(3))), PAIR) == 0
    assert facts_match(Facts(counts=(CountFact(1, ObjectFacts(shape="circle")),)), PAIR) == 1
    assert facts_match(Facts(counts=(CountFact(2, ObjectFacts(shape="circle")),)), PAIR) == 0


def test_background_counts_like_any_fact():
    assert facts_match(Facts(background="navy", pattern="gridded"), PAIR) == 0.5
    assert facts_match(Facts(), PAIR) == 1


def optional(values):
    return st.none() | st.sampled_from(values)


OBJECT_FACTS = st.builds(ObjectFacts, **{field: optional(values) for field, values in OBJECT_FIELDS.items()})
FACTS = st.integers(0, 3).flatmap(
    lambda count: st.builds(
        Facts,
        objects=st.tuples(*[OBJECT_FACTS] * count),
        relations=st.lists(
            st.permutations(range(count)).flatmap(
                lambda order: st.sampled_from([RelationFact(kind, order[0], order[1]) for kind in RELATIONS])
            ),
            max_size=2,
        ).map(tuple)
        if count > 1
        else st.just(()),
        counts=st.lists(st.builds(CountFact, st.integers(0, 3), OBJECT_FACTS), max_size=2).map(tuple),
        background=optional(BACKGROUNDS),
        pattern=optional(PATTERNS),
    )
)
SCENES = st.builds(scene, st.integers(0, 10**6), st.sampled_from(SPLITS), st.integers(0, 10**6))


@settings(deadline=None)
@given(st.lists(FACTS, max_size=5), st.lists(SCENES, max_size=5))
def test_matrix_equals_the_definition(facts, scenes):
    scores = facts_score_matrix(facts, scenes)
    assert scores.shape == (len(facts), len(scenes)) and scores.dtype == np.float32
    expected = [[facts_match(one, found) for found in scenes] for one in facts]
    np.testing.assert_array_equal(scores, np.array(expected, np.float32).reshape(scores.shape))


def test_matrix_equals_the_definition_on_captions_over_several_blocks():
    scenes = [scene(5, "test", index) for index in range(130)]
    facts = [caption.facts for found in scenes for caption in captions(found, 1, 5)]
    scores = facts_score_matrix(facts, scenes[:7])
    expected = [[facts_match(one, found) for found in scenes[:7]] for one in facts]
    np.testing.assert_array_equal(scores, np.array(expected, np.float32))


@pytest.mark.parametrize("seed", [0, 1])
def test_ceiling_of_retrieval(seed):
    """A thousand unseen scenes: what the captions name nearly always singles out the right one, yet not always."""
    scenes = [scene(seed, "test", index) for index in range(1000)]
    scores = facts_score_matrix([one.facts for found in scenes for one in captions(found, seed, 5)], scenes)
    owner = np.arange(5000) // 5
    assert (scores[np.arange(5000), owner] == 1).all()
    text_to_image = (scores.argmax(1) == owner).mean()  # argmax takes the lowest index among equals
    image_to_text = (owner[scores.argmax(0)] == np.arange(1000)).mean()
    assert text_to_image >= 0.9 and image_to_text >= 0.9


def test_too_many_objects_are_an_error():
    with pytest.raises(ValueError, match="captions: found 4 named objects, expected at most 3"):
        facts_score_matrix([Facts((ObjectFacts(),) * 4)], [PAIR])
