"""Layout of a training sample's canvas: a mosaic of four images, or a single centred one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.datasets.geometry import Boxes, Tile
from utils.datasets.labels import Labels


@dataclass(frozen=True)
class ImageInfo:
    """What the layout needs to know about an image: number, scaled width and height, labels."""

    number: int
    wh: tuple[int, int]
    labels: Labels


def mosaic_tiles(pictures: Sequence[ImageInfo], image_size: int, rng: np.random.Generator) -> list[Tile]:
    """Place four images around a common corner point on a canvas of twice the image size.

    The point is random within the middle half of each axis. The images, in the order upper left, upper
    right, lower left, lower right, keep their size and are cropped at the edge of the canvas.

    Args:
        pictures: four, the longer side of each at most `image_size`.
        image_size: half the side of the canvas, pixels.
        rng: source of randomness.

    Source: Bochkovskiy et al., YOLOv4: Optimal Speed and Accuracy of Object Detection, 2020, section 3.3.
    """
    side = 2 * image_size
    x_mid, y_mid = (int(value) for value in rng.uniform(image_size / 2, 1.5 * image_size, 2))
    tiles = []
    for place, picture in enumerate(pictures):
        width, height = picture.wh
        origin = (x_mid if place % 2 else x_mid - width, y_mid if place > 1 else y_mid - height)
        tiles.append(_tile(picture, origin, (side, side)))
    return tiles


def single_tile(picture: ImageInfo, canvas_wh: tuple[int, int]) -> Tile:
    """Centre one image, no larger than the canvas."""
    width, height = picture.wh
    return _tile(picture, ((canvas_wh[0] - width) // 2, (canvas_wh[1] - height) // 2), canvas_wh)


def _tile(picture: ImageInfo, origin_xy: tuple[int, int], canvas_wh: tuple[int, int]) -> Tile:
    (left, top), (width, height) = origin_xy, picture.wh
    span = (max(left, 0), max(top, 0), min(left + width, canvas_wh[0]), min(top + height, canvas_wh[1]))
    boxes = place_boxes(picture.labels, picture.wh, origin_xy)
    boxes[:, 1:] = boxes[:, 1:].clip(0, [*canvas_wh, *canvas_wh])
    return Tile(picture.number, origin_xy, span, boxes)


def place_boxes(labels: Labels, image_wh: tuple[int, int], origin_xy: tuple[int, int]) -> Boxes:
    """Convert normalised labels (n, 5) of an image at `origin_xy` to boxes in canvas pixels."""
    size, origin = np.array(image_wh, np.float32), np.array(origin_xy, np.float32)
    centre, half = labels[:, 1:3] * size + origin, labels[:, 3:] / 2 * size
    return np.concatenate([labels[:, :1], centre - half, centre + half], 1)


def normalise_boxes(boxes: Boxes, wh: tuple[int, int] | NDArray[np.float32]) -> Labels:
    """Convert pixel boxes (n, 5) class, x1, y1, x2, y2 to labels class, cx, cy, w, h, normalised by `wh`."""
    size = np.array(wh, np.float32)
    centre, extent = (boxes[:, 1:3] + boxes[:, 3:]) / 2, boxes[:, 3:] - boxes[:, 1:3]
    return np.concatenate([boxes[:, :1], centre / size, extent / size], 1)
