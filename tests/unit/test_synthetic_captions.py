"""Language: true, varied, grammatical where grammar can be checked, and only ever about a part of the scene."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmd2v.data.synthetic import SPLITS, captions, facts_match, scene

SCENES = st.builds(scene, st.integers(0, 10**6), st.sampled_from(SPLITS), st.integers(0, 10**6))


@given(SCENES, st.integers(0, 10**6), st.integers(0, 6))
def test_captions_are_deterministic_and_true(found, seed, n):
    told = captions(found, seed, n)
    assert told == captions(found, seed, n) and told == captions(found, seed, n + 1)[:n] and len(told) == n
    for caption in told:
        assert facts_match(caption.facts, found) == 1
        assert len(caption.facts) >= 5


def test_the_language_is_frozen():
    """Shards written by another version must hold the same captions: change this only with a changelog line."""
    told = "\n".join(one.text for index in range(100) for one in captions(scene(3, "train", index), 4, 2))
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "bed53e04b3158d19"


def test_captions_are_varied():
    scenes = [scene(1, "train", index) for index in range(2000)]
    texts = [caption.text for found in scenes for caption in captions(found, 0, 5)]
    assert len(set(texts)) > 0.995 * len(texts)
    openings = Counter(" ".join(text.lower().split()[:2]) for text in texts)
    assert len(openings) > 60 and openings.most_common(1)[0][1] < 0.2 * len(texts)
    words = {word for text in texts for word in re.findall("[a-z-]+", text.lower())}
    assert 120 < len(words) < 400


def test_captions_name_a_part():
    """A scene of several objects holds many more facts than a caption tells."""
    for found in (scene(2, "test", index) for index in range(300)):
        for caption in captions(found, 0, 3):
            assert len(caption.facts) < 6 * len(found.objects) + 4
            assert len(caption.facts.objects) <= len(found.objects)
    three = [found for index in range(300) if len((found := scene(2, "test", index)).objects) == 3]
    shares = [len(caption.facts) / 21 for found in three for caption in captions(found, 0, 3)]
    assert sum(shares) / len(shares) < 0.6


@given(SCENES, st.integers(0, 10**6))
def test_grammar(found, seed):
    for caption in captions(found, seed, 4):
        text = caption.text.lower()
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
        assert not re.search(r"  | [.,;:]|[.,;:]{2}|\bnone\b|_|\b(\w+) \1\b", text), text
        assert not re.search(r"\b(two|three) (shape|object|figure)\b|\bone \w+s\b", text), text
        assert text == text.strip()


@given(SCENES, st.integers(0, 10**6))
def test_every_claim_is_in_the_text(found, seed):
    """The facts hold nothing the words do not say: checked where the word is always the attribute's own name."""
    for caption in captions(found, seed, 4):
        text = caption.text.lower()
        named = [one.colour for one in caption.facts.objects] + [caption.facts.background]
        for colour in named:
            if colour not in (None, "purple", "cyan"):
                assert re.search(rf"\b{colour}\b", text), (colour, text)


@given(SCENES, st.integers(0, 10**6))
def test_every_word_is_a_claim(found, seed):
    """And the words say nothing the facts do not hold."""
    for caption in captions(found, seed, 4):
        claimed = {one.colour for one in caption.facts.objects}
        claimed |= {fact.what.colour for fact in caption.facts.counts}
        for colour in re.findall(r"\b(red|orange|yellow|lime|blue|pink|brown)\b", caption.text.lower()):
            assert colour in claimed, caption


@pytest.mark.parametrize(("seed", "n", "name"), [(-1, 5, "seed"), (0, -1, "n"), (0, 2.0, "n")])
def test_bad_arguments(seed, n, name):
    with pytest.raises(ValueError, match=f"{name}: found .*, expected an integer of at least 0"):
        captions(scene(0, "train", 0), seed, n)
