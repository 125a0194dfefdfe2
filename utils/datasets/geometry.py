"""Random affine and perspective warps of a canvas, applied to its images and boxes.

Pixel coordinates are continuous, 0 at the left and upper edge of the first pixel, so the centre of
pixel i is i + 0.5. Boxes are (n, 5): class, then x1, y1, x2, y2 in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.batch import FILL
from utils.datasets.images import Image

Boxes = NDArray[np.float32]
Matrix = NDArray[np.float64]

_MIN_SIDE_PX = 2.0
_MIN_AREA_RATIO = 0.1
_MAX_ASPECT = 100.0
_EPS = 1e-9
_SNAP_CANDIDATES = 8


@dataclass(frozen=True)
class WarpSettings:
    """Ranges of a random warp: angles in degrees from U(-x, x); see `AugmentSettings`."""

    degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    perspective: float = 0.0


@dataclass(frozen=True)
class Warp:
    """A homography (3, 3) from canvas to output pixels and its scale factor."""

    matrix: Matrix
    scale: float

    @property
    def is_upright(self) -> bool:
        """Whether rectangles stay axis-aligned rectangles: only scaling and translation."""
        return not (self.matrix - np.diag(self.matrix.diagonal()))[:, :2].any()


@dataclass(frozen=True)
class Tile:
    """An image placed on a canvas, described before it is loaded.

    number: index of the image.
    origin_xy: canvas position of its upper left corner; may lie outside of the canvas.
    span_xyxy: the part of the canvas that it covers, whole pixels.
    boxes: its labels in canvas pixels, clipped to the canvas.
    """

    number: int
    origin_xy: tuple[int, int]
    span_xyxy: tuple[int, int, int, int]
    boxes: Boxes


def random_warp(
    settings: WarpSettings, canvas_wh: tuple[int, int], out_wh: tuple[int, int], rng: np.random.Generator
) -> Warp:
    """Draw a random warp: centring, perspective, rotation with scale, shear, translation, in this order."""
    centre = _translation(-canvas_wh[0] / 2, -canvas_wh[1] / 2)
    perspective = np.eye(3)
    perspective[2, :2] = rng.uniform(-settings.perspective, settings.perspective, 2)
    angle = math.radians(rng.uniform(-settings.degrees, settings.degrees))
    scale = rng.uniform(1 - settings.scale, 1 + settings.scale)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    rotation = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    shear = np.eye(3)
    shear[0, 1], shear[1, 0] = np.tan(np.radians(rng.uniform(-settings.shear, settings.shear, 2)))
    shift = rng.uniform(0.5 - settings.translate, 0.5 + settings.translate, 2)
    translation = _translation(shift[0] * out_wh[0], shift[1] * out_wh[1])
    return Warp(translation @ shear @ rotation @ perspective @ centre, scale)


def warp_canvas(
    tiles: Sequence[Tile], warp: Warp, out_hw: tuple[int, int], load: Callable[[int], Image]
) -> tuple[Image, Boxes]:
    """Warp a canvas that holds the tiles and is FILL elsewhere; returns the image (H, W, 3) and its boxes.

    The canvas itself, four times the size of the output for a mosaic, is never allocated: each tile is
    warped straight into the part of the output that it covers, and a tile that covers none is not even
    loaded.

    Args:
        tiles: the images on the canvas; no two overlap.
        warp: from canvas to output.
        out_hw: height and width of the output, pixels.
        load: returns the image with a number.
    """
    height, width = out_hw
    if warp.is_upright:
        margin = math.ceil(_SNAP_CANDIDATES * warp.scale) + 2
        room = np.full((height + 2 * margin, width + 2 * margin, 3), FILL, np.uint8)
        matrices = [_draw_upright(tile, warp.matrix, room, margin, load) for tile in tiles]
        out = room[margin:-margin, margin:-margin]
    else:
        out = np.full((height, width, 3), FILL, np.uint8)
        matrices = [_draw_freely(tile, warp.matrix, out, load) for tile in tiles]
    shown = [(tile.boxes, matrix) for tile, matrix in zip(tiles, matrices, strict=True) if matrix is not None]
    if not shown:
        return out, np.zeros((0, 5), np.float32)
    boxes = np.concatenate([rows for rows, _ in shown])
    of_boxes = np.repeat([matrix for _, matrix in shown], [len(rows) for rows, _ in shown], axis=0)
    return out, warp_boxes(boxes, of_boxes, warp.scale, out_hw)


def _draw_upright(
    tile: Tile, matrix: Matrix, room: Image, margin: int, load: Callable[[int], Image]
) -> Matrix | None:
    """Scale and translate one tile into `room`, the output with a margin on all sides.

    Resizing between whole pixels is four times as fast as a general warp. The tile's edges move to the
    nearest whole pixel of the output, by at most half a pixel, and its boxes with them. The few pixels
    by which it may extend beyond the output land in the margin.

    Returns the map that was used, None if the tile is not visible.
    """
    x1, y1, x2, y2 = tile.span_xyxy
    # As Python floats: arithmetic on single NumPy scalars takes three times as long.
    across = _snap(x1, x2, matrix[0, 0].item(), matrix[0, 2].item(), room.shape[1] - 2 * margin)
    down = _snap(y1, y2, matrix[1, 1].item(), matrix[1, 2].item(), room.shape[0] - 2 * margin)
    if across is None or down is None:
        return None
    left, top = tile.origin_xy
    part = load(tile.number)[down.start - top : down.stop - top, across.start - left : across.stop - left]
    place = room[
        down.target_start + margin : down.target_stop + margin,
        across.target_start + margin : across.target_stop + margin,
    ]
    cv2.resize(part, place.shape[1::-1], dst=place, interpolation=cv2.INTER_LINEAR)
    return np.array([[across.factor, 0, across.shift], [0, down.factor, down.shift], [0, 0, 1]])


@dataclass(frozen=True)
class _Snapped:
    """An interval of the canvas and its image in the output along one axis, both in whole pixels."""

    start: int
    stop: int
    target_start: int
    target_stop: int

    @property
    def factor(self) -> float:
        return (self.target_stop - self.target_start) / (self.stop - self.start)

    @property
    def shift(self) -> float:
        return self.target_start - self.factor * self.start


def _snap(start: int, stop: int, factor: float, shift: float, length: int) -> _Snapped | None:
    """Snap the part of the canvas interval [start, stop) visible in the output [0, length); None if none is.

    A tile that extends beyond the output is cut near its border, where the map comes closest to a
    whole pixel.
    """
    low, high = math.floor(-shift / factor), math.ceil((length - shift) / factor)
    if low > start:
        start = _closest(range(low, max(low - _SNAP_CANDIDATES, start), -1), factor, shift)
    if high < stop:
        stop = _closest(range(high, min(high + _SNAP_CANDIDATES, stop)), factor, shift)
    first, last = round(start * factor + shift), round(stop * factor + shift)
    if start >= stop or max(first, 0) >= min(last, length):
        return None
    return _Snapped(start, stop, first, last)


def _closest(candidates: range, factor: float, shift: float) -> int:
    best, smallest = candidates[0], 1.0
    for place in candidates:
        past = (place * factor + shift) % 1.0
        distance = past if past < 1.0 - past else 1.0 - past
        if distance < smallest:
            best, smallest = place, distance
    return best


def _draw_freely(tile: Tile, matrix: Matrix, out: Image, load: Callable[[int], Image]) -> Matrix | None:
    """Warp one tile with its edge pixels replicated, and copy it to where it covers the output.

    Returns the map, None if the tile is not visible.
    """
    region = _covered_region(tile, matrix, out)
    if region is None:
        return None
    x1, y1, x2, y2 = region
    (left, top), (start_x, start_y, stop_x, stop_y) = tile.origin_xy, tile.span_xyxy
    part = load(tile.number)[start_y - top : stop_y - top, start_x - left : stop_x - left]
    to_region = _for_indices(_translation(-x1, -y1) @ matrix @ _translation(start_x, start_y))
    wh = (x2 - x1, y2 - y1)
    whole = np.full(part.shape[:2], 255, np.uint8)
    covered = cv2.warpPerspective(whole, to_region, wh, flags=cv2.INTER_NEAREST)
    picture = cv2.warpPerspective(
        part, to_region, wh, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    cv2.copyTo(picture, covered, out[y1:y2, x1:x2])
    return matrix


def _covered_region(tile: Tile, matrix: Matrix, out: Image) -> tuple[int, int, int, int] | None:
    """Return the rectangle x1, y1, x2, y2 of the output that a tile can cover, None if there is none."""
    height, width = out.shape[:2]
    x1, y1, x2, y2 = tile.span_xyxy
    corners = np.array([[x1, y1, 1], [x2, y1, 1], [x1, y2, 1], [x2, y2, 1]]) @ matrix.T
    if corners[:, 2].min() <= _EPS:
        return 0, 0, width, height  # a strong perspective puts part of the tile behind the camera
    places = corners[:, :2] / corners[:, 2:]
    low, high = np.floor(places.min(0)), np.ceil(places.max(0))
    region = np.concatenate([low, high]).clip(0, [width, height] * 2).astype(int)
    if region[0] >= region[2] or region[1] >= region[3]:
        return None
    return int(region[0]), int(region[1]), int(region[2]), int(region[3])


def _translation(x: float, y: float) -> Matrix:
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def _for_indices(matrix: Matrix) -> Matrix:
    """Convert a map for OpenCV, whose coordinates are 0 at the centre of the first pixel."""
    return _translation(-0.5, -0.5) @ matrix @ _translation(0.5, 0.5)


def warp_boxes(boxes: Boxes, matrices: Matrix, scale: float, out_hw: tuple[int, int]) -> Boxes:
    """Warp boxes and clip them to the output, dropping those of which too little is left.

    Args:
        boxes: (n, 5).
        matrices: a map (3, 3), or one for each box (n, 3, 3).
        scale: scale factor of the maps.
        out_hw: height and width of the output, pixels.
    """
    if not len(boxes):
        return boxes
    corners = np.ones((len(boxes), 4, 3))
    corners[..., :2] = boxes[:, [1, 2, 3, 4, 1, 4, 3, 2]].reshape(-1, 4, 2)
    moved = corners @ np.swapaxes(matrices, -1, -2)
    places = moved[..., :2] / moved[..., 2:]
    after = np.concatenate([places.min(1), places.max(1)], 1)
    after = after.clip(0, [out_hw[1], out_hw[0]] * 2)
    keep = box_candidates(boxes[:, 1:] * scale, after)
    return np.concatenate([boxes[:, :1], after], 1)[keep].astype(np.float32)


def box_candidates(before: NDArray[np.floating], after: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Return a mask (n,) of the boxes (n, 4) that are still worth learning after augmentation.

    Both sides above 2 px, more than a tenth of the area left, neither side 100 times the other.
    """
    size_before, size_after = before[:, 2:] - before[:, :2], after[:, 2:] - after[:, :2]
    area_ratio = size_after.prod(1) / (size_before.prod(1) + _EPS)
    aspect = size_after.max(1) / (size_after.min(1) + _EPS)
    keep = (size_after > _MIN_SIDE_PX).all(1) & (area_ratio > _MIN_AREA_RATIO) & (aspect < _MAX_ASPECT)
    return np.asarray(keep, np.bool_)
