"""Drawing: a scene becomes pixels. Shapes are signed distances, so edges are antialiased without supersampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from mmd2v.data.synthetic.world import OFFSETS, Scene, SceneObject

MIN_SIZE = 16

_RGB = {
    "red": (225, 25, 30),
    "orange": (255, 135, 0),
    "yellow": (250, 225, 30),
    "lime": (160, 240, 40),
    "green": (15, 130, 45),
    "cyan": (30, 205, 225),
    "blue": (30, 75, 235),
    "purple": (130, 30, 185),
    "pink": (255, 105, 190),
    "brown": (130, 75, 25),
    "white": (244, 244, 244),
    "black": (14, 14, 14),
    "grey": (128, 128, 128),
    "navy": (14, 22, 78),
    "beige": (225, 205, 165),
    "lavender": (200, 185, 240),
    "mint": (175, 230, 200),
    "rose": (240, 190, 190),
}
_COLOUR = {name: np.array(rgb, np.float32) for name, rgb in _RGB.items()}
_REACH = 1.25  # no shape extends further than this many radii from its centre
_RIM = 0.015  # image widths
_SPECKLES = 60
_GRID_LINES = 7


def render(scene: Scene, size: int) -> np.ndarray:
    """The scene as an RGB picture, uint8 ``[size, size, 3]``; ``size`` in pixels."""
    if isinstance(size, bool) or not isinstance(size, int) or size < MIN_SIZE:
        raise ValueError(f"size: found {size!r}, expected an integer of at least {MIN_SIZE} (pixels)")
    canvas = _background(scene, size)
    for thing in scene.objects:
        _paint(canvas, thing, size)
    return (canvas + 0.5).clip(0, 255).astype(np.uint8)


def _background(scene: Scene, size: int) -> np.ndarray:
    """Float ``[size, size, 3]``: one colour under a soft gradient, with a faint pattern."""
    x, y = _grid(size)
    shade = 1 + 0.08 * (math.cos(scene.light) * x + math.sin(scene.light) * y)
    colour = _COLOUR[scene.background]
    if scene.pattern != "plain":
        # The pattern moves away from the background's own brightness, so that it shows on black as on white.
        towards = 0 if colour.mean() > 110 else 255
        step = 0.25 * float(towards - colour.mean())
        mask = np.roll(
            _pattern_mask(scene.pattern, size), [part * size // OFFSETS for part in scene.offset], axis=(0, 1)
        )
        return colour * shade[..., None] + step * mask[..., None]
    return colour * shade[..., None]


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres, x and y in [-1, 1], each float ``[size, size]``."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return (2 * x + 1) / size - 1, (2 * y + 1) / size - 1


@lru_cache(maxsize=16)
def _pattern_mask(pattern: str, size: int) -> np.ndarray:
    """Coverage of the background's pattern, float ``[size, size]`` in [0, 1], periodic in both directions."""
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size
    if pattern == "gridded":
        distance = np.minimum(*(np.abs((_GRID_LINES * axis) % 1 - 0.5) / _GRID_LINES for axis in (x, y)))
        return _coverage(distance - 0.006, size)
    # A low-discrepancy sequence: evenly spread yet irregular, and no seed to carry.
    number = np.arange(1, _SPECKLES + 1)
    centres = np.stack([number * 0.7548776662 % 1, number * 0.5698402910 % 1])
    dx, dy = (np.abs(axis[..., None] - centre) for axis, centre in zip((x, y), centres, strict=True))
    distance = np.hypot(np.minimum(dx, 1 - dx), np.minimum(dy, 1 - dy)).min(-1)
    return _coverage(distance - 0.012, size)


def _coverage(distance: np.ndarray, size: int) -> np.ndarray:
    """Share of each pixel inside an edge; ``distance`` in image widths, negative inside."""
    return np.clip(0.5 - distance * size, 0, 1).astype(np.float32)


