"""The language of the world: English captions that name a random part of a scene, with the facts they state."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

from mmd2v.data.synthetic.draws import Draws
from mmd2v.data.synthetic.facts import OBJECT_FIELDS, CountFact, Facts, ObjectFacts, RelationFact, related
from mmd2v.data.synthetic.world import BACKGROUNDS, MAX_OBJECTS, PATTERNS, Scene, check_natural

# A caption keeps naming facts until they carry this many bits, drawn anew for each caption. The lower end lets a
# caption single out its scene among about a thousand; a scene holds about 20 (one object) to 50 bits (three).
_LEAST_BITS, _MOST_BITS = 16.0, 21.0
_GROUND_BITS = {"background": math.log2(len(BACKGROUNDS)), "pattern": math.log2(len(PATTERNS))}
_FIELD_BITS = {field: math.log2(len(values)) for field, values in OBJECT_FIELDS.items()}
_COUNT_BITS = math.log2(MAX_OBJECTS)
_GROUP_BITS = 2.0
_RELATION_BITS = 1.0
_BINDING_BITS = 1.0  # a description may fit any object of a scene: that much less does each description tell

_NOUNS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "diamond": ("diamond", "rhombus"),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "plus sign"),
    "crescent": ("crescent", "moon"),
    None: ("shape", "object", "figure"),
}
_COLOUR_WORDS = {"lime": ("lime", "lime green"), "cyan": ("cyan", "turquoise"), "purple": ("purple", "violet")}
_SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "mid-sized"),
    "large": ("large", "big", "huge"),
}
_TEXTURE_WORDS = {
    "solid": ("solid", "filled"),
    "striped": ("striped", "banded"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"),
    "hollow": ("hollow", "outlined"),
}
_TEXTURE_PHRASES = {
    "solid": ("without any texture",),
    "striped": ("with stripes", "covered in stripes"),
    "dotted": ("with dots", "covered in spots"),
    "checkered": ("with a checkerboard texture", "covered in checks"),
    "hollow": ("with an empty inside", "drawn as an outline"),
}
_PLACES = {
    ("top", None): ("at the top", "near the upper edge"),
    ("middle", None): ("halfway up", "at middle height"),
    ("bottom", None): ("at the bottom", "near the lower edge"),
    (None, "left"): ("on the left", "at the left side"),
    (None, "centre"): ("in the centre column", "halfway across"),
    (None, "right"): ("on the right", "at the right side"),
    ("top", "left"): ("in the top left corner", "at the upper left"),
    ("top", "centre"): ("at the top centre", "in the centre of the upper edge"),
    ("top", "right"): ("in the top right corner", "at the upper right"),
    ("middle", "left"): ("in the middle of the left side", "at the centre left"),
    ("middle", "centre"): ("right in the middle", "in the very centre"),
    ("middle", "right"): ("in the middle of the right side", "at the centre right"),
    ("bottom", "left"): ("in the bottom left corner", "at the lower left"),
    ("bottom", "centre"): ("at the bottom centre", "in the centre of the lower edge"),
    ("bottom", "right"): ("in the bottom right corner", "at the lower right"),
}
_RELATION_WORDS = {
    "left of": (("left of", "to the left of"), ("right of", "to the right of")),
    "above": (("above", "higher than"), ("below", "beneath", "lower than")),
}
_PATTERN_WORDS = {
    "plain": ("plain", "smooth"),
    "gridded": ("gridded", "grid-lined"),
    "speckled": ("speckled", "flecked"),
}
_NUMBERS = ("no", "one", "two", "three")
_MANY = ("shapes", "objects", "figures")
_GROUND_NOUNS = ("background", "backdrop")


@dataclass(frozen=True, slots=True)
class Caption:
    """A sentence or two about a scene, and exactly what they claim."""

    text: str
    facts: Facts


def captions(scene: Scene, seed: int, n: int) -> list[Caption]:
    """``n`` captions of the scene, each about its own random part; caption k does not depend on ``n``."""
    check_natural("seed", seed)
    check_natural("n", n)
    name = ("caption", seed, scene.seed, scene.split, scene.index)
    return [_caption(scene, Draws(*name, number)) for number in range(n)]


def _caption(scene: Scene, draws: Draws) -> Caption:
    facts = _pick_facts(scene, draws)
    return Caption(text=_write(facts, len(scene.objects), draws), facts=facts)


# ---- What is said -------------------------------------------------------------------------------------------------


def _pick_facts(scene: Scene, draws: Draws) -> Facts:
    """Names some of the objects, then adds true facts in random order until there are enough bits."""
    things = draws.shuffled(scene.objects)
    things = things[: 1 + int(draws.between(0, len(things)))]
    pool = [("object", place, field) for place in range(len(things)) for field in OBJECT_FIELDS]
    pool += [("ground", field) for field in _GROUND_BITS]
    if len(things) > 1:
        pool += [("relation", fact) for fact in _true_relations(things, draws)]
    pool += [("count", fact) for fact in _true_counts(scene, draws)]

    objects = [ObjectFacts() for _ in things]
    relations: list[RelationFact] = []
    counts: list[CountFact] = []
    ground: dict[str, str] = {}
    wanted = draws.between(_LEAST_BITS, _MOST_BITS) + _BINDING_BITS * len(things)
    for item in _essential_first(draws.shuffled(pool), len(things)):
        if wanted <= 0:
            break
        match item:
            case ("object", place, field):
                objects[place] = replace(objects[place], **{field: getattr(things[place], field)})
                wanted -= _FIELD_BITS[field]
            case ("ground", field):
                ground[field] = getattr(scene, field)
                wanted -= _GROUND_BITS[field]
            case ("relation", fact):
                relations.append(fact)
                wanted -= _RELATION_BITS
            case ("count", fact):
                counts.append(fact)
                wanted -= _GROUP_BITS if fact.what.named() else _COUNT_BITS
    if any(fact.what.named() and fact.count == len(scene.objects) for fact in counts):
        # Such a group is told as "both" or "all three", which gives the total away as well.
        counts = list(dict.fromkeys([*counts, CountFact(len(scene.objects))]))
    return Facts(tuple(objects), tuple(relations), tuple(counts), **ground)


def _essential_first(pool: list[tuple], named: int) -> list[tuple]:
    """The pool with one telling attribute of each named object moved to the front: nobody says just "a shape"."""
    front = [
        next(item for item in pool if item[0] == "object" and item[1] == place and item[2] in ("colour", "shape"))
        for place in range(named)
    ]
    return front + [item for item in pool if item not in front]


def _true_relations(things: list, draws: Draws) -> list[RelationFact]:
    """At most one relation, between the first two named objects."""
    true = [
        RelationFact(kind, first, second)
        for kind in _RELATION_WORDS
        for first, second in ((0, 1), (1, 0))
        if related(kind, things[first], things[second])
    ]
    return [draws.choose(true)] if true else []


def _true_counts(scene: Scene, draws: Draws) -> list[CountFact]:
    """The number of objects, and one group of objects that share a value ("two circles"), if there is one."""
    groups = [
        CountFact(count, ObjectFacts(**{field: value}))
        for field in ("shape", "colour", "texture")
        for value, count in Counter(getattr(thing, field) for thing in scene.objects).items()
        if count > 1
    ]
    return [CountFact(len(scene.objects))] + ([draws.choose(groups)] if groups else [])


# ---- How it is said -----------------------------------------------------------------------------------------------


def _write(facts: Facts, total: int, draws: Draws) -> str:
    phrases = [_noun_phrase(named, draws) for named in facts.objects]
    after: list[str] = []  # further sentences
    ground = _ground_phrase(facts, after, draws)
    fronted = bool(ground) and draws.chance(0.35)
    head = _relation_clause(facts.relations[0], phrases, fronted, draws) if facts.relations else ""
    groups = [fact for fact in facts.counts if fact.what.named()]
    told_by_group = any(fact.count == total for fact in groups)
    count = next((fact.count for fact in facts.counts if not fact.what.named()), None)
    if not head:
        head = _listing(phrases, count if not told_by_group else None, total, fronted, after, draws)
    elif count is not None and not told_by_group:
        after.append(_count_sentence(count, draws))
    after += [_group_sentence(fact, total, draws) for fact in groups]
    if ground:
        head = f"{ground}, {head}" if fronted else f"{head} {ground}"
    return _sentences([head, *draws.shuffled(after)], draws)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _colour_word(colour: str, draws: Draws) -> str:
    return draws.choose(_COLOUR_WORDS.get(colour, (colour,)))


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def _noun_phrase(named: ObjectFacts, draws: Draws) -> str:
    """For example "a small striped red circle at the top", with an attribute sometimes told after the noun."""
    adjectives, behind = [], []
    if named.texture:
        if draws.chance(0.3):
            behind.append(draws.choose(_TEXTURE_PHRASES[named.texture]))
        else:
            adjectives.append(draws.choose(_TEXTURE_WORDS[named.texture]))
    if named.colour:
        word = _colour_word(named.colour, draws)
        if draws.chance(0.2):
            behind.insert(0, draws.choose((f"in {word}", f"coloured {word}")))
        else:
            adjectives.append(word)
    if draws.chance(0.2):
        adjectives.reverse()
    if named.size:
        adjectives.insert(0, draws.choose(_SIZE_WORDS[named.size]))
    if named.row or named.column:
        behind.append(draws.choose(_PLACES[named.row, named.column]))
    words = [*adjectives, draws.choose(_NOUNS[named.shape]), *behind]
    return " ".join([_article(words[0]), *words])


def _relation_clause(fact: RelationFact, phrases: list[str], fronted: bool, draws: Draws) -> str:
    """For example "A sits to the left of B", "B is right of A", "there is C, and A above B"."""
    forwards, backwards = _RELATION_WORDS[fact.kind]
    first, second = phrases[fact.first], phrases[fact.second]
    words = draws.choose(forwards)
    if draws.chance(0.5):
        first, second, words = second, first, draws.choose(backwards)
    if first.endswith(words.split()[0]):
        words = f"to the {words}"  # not "at the lower right right of"
    others = [phrase for place, phrase in enumerate(phrases) if place not in (fact.first, fact.second)]
    verb = draws.choose(("is", "sits", "lies", "floats", ""))
    clause = " ".join(filter(None, (first, verb, words, second)))
    if not verb:
        clause = _opening(fronted, draws) + clause
    if others:
        clause += draws.choose((", and there is ", ", with ", " and also ")) + others[0]
    return clause


def _opening(fronted: bool, draws: Draws) -> str:
    """Words before the first object; ``fronted`` if the background already opens the sentence."""
    if fronted:
        return draws.choose(("", "there is ", "we see "))
    return draws.choose(
        ("", "", "there is ", "a picture of ", "an image of ", "a drawing with ", "we see ", "this shows ")
    )


def _listing(phrases: list[str], count: int | None, total: int, fronted: bool, after: list[str], draws: Draws) -> str:
    """For example "a picture of A and B", "three shapes: A, B and C", "there is A"."""
    last = draws.choose((" and ", " and ", " along with ", " together with "))
    listed = ", ".join(phrases[:-1]) + last + phrases[-1] if len(phrases) > 1 else phrases[0]
    if count is not None:
        if len(phrases) == total and draws.chance(0.5):
            if total == 1:
                return draws.choose(("a single shape, ", "only one object: ", "nothing but ")) + listed
            return f"{_NUMBERS[count]} {draws.choose(_MANY)}: {listed}"
        after.append(_count_sentence(count, draws))
    return _opening(fronted, draws) + listed


def _count_sentence(count: int, draws: Draws) -> str:
    if count == 1:
        return draws.choose(("nothing else is there", "it is the only shape", "one object in all"))
    number, many = _NUMBERS[count], draws.choose(_MANY)
    return draws.choose((f"there are {number} {many}", f"{number} {many} in all", f"it shows {number} {many}"))


def _group_sentence(fact: CountFact, total: int, draws: Draws) -> str:
    """For example "exactly two are red", "both shapes are circles", "there are three striped objects"."""
    [(field, value)] = fact.what.named()
    if field == "shape":
        noun = adjective = _plural(draws.choose(_NOUNS[value]))
    else:
        adjective = _colour_word(value, draws) if field == "colour" else draws.choose(_TEXTURE_WORDS[value])
        noun = f"{adjective} {draws.choose(_MANY)}"
    number = _NUMBERS[fact.count]
    if fact.count == total:
        everyone = "both" if total == 2 else "all three"
        return f"{everyone} {draws.choose(_MANY)} are {adjective}"
    return draws.choose((f"there are exactly {number} {noun}", f"exactly {number} are {adjective}"))


def _ground_phrase(facts: Facts, after: list[str], draws: Draws) -> str:
    """For example "on a plain navy background"; empty if nothing is said of it or it gets a sentence of its own."""
    adjectives = [draws.choose(_PATTERN_WORDS[facts.pattern])] if facts.pattern else []
    adjectives += [facts.background] if facts.background else []
    if not adjectives:
        return ""
    noun = draws.choose(_GROUND_NOUNS)
    if draws.chance(0.25):
        after.append(f"the {noun} is {' and '.join(adjectives)}")
        return ""
    return " ".join([draws.choose(("on", "against")), _article(adjectives[0]), *adjectives, noun])


def _sentences(parts: list[str], draws: Draws) -> str:
    """Joins the clauses into sentences; some writers care for capitals and full stops, some do not."""
    if draws.chance(0.5):
        return " ".join(part[0].upper() + part[1:] + "." for part in parts)
    return draws.choose((", ", "; ")).join(parts)
