"""What a caption claims, and how far a scene bears it out. Retrieval by this is the ceiling of any trained encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from mmd2v.data.synthetic.world import (
    COLOURS,
    COLUMNS,
    MAX_OBJECTS,
    ROWS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
)

# N captions, M scenes, S slots for named objects (= MAX_OBJECTS), P permutations of the slots, A object values,
# C counts a caption, R relations a caption.

OBJECT_FIELDS = {
    "shape": SHAPES,
    "colour": COLOURS,
    "texture": TEXTURES,
    "size": SIZES,
    "row": ROWS,
    "column": COLUMNS,
}
RELATIONS = ("left of", "above")
_BLOCK = 512  # captions scored at once: a few hundred MB against 1,000 scenes


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """The named attributes of one object; None is an attribute the caption does not name."""

    shape: str | None = None
    colour: str | None = None
    texture: str | None = None
    size: str | None = None
    row: str | None = None
    column: str | None = None

    def named(self) -> list[tuple[str, str]]:
        """The named attributes as (field, value)."""
        return [(field, value) for field in OBJECT_FIELDS if (value := getattr(self, field)) is not None]

    def count_true(self, thing: SceneObject) -> int:
        """How many of the named attributes the object has."""
        return sum(getattr(thing, field) == value for field, value in self.named())


@dataclass(frozen=True, slots=True)
class RelationFact:
    """Named object ``first`` is ``kind`` named object ``second``; both are places in ``Facts.objects``."""

    kind: str
    first: int
    second: int


@dataclass(frozen=True, slots=True)
class CountFact:
    """Exactly ``count`` objects of the scene have all attributes of ``what`` (every object, if it names none)."""

    count: int
    what: ObjectFacts = ObjectFacts()


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything one caption claims. Different entries of ``objects`` are different objects of the scene."""

    objects: tuple[ObjectFacts, ...] = ()
    relations: tuple[RelationFact, ...] = ()
    counts: tuple[CountFact, ...] = ()
    background: str | None = None
    pattern: str | None = None

    def __len__(self) -> int:
        """Number of single facts: one for each named attribute, relation, count and property of the background."""
        ground = (self.background is not None) + (self.pattern is not None)
        return ground + sum(len(one.named()) for one in self.objects) + len(self.relations) + len(self.counts)


def related(kind: str, first: SceneObject, second: SceneObject) -> bool:
    """Whether ``first`` stands in this relation to ``second``, by their cells of the grid."""
    if kind == "left of":
        return COLUMNS.index(first.column) < COLUMNS.index(second.column)
    if kind == "above":
        return ROWS.index(first.row) < ROWS.index(second.row)
    raise ValueError(f"kind: found {kind!r}, expected one of {', '.join(RELATIONS)}")


def facts_match(facts: Facts, scene: Scene) -> float:
    """Fraction of the facts that hold in the scene, in [0, 1]; 1 for a caption that claims nothing.

    Named objects are bound to different objects of the scene in the way that makes most facts true: "a red circle
    and a blue square" is only half right about a blue circle and a red square.
    """
    if len(facts) == 0:
        return 1.0
    ground = (facts.background == scene.background) + (facts.pattern == scene.pattern)
    counted = sum(
        sum(fact.what.count_true(thing) == len(fact.what.named()) for thing in scene.objects) == fact.count
        for fact in facts.counts
    )
    things = list(scene.objects) + [None] * (MAX_OBJECTS - len(scene.objects))
    bound = 0
    for order in permutations(things):
        true = sum(
            named.count_true(thing) for named, thing in zip(facts.objects, order, strict=False) if thing is not None
        )
        for fact in facts.relations:
            first, second = order[fact.first], order[fact.second]
            true += first is not None and second is not None and related(fact.kind, first, second)
        bound = max(bound, true)
    return (ground + counted + bound) / len(facts)


def facts_score_matrix(captions: Sequence[Facts], scenes: Sequence[Scene]) -> np.ndarray:
    """``facts_match`` of every caption with every scene: float32 ``[N_captions, N_scenes]``."""
    scores_NM = np.empty((len(captions), len(scenes)), np.float32)
    if not scores_NM.size:
        return scores_NM
    table = _SceneTable(scenes)
    for start in range(0, len(captions), _BLOCK):
        scores_NM[start : start + _BLOCK] = table.score(captions[start : start + _BLOCK])
    return scores_NM


_VALUES = [(field, value) for field, values in OBJECT_FIELDS.items() for value in values]
_COLUMN = {pair: column for column, pair in enumerate(_VALUES)}
_ORDERS = np.array(list(permutations(range(MAX_OBJECTS))))  # [P, S]: the object of the scene each slot is bound to


