"""Scenes of the demo set: a cluttered image and the boxes of its objects.

Uses only exact arithmetic and no library for drawing, so that a scene is identical to the pixel on
every machine. Shapes: H W pixels, n objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.datasets.demo_dice import Dice
from utils.datasets.demo_shapes import CLASSES, DISTRACTORS, Shape, Stamp, draw

Canvas = NDArray[np.float64]  # (H, W, 3), 0..255
Colour = NDArray[np.float64]  # (3,), 0..255

LONG_SIDE_PX = 320
MIN_VISIBLE_SHARE = 0.3  # objects less visible than this get no label
MIN_SIDES_PX = (6, 10)  # of the shorter and the longer side of a labelled box
_SHORT_SIDES_PX = (192, 216, 240, 256, 288, 320)
_CLASS_SHAPES = tuple(CLASSES.values())
_EMPTY_PERCENT = 6
# Blue, green, red, in the order of the classes: grey ring, violet, yellow star, red cross, ...
_CLASS_COLOURS = (
    (190.0, 185.0, 180.0),
    (190.0, 60.0, 150.0),
    (60.0, 200.0, 220.0),
    (60.0, 60.0, 205.0),
    (215.0, 130.0, 60.0),
    (70.0, 170.0, 60.0),
)


@dataclass(frozen=True)
class Scene:
    """An image (H, W, 3) uint8 in BGR order, and its objects.

    boxes_xyxy_px: (n, 4) int64, the tight box of the visible part; right and bottom are exclusive.
    class_ids: (n,) int64.
    """

    image: NDArray[np.uint8]
    boxes_xyxy_px: NDArray[np.int64]
    class_ids: NDArray[np.int64]


def make_scene(*seeds: int) -> Scene:
    """Generate the scene of the given seeds."""
    dice = Dice(*seeds)
    width, height = LONG_SIDE_PX, dice.pick(_SHORT_SIDES_PX)
    if dice.chance(35):
        width, height = height, width
    canvas = _background(height, width, dice)
    owner = np.zeros((height, width), np.int64)  # the shape visible at each pixel; 0 is the background
    areas, class_ids = _draw_shapes(canvas, owner, dice)
    canvas = _soften(_light(canvas, dice), dice)
    canvas += dice.uniform(1.0, 10.0) * dice.bell(height, width, 3)
    image = np.clip(canvas, 0.0, 255.0).astype(np.uint8)
    boxes, kept = _visible_boxes(owner, areas, class_ids)
    return Scene(image, boxes, kept)


def _colour(dice: Dice) -> Colour:
    return dice.uniforms(20.0, 235.0, 3)


def _contrasting(colour: Colour, least: float, dice: Dice) -> Colour:
    """Draw a colour that differs from `colour` by at least `least` in some channel."""
    other = _colour(dice)
    while np.abs(other - colour).max() < least:
        other = _colour(dice)
    return other


def _object_colour(beneath: Colour, class_id: int, dice: Dice) -> Colour:
    """Draw a shape's colour: near its class's for 85% of objects, else contrasting with `beneath`."""
    if class_id < 0 or dice.chance(15):
        return _contrasting(beneath, 55.0, dice)
    return np.clip(np.array(_CLASS_COLOURS[class_id]) + dice.uniforms(-30.0, 30.0, 3), 10.0, 245.0)


def _background(height: int, width: int, dice: Dice) -> Canvas:
    first = _colour(dice)
    second = np.clip(first + dice.uniforms(-70.0, 70.0, 3), 10.0, 245.0)
    blend = dice.pick((_slope, _clouds, _checks, _patches))(height, width, dice)
    canvas = first + (second - first) * blend[:, :, None]
    strength = dice.uniform(0.0, 45.0)
    return np.asarray(canvas + strength * (_clouds(height, width, dice)[:, :, None] - 0.5))


def _slope(height: int, width: int, dice: Dice) -> NDArray[np.float64]:
    """Return a gradient in a random direction, 0..1 (H, W)."""
    cosine, sine = dice.direction()
    x, y = np.arange(width) / width - 0.5, np.arange(height) / height - 0.5
    return np.clip(0.5 + 0.7 * (x[None, :] * cosine + y[:, None] * sine), 0.0, 1.0)


def _clouds(height: int, width: int, dice: Dice) -> NDArray[np.float64]:
    """Return smooth random patches, coarse and fine ones, 0..1 (H, W)."""
    coarse, fine = dice.between(40, 120), dice.between(6, 24)
    share = dice.uniform(0.2, 0.7)
    field = (1.0 - share) * _field(height, width, coarse, dice)
    return field + share * _field(height, width, fine, dice)


def _field(height: int, width: int, cell: int, dice: Dice) -> NDArray[np.float64]:
    """Return random values on a grid of `cell` pixels, smoothly interpolated, 0..1 (H, W)."""
    rows, row_share = _grid_positions(height, cell)
    columns, column_share = _grid_positions(width, cell)
    knots = dice.uniforms(0.0, 1.0, int(rows[-1]) + 2, int(columns[-1]) + 2)
    along = knots[rows] + (knots[rows + 1] - knots[rows]) * row_share[:, None]
    return np.asarray(along[:, columns] + (along[:, columns + 1] - along[:, columns]) * column_share[None, :])


def _grid_positions(length: int, cell: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    pixels = np.arange(length)
    share = (pixels % cell) / cell
    return pixels // cell, share * share * (3.0 - 2.0 * share)


def _checks(height: int, width: int, dice: Dice) -> NDArray[np.float64]:
    """Return tiles or stripes in a random direction, 0 or 1 (H, W)."""
    cosine, sine = dice.direction()
    cell = dice.uniform(10.0, 50.0)
    x, y = np.arange(width)[None, :] / cell, np.arange(height)[:, None] / cell
    tiles = np.floor(x * cosine + y * sine)
    if dice.chance(60):
        tiles = tiles + np.floor(y * cosine - x * sine)
    return np.asarray(tiles - 2.0 * np.floor(tiles / 2.0))


def _patches(height: int, width: int, dice: Dice) -> NDArray[np.float64]:
    """Return overlapping rectangles of different tones, 0..1 (H, W)."""
    field = np.full((height, width), dice.uniform(0.0, 1.0))
    for _ in range(dice.between(4, 14)):
        left, top = dice.below(width), dice.below(height)
        right, bottom = left + dice.between(20, 160), top + dice.between(20, 160)
        field[top:bottom, left:right] = dice.uniform(0.0, 1.0)
    return field


@dataclass(frozen=True)
class _Plan:
    """A shape to draw; `class_id` is -1 for a distractor."""

    shape: Shape
    class_id: int
    radius: float


def _plans(dice: Dice) -> list[_Plan]:
    """Draw the shapes of a scene at random, in drawing order."""
    objects = 0 if dice.chance(_EMPTY_PERCENT) else dice.between(1, 6) + dice.pick((0, 0, 0, 2, 5))
    kinds = [dice.below(len(_CLASS_SHAPES)) for _ in range(objects)]
    plans = [_Plan(_CLASS_SHAPES[kind], kind, _radius(dice)) for kind in kinds]
    for _ in range(dice.between(0, 4)):
        # At any position in the order: below the objects or on top of them.
        distractor = _Plan(dice.pick(DISTRACTORS), -1, 0.8 * _radius(dice))
        plans.insert(dice.below(len(plans) + 1), distractor)
    return plans


def _radius(dice: Dice) -> float:
    """Draw half the longer side of a shape in pixels; one in four is small."""
    if dice.chance(25):
        return dice.uniform(6.0, 14.0)
    share = dice.uniform(0.0, 1.0)
    return 14.0 + 62.0 * share * (0.4 + 0.6 * share)


def _draw_shapes(canvas: Canvas, owner: NDArray[np.int64], dice: Dice) -> tuple[list[int], list[int]]:
    """Draw a scene's shapes; returns the full area in pixels and the class of each, background first."""
    areas, class_ids = [0], [-1]
    height, width = owner.shape
    last: tuple[float, float] | None = None
    for plan in _plans(dice):
        reach = 0.6 * plan.radius
        place = (dice.uniform(reach, width - reach), dice.uniform(reach, height - reach))
        if last is not None and dice.chance(25):  # a crowd: near the previous shape
            place = (last[0] + dice.uniform(-45.0, 45.0), last[1] + dice.uniform(-45.0, 45.0))
        stamp = draw(plan.shape, place, plan.radius, dice)
        class_ids.append(plan.class_id)
        areas.append(int((stamp.cover > 0.5).sum()))
        _paint(canvas, owner, stamp, plan.class_id, len(areas) - 1, dice)
        last = place
    return areas, class_ids


