"""The boxes of a batch, from the labels of its images.

Computed for all images of a batch at once. Boxes are (n, 5): class, then x1, y1, x2, y2 in pixels;
coordinates are continuous, 0 at the left and upper edge of the first pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.batch import Letterbox
from utils.datasets.geometry import Matrix, Tile, keep_upright
from utils.datasets.labels import Labels

Boxes = NDArray[np.float32]
Targets = NDArray[np.float32]

_MIN_SIDE_PX = 2.0
_MIN_AREA_RATIO = 0.1
_MAX_ASPECT = 100.0
_EPS = 1e-9
_NEAREST = 1e-6  # smallest homogeneous coordinate of what shows: below 0 lies what is behind the camera


@dataclass(frozen=True)
class PlacedTile:
    """A tile that is visible in a batch image.

    place: of the image in the batch. canvas_wh: size in pixels of the canvas, at whose edge labels end.
    matrix: (3, 3) map from the canvas to the batch image. scale: its scale factor.
    """

    place: int
    tile: Tile
    canvas_wh: tuple[int, int]
    matrix: Matrix
    scale: float


def tile_targets(placed: Sequence[PlacedTile], labels: Sequence[Labels], out_hw: tuple[int, int]) -> Targets:
    """Return the targets (M, 6) of augmented images, without those of which too little is left.

    Args:
        placed: the visible tiles of all images, in the order of these.
        labels: of all images of the dataset.
        out_hw: height and width of the batch, pixels.
    """
    rows = [labels[one.tile.number] for one in placed]
    counts = [len(part) for part in rows]
    if not sum(counts):
        return np.zeros((0, 6), np.float32)

    def each(values: list[tuple[int, int]] | list[float] | list[int] | list[Matrix]) -> NDArray[np.float64]:
        """Return one value for each label."""
        return np.repeat(np.array(values, np.float64), counts, 0)

    sizes = each([one.tile.wh for one in placed]).astype(np.float32)
    origins = each([one.tile.origin_xy for one in placed]).astype(np.float32)
    boxes = place_boxes(np.concatenate(rows), sizes, origins)
    limits = each([one.canvas_wh for one in placed]).astype(np.float32)
    boxes[:, 1:] = boxes[:, 1:].clip(0, np.concatenate([limits, limits], 1))
    warped = warp_boxes(boxes, each([one.matrix for one in placed]), out_hw)
    keep = box_candidates(boxes[:, 1:] * each([one.scale for one in placed])[:, None], warped[:, 1:])
    return _as_targets(warped[keep], each([one.place for one in placed])[keep], out_hw)


def letterbox_targets(
    rows: Sequence[Labels], letterboxes: Sequence[Letterbox], out_hw: tuple[int, int]
) -> Targets:
    """Return the targets (M, 6) of letterboxed images, all of them.

    Args:
        rows: the labels of each image of the batch.
        letterboxes: the placement of each.
        out_hw: height and width of the batch, pixels.
    """
    shown_wh, pads_xy = [], []
    for box in letterboxes:
        (height, width), (down, across) = box.original_hw, box.scale
        shown_wh.append((round(across * width), round(down * height)))
        pads_xy.append((int(box.pad[1]), int(box.pad[0])))
    counts = [len(part) for part in rows]
    sizes, origins = (np.repeat(np.array(values, np.float32), counts, 0) for values in (shown_wh, pads_xy))
    boxes = place_boxes(np.concatenate(rows), sizes, origins)
    return _as_targets(boxes, np.repeat(np.arange(len(rows)), counts), out_hw)


def _as_targets(boxes: Boxes, places: NDArray[np.number], out_hw: tuple[int, int]) -> Targets:
    labels = normalise_boxes(boxes, (out_hw[1], out_hw[0]))
    return np.concatenate([places[:, None].astype(np.float32), labels], 1)


def place_boxes(
    labels: Labels,
    image_wh: tuple[int, int] | NDArray[np.float32],
    origin_xy: tuple[int, int] | NDArray[np.float32],
) -> Boxes:
    """Convert normalised labels (n, 5) of an image at `origin_xy` to boxes in canvas pixels.

    Size and origin are those of one image, or (n, 2), of each label's.
    """
    size, origin = np.asarray(image_wh, np.float32), np.asarray(origin_xy, np.float32)
    centre, half = labels[:, 1:3] * size + origin, labels[:, 3:] / 2 * size
    return np.concatenate([labels[:, :1], centre - half, centre + half], 1)


def normalise_boxes(boxes: Boxes, wh: tuple[int, int]) -> Labels:
    """Convert pixel boxes (n, 5) class, x1, y1, x2, y2 to labels class, cx, cy, w, h, normalised by `wh`."""
    size = np.array(wh, np.float32)
    centre, extent = (boxes[:, 1:3] + boxes[:, 3:]) / 2, boxes[:, 3:] - boxes[:, 1:3]
    return np.concatenate([boxes[:, :1], centre / size, extent / size], 1)


def warp_boxes(boxes: Boxes, matrices: Matrix, out_hw: tuple[int, int]) -> Boxes:
    """Return the boxes around what the output shows of warped boxes; without area where it shows nothing.

    Args:
        boxes: (n, 5).
        matrices: a map (3, 3), or one for each box (n, 3, 3).
        out_hw: height and width of the output, pixels.
    """
    corners = np.ones((len(boxes), 4, 3))
    corners[..., :2] = boxes[:, [1, 2, 3, 4, 1, 4, 3, 2]].reshape(-1, 4, 2)
    moved = corners @ np.swapaxes(matrices, -1, -2)
    if not keep_upright(matrices):
        # Turned, a corner beyond the border widens the box however far it is from what shows.
        moved = _visible_parts(moved[:, [0, 2, 1, 3]], out_hw)  # opposite corners came first: now around
    # The short axis first: over the last one NumPy reduces each box by itself.
    places = np.ascontiguousarray((moved[..., :2] / moved[..., 2:]).swapaxes(0, 1))
    around = np.concatenate([places.min(0), places.max(0)], 1).clip(0, [out_hw[1], out_hw[0]] * 2)
    return np.concatenate([boxes[:, :1], around], 1).astype(np.float32)


def _visible_parts(corners: NDArray[np.float64], out_hw: tuple[int, int]) -> NDArray[np.float64]:
    """Return the parts (n, 9, 3) of convex quadrilaterals (n, 4, 3) before the camera and in the output."""
    height, width = out_hw
    parts = _cut(corners, [0, 0, 1], _NEAREST)
    for border in ([1, 0, 0], [-1, 0, width], [0, 1, 0], [0, -1, height]):
        parts = _cut(parts, border)
    return parts


def _cut(polygons: NDArray[np.float64], normal: Sequence[int], least: float = 0.0) -> NDArray[np.float64]:
    """Return the parts (n, k + 1, 3) of convex polygons (n, k, 3): those with `normal` @ p >= `least`.

    Vertices are homogeneous and in order; spare ones repeat the first. Nothing left is the output's origin.
    """
    count, sides, _ = polygons.shape
    ends, depths = np.roll(polygons, -1, 1), polygons @ np.array(normal, np.float64) - least
    end_depths = np.roll(depths, -1, 1)
    inside = depths >= 0
    crosses = inside != (end_depths >= 0)
    shares = depths / np.where(crosses, depths - end_depths, 1.0)
    crossings = polygons + shares[..., None] * (ends - polygons)
    vertices = np.stack([polygons, crossings], 2).reshape(count, 2 * sides, 3)
    kept = np.stack([inside, crosses], 2).reshape(count, 2 * sides)
    vertices[~kept.any(1)] = [0.0, 0.0, 1.0]
    order = np.argsort(~kept, 1, kind="stable")[:, : sides + 1]
    order = np.where(np.take_along_axis(kept, order, 1), order, order[:, :1])
    return np.take_along_axis(vertices, order[..., None], 1)


def box_candidates(before: NDArray[np.floating], after: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Return a mask (n,) of the boxes (n, 4) that are still worth learning after augmentation.

    Both sides above 2 px, more than a tenth of the area left, neither side 100 times the other. A box without
    area before, off the canvas, would get one by turning.
    """
    (width_before, height_before), (width, height) = (
        (rows[:, 2:] - rows[:, :2]).T for rows in (before, after)
    )
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    area_before = width_before * height_before
    area_ratio = width * height / (area_before + _EPS)
    keep = (
        (area_before > 0)
        & (shorter > _MIN_SIDE_PX)
        & (area_ratio > _MIN_AREA_RATIO)
        & (longer / (shorter + _EPS) < _MAX_ASPECT)
    )
    return np.asarray(keep, np.bool_)
