"""The world: which attributes exist, how a scene is sampled, and which combinations only the test split contains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmd2v.data.synthetic.draws import Draws

COLOURS = ("red", "orange", "yellow", "lime", "green", "cyan", "blue", "purple", "pink", "brown")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "crescent")
TEXTURES = ("solid", "striped", "dotted", "checkered", "hollow")
SIZES = ("small", "medium", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
BACKGROUNDS = ("white", "black", "grey", "navy", "beige", "lavender", "mint", "rose")
PATTERNS = ("plain", "gridded", "speckled")
SPLITS = ("train", "val", "test")
MAX_OBJECTS = 3
OFFSETS = 16  # whole pixels at the usual sizes, so that pictures of all sizes show the same pattern

# All lengths are fractions of the image's width. The three places of a row are far enough apart that "left of" and
# "above" never depend on the jitter.
_RADII = {"small": 0.11, "medium": 0.145, "large": 0.185}
_PLACES = (0.2, 0.5, 0.8)
_JITTER = 0.03
_GAP = 0.01
_TILT = math.radians(12)  # well below the 45 degrees that turn a square into a diamond
_COUNT_WEIGHTS = (0.2, 0.4, 0.4)
_ECHO = 0.3  # how often an object repeats an attribute of the first one, so that plurals ("two circles") occur


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One shape. Lengths and positions are fractions of the image's width, measured from the top left corner."""

    shape: str
    colour: str
    texture: str
    size: str
    row: str
    column: str
    x: float
    y: float
    radius: float
    angle: float  # radians
    phase: float  # offset of the texture, in periods
    brightness: float  # factor on the colour, near 1


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that is drawn. ``(seed, split, index)`` names the scene and rebuilds it."""

    seed: int
    split: str
    index: int
    objects: tuple[SceneObject, ...]
    background: str
    pattern: str
    light: float  # direction of the background's soft gradient, radians
    offset: tuple[int, int]  # shift of the background's pattern down and right, in OFFSETS-ths of the width


def held_out(colour: str, shape: str, texture: str) -> bool:
    """Whether this combination belongs to the test split only.

    One texture in five is held out for every colour and shape, in a Latin square: each single value and each pair
    of values is seen in training, one fifth of the triples never is.
    """
    return (COLOURS.index(colour) + SHAPES.index(shape) + TEXTURES.index(texture)) % len(TEXTURES) == 0


def check_natural(name: str, value: int) -> None:
    """Raises ValueError unless ``value`` is an integer of at least 0; ``name`` is the argument to blame."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}: found {value!r}, expected an integer of at least 0")


def scene(seed: int, split: str, index: int) -> Scene:
    """The scene of this name; the same arguments always give the same scene."""
    check_natural("seed", seed)
    check_natural("index", index)
    if split not in SPLITS:
        raise ValueError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}")
    draws = Draws("scene", seed, split, index)
    count = _draw_count(draws)
    kinds = [_draw_kind(draws, draws.chance(0.5) if split == "test" else False)]
    while len(kinds) < count:
        kinds.append(_echo_or_new(draws, kinds[0], seen_only=split != "test"))
    if split == "test":
        # The promise of the test split: at least one combination no training scene ever showed.
        if not any(held_out(*kind) for kind in kinds):
            kinds[-1] = _draw_kind(draws, unseen=True)
    else:
        kinds = [kind if not held_out(*kind) else _draw_kind(draws, unseen=False) for kind in kinds]
    return Scene(
        seed=seed,
        split=split,
        index=index,
        objects=_place(draws, draws.shuffled(kinds)),
        background=draws.choose(BACKGROUNDS),
        pattern=draws.choose(PATTERNS),
        light=draws.between(0, 2 * math.pi),
        offset=(int(draws.between(0, OFFSETS)), int(draws.between(0, OFFSETS))),
    )


_Kind = tuple[str, str, str]  # colour, shape, texture


def _draw_count(draws: Draws) -> int:
    drawn = draws.between(0, 1)
    for count, weight in enumerate(_COUNT_WEIGHTS, start=1):
        drawn -= weight
        if drawn < 0:
            return count
    return MAX_OBJECTS


def _draw_kind(draws: Draws, unseen: bool) -> _Kind:
    """A combination from the held-out fifth if ``unseen``, from the other four fifths if not."""
    colour, shape = draws.choose(COLOURS), draws.choose(SHAPES)
    return colour, shape, draws.choose([texture for texture in TEXTURES if held_out(colour, shape, texture) == unseen])


def _echo_or_new(draws: Draws, first: _Kind, seen_only: bool) -> _Kind:
    while True:
        kind = (draws.choose(COLOURS), draws.choose(SHAPES), draws.choose(TEXTURES))
        if draws.chance(_ECHO):
            repeated = draws.choose((0, 1, 2))
            kind = tuple(
                old if place == repeated else new for place, (old, new) in enumerate(zip(first, kind, strict=True))
            )
        if not (seen_only and held_out(*kind)):
            return kind


def _place(draws: Draws, kinds: list[_Kind]) -> tuple[SceneObject, ...]:
    """Objects in different cells of a 3 x 3 grid, redrawn until none touches another."""
    cells = [(row, column) for row in range(len(ROWS)) for column in range(len(COLUMNS))]
    while True:
        objects = tuple(
            _object(draws, kind, row, column) for kind, (row, column) in zip(kinds, draws.shuffled(cells), strict=False)
        )
        pairs = ((a, b) for number, a in enumerate(objects) for b in objects[:number])
        if all(math.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius + _GAP for a, b in pairs):
            return objects


def _object(draws: Draws, kind: _Kind, row: int, column: int) -> SceneObject:
    colour, shape, texture = kind
    size = draws.choose(SIZES)
    radius = _RADII[size] * draws.between(0.95, 1.05)
    x, y = (min(max(_PLACES[place] + draws.between(-_JITTER, _JITTER), radius), 1 - radius) for place in (column, row))
    return SceneObject(
        shape=shape,
        colour=colour,
        texture=texture,
        size=size,
        row=ROWS[row],
        column=COLUMNS[column],
        x=x,
        y=y,
        radius=radius,
        angle=draws.between(-_TILT, _TILT),
        phase=draws.between(0, 1),
        brightness=draws.between(0.88, 1.06),
    )
