"""The shapes of the demo set: the classes to detect, and distractors.

Every shape is a function of coordinates `u` and `v` (n, n), in which its longer side spans -1 to 1.
It returns two masks (n, n): where the shape is, and where it has its second colour. Only exact
operations (+ - * / and comparisons) are used, so the masks are identical on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.datasets.demo_dice import Dice

Coordinates = NDArray[np.float64]
Mask = NDArray[np.bool_]
Masks = tuple[Mask, Mask]
# The third argument is the size of a pixel in these units: finer texture would not be visible.
Shape = Callable[[Coordinates, Coordinates, float, Dice], Masks]

# Cosine and sine of 90, 162, 234, 306 and 18 degrees: the five sides of a star.
_STAR_SIDES = (
    (0.0, 1.0),
    (-0.9510565163, 0.3090169944),
    (-0.5877852523, -0.8090169944),
    (0.5877852523, -0.8090169944),
    (0.9510565163, 0.3090169944),
)
_DIAGONAL = 0.7071067812
_GEAR_AXES = ((1.0, 0.0), (_DIAGONAL, _DIAGONAL), (0.0, 1.0), (-_DIAGONAL, _DIAGONAL))
_SUBPIXELS = 3


def _nothing(u: Coordinates) -> Mask:
    return np.zeros(u.shape, np.bool_)


def _disc(u: Coordinates, v: Coordinates, radius: float) -> Mask:
    return np.asarray(u * u + v * v <= radius * radius)


def _stripes(u: Coordinates, pixel: float, dice: Dice) -> Mask:
    period = max(dice.uniform(0.36, 0.62), 4.0 * pixel)
    position = (u + 4.0 + dice.uniform(0.0, 0.5)) / period
    return np.asarray(position - np.floor(position) < 0.5)


def _ring(u: Coordinates, v: Coordinates, pixel: float, dice: Dice) -> Masks:
    inner = min(dice.uniform(0.5, 0.74), 1.0 - 1.6 * pixel)
    return _disc(u, v, 1.0) & ~_disc(u, v, inner), _nothing(u)


def _striped(u: Coordinates, v: Coordinates, pixel: float, dice: Dice) -> Masks:
    return _disc(u, v / dice.uniform(0.5, 0.9), 1.0), _stripes(u, pixel, dice)


def _star(u: Coordinates, v: Coordinates, pixel: float, dice: Dice) -> Masks:
    # A point is in the pentagram if it lies on the inner side of at least four of its five lines.
    reach = 0.309 * dice.uniform(1.0, 1.25)
    sides = [np.asarray(u * x + v * y <= reach) for x, y in _STAR_SIDES]
    count = sum(side.astype(np.int8) for side in sides)
    return (count >= 4) & _disc(u, v, 1.0), _nothing(u)


def _cross(u: Coordinates, v: Coordinates, pixel: float, dice: Dice) -> Masks:
    arm = max(dice.uniform(0.17, 0.32), 0.8 * pixel)
    length = dice.uniform(0.8, 1.0)
    upright = (np.abs(u) <= arm) & (np.abs(v) <= length)
    return upright | ((np.abs(v) <= arm) & (np.abs(u) <= 1.0)), _nothing(u)


def _crescent(u: Coordinates, v: Coordinates, pixel: float, dice: Dice) -> Masks:
    shift = max(dice.uniform(0.42, 0.68), 2.0 * pixel)
    return _disc(u, v, 1.0) & ~_disc(u - shift, v, dice.uniform(0.8, 0.95)), _nothing(u)


def _lens(u: Coordinates, v: Coordinates, dice: Dice) -> Mask:
    # Two discs through (-1, 0) and (1, 0) whose arcs rise to `bulge`.
    bulge = dice.uniform(0.38, 0.6)
    radius = (1.0 + bulge * bulge) / (2.0 * bulge)
    return _disc(u, v - (radius - bulge), radius) & _disc(u, v + (radius - bulge), radius)


def _leaf(u: Coordinates, v: Coordinates, pixel: float, dice: Dice) -> Masks:
    width = max(dice.uniform(0.04, 0.08), 0.5 * pixel)
    spread = dice.uniform(1.2, 1.8)
    period = max(dice.uniform(0.34, 0.46), 4.0 * pixel)
    along = (u + 4.0 - np.abs(v) / spread) / period
    ribs = along - np.floor(along) < 2.0 * width / period
    return _lens(u, v, dice), (np.abs(v) <= width) | ribs


CLASSES: dict[str, Shape] = {
    "ring": _ring,
    "striped": _striped,
    "star": _star,
    "cross": _cross,
    "crescent": _crescent,
    "leaf": _leaf,
}


def _plain_ellipse(u: Coordinates, v: Coordinates, pixel: float, dice: Dice) -> Masks:
    return _disc(u, v / dice.uniform(0.5, 1.0), 1.0), _nothing(u)


def _plain_lens(u: Coordinates, v: Coordinates, pixel: float, dice: Dice) -> Masks:
    return _lens(u, v, dice), _nothing(u)


def _box(u: Coordinates, v: Coordinates, pixel: float, dice: Dice) -> Masks:
    marks = _stripes(u, pixel, dice) if dice.chance(50) else _nothing(u)
    return (np.abs(u) <= 0.85) & (np.abs(v) <= dice.uniform(0.3, 0.85)), marks


def _open_ring(u: Coordinates, v: Coordinates, pixel: float, dice: Dice) -> Masks:
    band, marks = _ring(u, v, pixel, dice)
    return band & ~((u > 0.0) & (np.abs(v) <= dice.uniform(0.25, 0.5))), marks


def _half_disc(u: Coordinates, v: Coordinates, pixel: float, dice: Dice) -> Masks:
    return _disc(u, v, 1.0) & (v >= dice.uniform(-0.2, 0.2)), _nothing(u)


def _triangle(u: Coordinates, v: Coordinates, pixel: float, dice: Dice) -> Masks:
    return (v <= 0.7) & (np.abs(u) <= dice.uniform(0.35, 0.65) * (v + 0.9)), _nothing(u)


def _tee(u: Coordinates, v: Coordinates, pixel: float, dice: Dice) -> Masks:
    arm = max(dice.uniform(0.17, 0.32), 0.8 * pixel)
    top = (np.abs(u) <= 0.85) & (v <= -0.85 + 2.0 * arm) & (v >= -0.85)
    return top | ((np.abs(u) <= arm) & (np.abs(v) <= 0.85)), _nothing(u)


def _gear(u: Coordinates, v: Coordinates, pixel: float, dice: Dice) -> Masks:
    inside = _disc(u, v, dice.uniform(0.68, 0.8))
    for x, y in _GEAR_AXES:
        inside |= (np.abs(u * x + v * y) <= 0.98) & (np.abs(v * x - u * y) <= 0.17)
    return inside & ~_disc(u, v, dice.uniform(0.0, 0.25)), _nothing(u)


def _stick(u: Coordinates, v: Coordinates, pixel: float, dice: Dice) -> Masks:
    marks = _stripes(u, pixel, dice) if dice.chance(30) else _nothing(u)
    return (np.abs(u) <= 0.95) & (np.abs(v) <= dice.uniform(0.05, 0.16)), marks


DISTRACTORS: tuple[Shape, ...] = (
    _plain_ellipse,
    _plain_lens,
    _box,
    _open_ring,
    _half_disc,
    _triangle,
    _tee,
    _gear,
    _stick,
)


@dataclass(frozen=True)
class Stamp:
    """A shape rasterised on its own square of pixels.

    cover: (n, n) 0..1, the fraction of each pixel that the shape covers.
    marks: (n, n) 0..1, the fraction of the covered area in the second colour.
    left, top: the square's upper left corner in pixels of the image; may be negative.
    """

    cover: NDArray[np.float64]
    marks: NDArray[np.float64]
    left: int
    top: int


def draw(shape: Shape, centre_xy: tuple[float, float], radius: float, dice: Dice) -> Stamp:
    """Rasterise a shape around a centre, randomly rotated and squeezed.

    `centre_xy` and `radius` are in pixels; the shape's longer side is nearly two radii.
    """
    cosine, sine = dice.direction()
    squeeze = dice.uniform(0.75, 1.0)
    left, top = int(np.floor(centre_xy[0] - radius)) - 1, int(np.floor(centre_xy[1] - radius)) - 1
    side = 2 * int(np.ceil(radius)) + 3
    steps = (np.arange(side * _SUBPIXELS) + 0.5) / _SUBPIXELS
    x = (steps + (left - centre_xy[0]))[None, :] / radius
    y = (steps + (top - centre_xy[1]))[:, None] / radius
    u, v = x * cosine + y * sine, (y * cosine - x * sine) / squeeze
    inside, marked = shape(u, v, 1.0 / radius, dice)
    cover, marks = _per_pixel(inside), _per_pixel(inside & marked)
    return Stamp(cover, marks / np.maximum(cover, 0.01), left, top)


def _per_pixel(mask: Mask) -> NDArray[np.float64]:
    """Return the covered fraction (n, n) of each pixel from its 3 x 3 subpixels (3n, 3n)."""
    points = mask.astype(np.int16)
    rows = points[0::3] + points[1::3] + points[2::3]
    return np.asarray((rows[:, 0::3] + rows[:, 1::3] + rows[:, 2::3]) / 9.0)
