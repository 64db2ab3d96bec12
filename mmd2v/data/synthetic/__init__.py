"""A generated world of scenes with captions and known attributes: unlimited, deterministic, nothing to download."""

from mmd2v.data.synthetic.attributes import ATTRIBUTE_NAMES, attributes
from mmd2v.data.synthetic.captions import Caption, captions
from mmd2v.data.synthetic.facts import (
    CountFact,
    Facts,
    ObjectFacts,
    RelationFact,
    facts_match,
    facts_score_matrix,
)
from mmd2v.data.synthetic.render import render
from mmd2v.data.synthetic.world import SPLITS, Scene, SceneObject, held_out, scene

__all__ = [
    "ATTRIBUTE_NAMES",
    "SPLITS",
    "Caption",
    "CountFact",
    "Facts",
    "ObjectFacts",
    "RelationFact",
    "Scene",
    "SceneObject",
    "attributes",
    "captions",
    "facts_match",
    "facts_score_matrix",
    "held_out",
    "render",
    "scene",
]