def _paint(canvas: np.ndarray, thing: SceneObject, size: int) -> None:
    """Draws one object into its own window of the canvas, in place."""
    reach = _REACH * thing.radius
    x0, y0 = (max(0, math.floor((centre - reach) * size)) for centre in (thing.x, thing.y))
    x1, y1 = (min(size, math.ceil((centre + reach) * size)) for centre in (thing.x, thing.y))
    dx = (np.arange(x0, x1, dtype=np.float32) + 0.5) / size - thing.x
    dy = ((np.arange(y0, y1, dtype=np.float32) + 0.5) / size - thing.y)[:, None]
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    u, v = (cos * dx + sin * dy) / thing.radius, (cos * dy - sin * dx) / thing.radius  # unit radius, v downwards
    distance = _SHAPES[thing.shape](u, v) * thing.radius
    alpha = _coverage(distance, size)
    colour = _COLOUR[thing.colour] * thing.brightness
    if thing.texture == "hollow":
        alpha = np.minimum(alpha, 1 - _coverage(distance + 0.018 + 0.1 * thing.radius, size))
        paint = colour
    elif thing.texture == "solid":
        paint = colour
    else:
        mark = _TEXTURES[thing.texture](u * thing.radius, v * thing.radius, thing.radius, thing.phase, size)
        mark *= _coverage(distance + _RIM, size)  # an outline in the first tone: no stripe may cut the shape in pieces
        bright = float(colour @ np.array([0.3, 0.59, 0.11], np.float32)) > 150
        second = 0.3 * colour + 0.7 * np.float32(0 if bright else 255)
        paint = colour + mark[..., None] * (second - colour)
    window = canvas[y0:y1, x0:x1]
    window += alpha[..., None] * (paint - window)


# Shapes: distance to the edge in radii, negative inside. u runs to the right, v downwards.
# Factors make the shapes of one size look about equally large.


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) - 0.95


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.82


def _diamond(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (np.abs(u) * 1.25 + np.abs(v) - 1.15) / 1.6


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(v - 0.7, np.abs(u) * 0.87 - (v + 1.1) * 0.49)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 1.0, v - 0.42), np.maximum(v - 1.0, u - 0.42))


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Fold the plane onto one half of one of the five points, then measure to that point's single edge.
    wedge = 2 * math.pi / 5
    angle = np.abs((np.arctan2(u, -v) + wedge / 2) % wedge - wedge / 2)
    length = np.hypot(u, v)
    along, across = length * np.cos(angle), length * np.sin(angle)
    tip, notch = 1.2, 0.57
    notch_x, notch_y = notch * math.cos(wedge / 2), notch * math.sin(wedge / 2)
    edge = math.hypot(tip - notch_x, notch_y)
    return ((along - tip) * notch_y + across * (tip - notch_x)) / edge


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u = np.abs(u)
    lobe = np.hypot(u - 0.47, v + 0.35) - 0.55
    point = np.maximum((u * 0.76 + v * 0.65) - 0.66, -v - 0.32)
    return np.minimum(lobe, point)


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(u, v) - 1.05, 0.82 - np.hypot(u - 0.62, v))


_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "crescent": _crescent,
}


# Textures: coverage of the second tone in [0, 1]. u and v in image widths. The period grows slower than the object,
# so that a texture stays visible on a small object and fine on a large one.


def _period(radius: float) -> float:
    return 0.06 + 0.2 * radius


def _stripes(u: np.ndarray, v: np.ndarray, radius: float, phase: float, size: int) -> np.ndarray:
    period = _period(radius)
    distance = (np.abs((v / period + phase) % 1 - 0.5) - 0.25) * period
    return _coverage(distance, size)


def _dots(u: np.ndarray, v: np.ndarray, radius: float, phase: float, size: int) -> np.ndarray:
    period = 1.1 * _period(radius)
    du, dv = ((axis / period + phase) % 1 - 0.5 for axis in (u, v))
    return _coverage((np.hypot(du, dv) - 0.33) * period, size)


def _checks(u: np.ndarray, v: np.ndarray, radius: float, phase: float, size: int) -> np.ndarray:
    period = 1.3 * _period(radius)
    du, dv = ((np.abs((axis / period + phase) % 1 - 0.5) - 0.25) * period for axis in (u, v))
    a, b = _coverage(du, size), _coverage(dv, size)
    return a + b - 2 * a * b


_TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, float, float, int], np.ndarray]] = {
    "striped": _stripes,
    "dotted": _dots,
    "checkered": _checks,
}