def _paint(
    canvas: Canvas, owner: NDArray[np.int64], stamp: Stamp, stamp_class: int, number: int, dice: Dice
) -> None:
    """Blend a shape into the image in two colours, shaded, sometimes with a drop shadow."""
    base = _object_colour(_local_colour(canvas, stamp), stamp_class, dice)
    second = _contrasting(base, 60.0, dice)
    if dice.chance(30):
        offset = dice.between(1, 4)
        _blend(canvas, stamp, 0.45 * stamp.cover, np.zeros(3), offset)
    shade = dice.uniform(0.0, 0.5) * (_slope(len(stamp.cover), len(stamp.cover), dice) - 0.5) + 1.0
    tint = base + (second - base) * stamp.marks[:, :, None]
    _blend(canvas, stamp, stamp.cover * dice.uniform(0.88, 1.0), tint * shade[:, :, None])
    inside, patch = _overlap(owner.shape, stamp)
    target = owner[inside]
    target[stamp.cover[patch] > 0.5] = number


def _local_colour(canvas: Canvas, stamp: Stamp) -> Colour:
    half = stamp.cover.shape[0] // 2
    row = min(max(stamp.top + half, 0), canvas.shape[0] - 1)
    column = min(max(stamp.left + half, 0), canvas.shape[1] - 1)
    return np.asarray(canvas[row, column])


