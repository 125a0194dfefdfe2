"""Random affine and perspective warps of a canvas, and the drawing of its images.

Pixel coordinates are continuous, 0 at the left and upper edge of the first pixel, so the centre of
pixel i is i + 0.5.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from cv2.typing import MatLike
from numpy.typing import NDArray

from utils.batch import FILL
from utils.datasets.colour import ColourJitter
from utils.datasets.images import Image

Matrix = NDArray[np.float64]
# Returns the image with a number; it may lack rows beyond the given number of them.
Load = Callable[[int, int], Image]
Place = tuple[slice, slice]  # rows and columns

_EPS = 1e-9
_SNAP_CANDIDATES = 8
_FLIP_CODES = {(True, False): 0, (False, True): 1, (True, True): -1}  # OpenCV's


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
    """A homography (3, 3) from canvas to output pixels and its scale factor.

    flips: whether the output is then flipped vertically and horizontally.
    """

    matrix: Matrix
    scale: float
    flips: tuple[bool, bool] = (False, False)

    @property
    def is_upright(self) -> bool:
        """Whether it only scales and translates."""
        return keep_upright(self.matrix)


@dataclass(frozen=True)
class Tile:
    """An image placed on a canvas, described before it is loaded.

    number: index of the image.
    wh: its width and height, pixels.
    origin_xy: canvas position of its upper left corner; may lie outside of the canvas.
    span_xyxy: the part of the canvas that it covers, whole pixels.
    """

    number: int
    wh: tuple[int, int]
    origin_xy: tuple[int, int]
    span_xyxy: tuple[int, int, int, int]


def keep_upright(matrices: Matrix) -> bool:
    """Whether rectangles stay axis-aligned rectangles under all the maps (..., 3, 3)."""
    return not matrices[..., [0, 1, 2, 2], [1, 0, 0, 1]].any()


def random_warp(
    settings: WarpSettings, canvas_wh: tuple[int, int], out_wh: tuple[int, int], rng: np.random.Generator
) -> Warp:
    """Draw a random warp: centring, perspective, rotation with scale, shear, translation, in this order."""
    (x_mid, y_mid), most = (canvas_wh[0] / 2, canvas_wh[1] / 2), settings.perspective
    px, py = rng.uniform(-most, most, 2).tolist()
    perspective = np.array([[1, 0, -x_mid], [0, 1, -y_mid], [px, py, 1 - px * x_mid - py * y_mid]])
    angle = math.radians(rng.uniform(-settings.degrees, settings.degrees))
    scale = rng.uniform(1 - settings.scale, 1 + settings.scale)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    x_shear, y_shear = (math.tan(math.radians(x)) for x in rng.uniform(-settings.shear, settings.shear, 2))
    x_shift, y_shift = rng.uniform(0.5 - settings.translate, 0.5 + settings.translate, 2).tolist()
    affine = np.array(
        [
            [cos - x_shear * sin, sin + x_shear * cos, x_shift * out_wh[0]],
            [y_shear * cos - sin, y_shear * sin + cos, y_shift * out_wh[1]],
            [0, 0, 1],
        ]
    )
    return Warp(affine @ perspective, scale)


def warp_canvas(
    tiles: Sequence[Tile], warp: Warp, out: Image, load: Load, colour: ColourJitter | None = None
) -> list[tuple[Tile, Matrix]]:
    """Warp a canvas that holds the tiles and is FILL elsewhere.

    The canvas itself, four times the size of the output for a mosaic, is never allocated: each tile is
    warped straight into the part of the output that it covers, and a tile that covers none is not even
    loaded.

    Args:
        tiles: the images on the canvas; no two overlap.
        warp: from canvas to output.
        out: (H, W, 3), overwritten with the output.
        load: the source of images.
        colour: changes the colours, and makes the output RGB; None: it is BGR, like the images.

    Returns:
        The visible tiles, each with its map (3, 3) from the canvas to the output.
    """
    fill = FILL if colour is None else colour.fill
    if warp.is_upright:
        drawn = [(tile, _draw_upright(tile, warp, out, load, colour)) for tile in tiles]
        shown = [(tile, *found) for tile, found in drawn if found is not None]
        _fill_around([place for _, _, place in shown], fill, out)
        return [(tile, matrix) for tile, matrix, _ in shown]
    out[:] = fill
    matrices = [_draw_freely(tile, warp, out, load, colour) for tile in tiles]
    return [(tile, matrix) for tile, matrix in zip(tiles, matrices, strict=True) if matrix is not None]


def _draw_upright(
    tile: Tile, warp: Warp, out: Image, load: Load, colour: ColourJitter | None
) -> tuple[Matrix, Place] | None:
    """Scale, translate and flip one tile.

    Resizing between whole pixels is four times as fast as a general warp. The tile's edges move to the
    nearest whole pixel of the output, by at most half a pixel, and its boxes with them. The few pixels
    by which it may extend beyond the output are cut off.

    Returns the map that was used and the place in the output, None if the tile is not visible.
    """
    (x1, y1, x2, y2), (height, width), matrix = tile.span_xyxy, out.shape[:2], warp.matrix
    # As Python floats: arithmetic on single NumPy scalars takes three times as long.
    across = _snap(x1, x2, matrix[0, 0].item(), matrix[0, 2].item(), width)
    down = _snap(y1, y2, matrix[1, 1].item(), matrix[1, 2].item(), height)
    if across is None or down is None:
        return None
    left, top = tile.origin_xy
    part = load(tile.number, down.stop - top)
    part = part[down.start - top : down.stop - top, across.start - left : across.stop - left]
    wh = (across.target_stop - across.target_start, down.target_stop - down.target_start)
    image = _warped(part, wh, lambda image: cv2.resize(image, wh, interpolation=cv2.INTER_LINEAR), colour)
    (rows, to_rows), (columns, to_columns) = down.cut(height, warp.flips[0]), across.cut(width, warp.flips[1])
    if any(warp.flips):
        cv2.flip(image[rows, columns], _FLIP_CODES[warp.flips], dst=out[to_rows, to_columns])
    else:
        out[to_rows, to_columns] = image[rows, columns]
    (y_factor, y_shift), (x_factor, x_shift) = (
        down.factor_and_shift(height, warp.flips[0]),
        across.factor_and_shift(width, warp.flips[1]),
    )
    used = np.array([[x_factor, 0.0, x_shift], [0.0, y_factor, y_shift], [0.0, 0.0, 1.0]])
    return used, (to_rows, to_columns)


def _fill_around(places: list[Place], level: int, out: Image) -> None:
    """Fill what no place covers: filling everything first would write most of the output twice."""
    edges = sorted({0, out.shape[0], *(edge for rows, _ in places for edge in (rows.start, rows.stop))})
    for top, bottom in itertools.pairwise(edges):
        across = (columns for rows, columns in places if rows.start <= top and bottom <= rows.stop)
        free_from = 0
        for columns in sorted(across, key=lambda columns: columns.start):
            out[top:bottom, free_from : columns.start] = level
            free_from = columns.stop
        out[top:bottom, free_from:] = level


def _flipped(matrix: Matrix, flips: tuple[bool, bool], out_hw: tuple[int, int]) -> Matrix:
    """Return a map to an output of `out_hw` pixels followed by flips."""
    if not any(flips):
        return matrix
    (down, across), (height, width) = flips, out_hw
    mirror = np.array([[1 - 2 * across, 0, across * width], [0, 1 - 2 * down, down * height], [0, 0, 1]])
    return mirror @ matrix


def _warped(
    part: Image, wh: tuple[int, int], warp: Callable[[Image], MatLike], colour: ColourJitter | None
) -> Image:
    """Return a part of an image warped to a width and height, with changed colours.

    Colours are changed before or after, whenever there are fewer pixels: augmentation spends most of its
    time on them. Before an enlargement the pixels that are interpolated between two different colours come
    out slightly different than after it, since hue and saturation are not linear.
    """
    if colour is not None and part.shape[0] * part.shape[1] < wh[0] * wh[1]:
        part, after = np.array(part), None
        colour.paint(part)
    else:
        after = colour
    image = np.asarray(warp(part), np.uint8)
    if after is not None:
        after.paint(image)
    return image


@dataclass(frozen=True)
class _Snapped:
    """An interval of the canvas and its image in the output along one axis, both in whole pixels."""

    start: int
    stop: int
    target_start: int
    target_stop: int

    def factor_and_shift(self, length: int, flipped: bool) -> tuple[float, float]:
        """Return the map from the canvas to an output of this length, flipped or not."""
        factor = (self.target_stop - self.target_start) / (self.stop - self.start)
        shift = self.target_start - factor * self.start
        return (-factor, length - shift) if flipped else (factor, shift)

    def cut(self, length: int, flipped: bool) -> tuple[slice, slice]:
        """Return the part of the target within [0, length), counted from its start and from 0.

        flipped: the latter counts from `length` backwards.
        """
        low, high = max(self.target_start, 0), min(self.target_stop, length)
        place = slice(length - high, length - low) if flipped else slice(low, high)
        return slice(low - self.target_start, high - self.target_start), place


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


def _draw_freely(
    tile: Tile, warp: Warp, out: Image, load: Load, colour: ColourJitter | None
) -> Matrix | None:
    """Warp one tile with its edge pixels replicated, and copy it to where it covers the output.

    Returns the map, None if the tile is not visible.
    """
    matrix = _flipped(warp.matrix, warp.flips, (out.shape[0], out.shape[1]))
    region = _covered_region(tile, matrix, out)
    if region is None:
        return None
    x1, y1, x2, y2 = region
    (left, top), (start_x, start_y, stop_x, stop_y) = tile.origin_xy, tile.span_xyxy
    part = load(tile.number, stop_y - top)[start_y - top : stop_y - top, start_x - left : stop_x - left]
    to_region = _for_indices(_translation(-x1, -y1) @ matrix @ _translation(start_x, start_y))
    wh = (x2 - x1, y2 - y1)
    whole = np.full(part.shape[:2], 255, np.uint8)
    covered = np.asarray(cv2.warpPerspective(whole, to_region, wh, flags=cv2.INTER_NEAREST), np.uint8)
    _uncover_behind(covered, to_region)

    def moved(image: Image) -> MatLike:
        return cv2.warpPerspective(
            image, to_region, wh, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )

    picture = _warped(part, wh, moved, colour)
    cv2.copyTo(picture, covered, out[y1:y2, x1:x2])
    return matrix


def _uncover_behind(covered: NDArray[np.uint8], matrix: Matrix) -> None:
    """Clear the mask (H, W) of a map where it shows, mirrored, what lies behind the camera."""
    (down, across), back = covered.shape, np.linalg.inv(matrix)[2]
    depths = [back @ [x, y, 1] for x in (0, across - 1) for y in (0, down - 1)]
    if min(depths) <= 0:  # linear in x and y, so that the corners tell of the whole
        covered[np.add.outer(back[1] * np.arange(down) + back[2], back[0] * np.arange(across)) <= 0] = 0


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
