"""Layout of a training sample's canvas: a mosaic of four images, or a single centred one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utils.datasets.geometry import Tile

Sizes = Sequence[tuple[int, int]]


def mosaic_tiles(
    numbers: Sequence[int], sizes_wh: Sizes, image_size: int, rng: np.random.Generator
) -> list[Tile]:
    """Place four images around a common corner point on a canvas of twice the image size.

    The point is random within the middle half of each axis. The images, in the order upper left, upper
    right, lower left, lower right, keep their size and are cropped at the edge of the canvas.

    Args:
        numbers: of the four images.
        sizes_wh: their widths and heights, the longer at most `image_size`.
        image_size: half the side of the canvas, pixels.
        rng: source of randomness.

    Source: Bochkovskiy et al., YOLOv4: Optimal Speed and Accuracy of Object Detection, 2020, section 3.3.
    """
    side = 2 * image_size
    x_mid, y_mid = rng.uniform(image_size / 2, 1.5 * image_size, 2).astype(int).tolist()
    tiles = []
    for place, (number, (width, height)) in enumerate(zip(numbers, sizes_wh, strict=True)):
        origin = (x_mid if place % 2 else x_mid - width, y_mid if place > 1 else y_mid - height)
        tiles.append(_tile(number, (width, height), origin, (side, side)))
    return tiles


def single_tile(number: int, wh: tuple[int, int], canvas_wh: tuple[int, int]) -> Tile:
    """Centre one image, no larger than the canvas."""
    return _tile(number, wh, ((canvas_wh[0] - wh[0]) // 2, (canvas_wh[1] - wh[1]) // 2), canvas_wh)


def _tile(number: int, wh: tuple[int, int], origin_xy: tuple[int, int], canvas_wh: tuple[int, int]) -> Tile:
    (left, top), (width, height) = origin_xy, wh
    span = (max(left, 0), max(top, 0), min(left + width, canvas_wh[0]), min(top + height, canvas_wh[1]))
    return Tile(number, wh, origin_xy, span)