def _overlap(
    shape: tuple[int, ...], stamp: Stamp, offset: int = 0
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the slices of an image (H, W, ...) that a stamp covers, and those of the visible part of it."""
    side = stamp.cover.shape[0]
    inside, patch = [], []
    for start, length in ((stamp.top + offset, shape[0]), (stamp.left + offset, shape[1])):
        low, high = min(max(start, 0), length), max(min(start + side, length), 0)
        inside.append(slice(low, max(low, high)))
        patch.append(slice(low - start, max(low, high) - start))
    return (inside[0], inside[1]), (patch[0], patch[1])


def _blend(
    canvas: Canvas, stamp: Stamp, alpha: NDArray[np.float64], colour: NDArray[np.float64], offset: int = 0
) -> None:
    """Blend `colour`, (3,) or (n, n, 3), over the image with opacity `alpha` (n, n)."""
    inside, patch = _overlap(canvas.shape, stamp, offset)
    source = colour[patch] if colour.ndim == 3 else colour
    target = canvas[inside]
    target += (source - target) * alpha[patch][:, :, None]


def _light(canvas: Canvas, dice: Dice) -> Canvas:
    """Apply coloured, uneven lighting and a random contrast."""
    height, width = canvas.shape[:2]
    lamp = 1.0 + dice.uniform(0.0, 1.1) * (_slope(height, width, dice) - 0.5)
    if dice.chance(25):
        lamp = lamp * (1.0 - dice.uniform(0.2, 0.5) * (_field(height, width, 90, dice) > 0.6))
    cast = dice.uniforms(0.85, 1.1, 3) * dice.uniform(0.65, 1.4)
    contrast = dice.uniform(0.6, 1.0)
    grey = dice.uniform(60.0, 190.0)
    return np.asarray((grey + (canvas - grey) * contrast) * lamp[:, :, None] * cast)


def _soften(canvas: Canvas, dice: Dice) -> Canvas:
    """Apply defocus or motion blur to 60% of the images."""
    kind = dice.below(10)
    if kind < 4:  # the sharp ones
        return canvas
    for _ in range(dice.between(1, 3)):
        if kind != 4:
            canvas = _smooth(canvas)
        if kind != 5:
            canvas = _smooth(canvas.transpose(1, 0, 2)).transpose(1, 0, 2)
    return canvas


def _smooth(canvas: Canvas) -> Canvas:
    """Blur vertically: average each pixel, with weight 2, with those above and below, with weight 1."""
    above, below = canvas[:1], canvas[-1:]
    padded = np.concatenate([above, canvas, below])
    return np.asarray((padded[:-2] + padded[2:] + 2.0 * canvas) * 0.25)


def _visible_boxes(
    owner: NDArray[np.int64], areas: list[int], class_ids: list[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    seen = np.bincount(owner.ravel(), minlength=len(areas))
    boxes, kept = [], []
    for number, class_id in enumerate(class_ids):
        if class_id < 0 or seen[number] < MIN_VISIBLE_SHARE * areas[number]:
            continue
        rows = np.flatnonzero((owner == number).any(1))
        columns = np.flatnonzero((owner == number).any(0))
        width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
        if min(width, height) >= MIN_SIDES_PX[0] and max(width, height) >= MIN_SIDES_PX[1]:
            boxes.append((columns[0], rows[0], columns[0] + width, rows[0] + height))
            kept.append(class_id)
    return np.array(boxes, np.int64).reshape(-1, 4), np.array(kept, np.int64)