def _hot(rows: Sequence[ObjectFacts | SceneObject | None]) -> np.ndarray:
    """Attribute values as float32 ``[len(rows), A]``, 1 where the row has the value; None is all zero."""
    hot = np.zeros((len(rows), len(_VALUES)), np.float32)
    for place, row in enumerate(rows):
        for field in OBJECT_FIELDS if row is not None else ():
            if (value := getattr(row, field)) is not None:
                hot[place, _COLUMN[field, value]] = 1
    return hot


def _padded(items: Sequence[object], length: int) -> list:
    return [*items, *[None] * (length - len(items))]


class _SceneTable:
    """The scenes as arrays, so that a block of captions is scored by matrix products and look-ups."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        slots = [_padded(scene.objects, MAX_OBJECTS) for scene in scenes]
        self.count = len(scenes)
        self.objects = _hot([thing for row in slots for thing in row])  # [M * S, A]
        self.present_MS = np.array([[thing is not None for thing in row] for row in slots])
        self.background_M = np.array([scene.background for scene in scenes])
        self.pattern_M = np.array([scene.pattern for scene in scenes])
        # One row for each (kind, first object, second object), and a last row of zeros: "no relation claimed".
        self.related = np.zeros((len(RELATIONS) * MAX_OBJECTS**2 + 1, self.count), np.int8)
        for place, row in enumerate(slots):
            for first, second in permutations([at for at, thing in enumerate(row) if thing is not None], 2):
                for kind, name in enumerate(RELATIONS):
                    at = (kind * MAX_OBJECTS + first) * MAX_OBJECTS + second
                    self.related[at, place] = related(name, row[first], row[second])

    def score(self, captions: Sequence[Facts]) -> np.ndarray:
        """float32 ``[N, M]`` for one block of captions."""
        for facts in captions:
            if len(facts.objects) > MAX_OBJECTS:
                raise ValueError(f"captions: found {len(facts.objects)} named objects, expected at most {MAX_OBJECTS}")
        true_NM = self._bound(captions)
        true_NM += self._counted(captions)
        # None becomes a string that names no background.
        true_NM += np.array([str(facts.background) for facts in captions])[:, None] == self.background_M
        true_NM += np.array([str(facts.pattern) for facts in captions])[:, None] == self.pattern_M
        sizes_N = np.array([len(facts) for facts in captions])
        return np.where(sizes_N[:, None] == 0, 1, true_NM / np.maximum(sizes_N, 1)[:, None]).astype(np.float32)

    def _bound(self, captions: Sequence[Facts]) -> np.ndarray:
        """Facts about objects and relations that hold under the best binding, int16 ``[N, M]``."""
        named = _hot([row for facts in captions for row in _padded(facts.objects, MAX_OBJECTS)])
        true = (named @ self.objects.T).astype(np.int8).reshape(len(captions), MAX_OBJECTS, self.count, MAX_OBJECTS)
        most = max((len(facts.relations) for facts in captions), default=0)
        best_NM = np.full((len(captions), self.count), -1, np.int16)
        for order in _ORDERS:
            total_NM = sum(true[:, slot, :, thing].astype(np.int16) for slot, thing in enumerate(order))
            for place in range(most):
                rows = [
                    self._relation_row(facts.relations[place], order) if place < len(facts.relations) else -1
                    for facts in captions
                ]
                total_NM += self.related[rows]
            np.maximum(best_NM, total_NM, out=best_NM)
        return best_NM

    @staticmethod
    def _relation_row(fact: RelationFact, order: np.ndarray) -> int:
        kind = RELATIONS.index(fact.kind)
        return int((kind * MAX_OBJECTS + order[fact.first]) * MAX_OBJECTS + order[fact.second])

    def _counted(self, captions: Sequence[Facts]) -> np.ndarray:
        """How many of the claimed counts are right, int16 ``[N, M]``."""
        right_NM = np.zeros((len(captions), self.count), np.int16)
        claims = [(place, fact) for place, facts in enumerate(captions) for fact in facts.counts]
        if not claims:
            return right_NM
        wanted = _hot([fact.what for _, fact in claims])
        has = (wanted @ self.objects.T).reshape(len(claims), self.count, MAX_OBJECTS) == wanted.sum(1)[:, None, None]
        found = (has & self.present_MS).sum(-1)
        counts = np.array([fact.count for _, fact in claims])[:, None]
        np.add.at(right_NM, [place for place, _ in claims], found == counts)
        return right_NM
