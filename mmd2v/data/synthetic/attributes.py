"""The known attributes of a scene as one multi-hot vector: what a teacher for this world is trained on."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from mmd2v.data.synthetic.facts import OBJECT_FIELDS
from mmd2v.data.synthetic.world import BACKGROUNDS, MAX_OBJECTS, PATTERNS, Scene

# Pairs of attributes of one object are there so that the teacher must know which colour belongs to which shape.
# Triples are not: the test split holds triples that training never shows.
_PAIRS = tuple(combinations(OBJECT_FIELDS, 2))

ATTRIBUTE_NAMES: tuple[str, ...] = (
    *(f"background={value}" for value in BACKGROUNDS),
    *(f"pattern={value}" for value in PATTERNS),
    *(f"count={count}" for count in range(1, MAX_OBJECTS + 1)),
    *(f"{field}={value}" for field, values in OBJECT_FIELDS.items() for value in values),
    *(f"{a}={x} {b}={y}" for a, b in _PAIRS for x in OBJECT_FIELDS[a] for y in OBJECT_FIELDS[b]),
)
_PLACE = {name: place for place, name in enumerate(ATTRIBUTE_NAMES)}


def attributes(scene: Scene) -> np.ndarray:
    """Float32 ``[len(ATTRIBUTE_NAMES)]``, 1 where the scene has the attribute (in any of its objects), else 0."""
    names = [f"background={scene.background}", f"pattern={scene.pattern}", f"count={len(scene.objects)}"]
    for thing in scene.objects:
        values = [f"{field}={getattr(thing, field)}" for field in OBJECT_FIELDS]
        names += values
        names += [f"{a} {b}" for a, b in combinations(values, 2)]
    hot = np.zeros(len(ATTRIBUTE_NAMES), np.float32)
    hot[[_PLACE[name] for name in names]] = 1
    return hot
