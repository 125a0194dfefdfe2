"""Plots of image batches with their boxes.

Shapes: B images of H W pixels, M targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from utils.config.files import write_bytes_atomically
from utils.reporting.draw import Image, draw_boxes, draw_plate, drawable

BATCH_IMAGES = 16
BATCH_SIDE = 1920  # maximum side in pixels of a batch's plot, without captions and borders
BAR_HEIGHT, MARK_WIDTH = 22, 90  # of the caption above an image and its "unlabelled" mark
GREY, DARK, AMBER = (114, 114, 114), (60, 60, 60), (0, 170, 255)  # BGR


def plot_batch(
    path: Path,
    images: Tensor,
    targets: Tensor,
    paths: Sequence[str],
    names: Sequence[str],
    confidences: Tensor | None = None,
    labelled: Tensor | None = None,
) -> None:
    """Save the first 16 images of a batch with their boxes and file names.

    images: (B, 3, H, W) RGB, uint8 or 0..1; targets: (M, 6) image, class, centre x, centre y, width,
    height, normalised; confidences: (M,) if the boxes are detections; labelled: (B,) bool, False for
    unlabelled images.
    """
    tiles = _tiles(images[:BATCH_IMAGES])
    height, width = tiles[0].shape[:2]
    rows = targets.detach().float().cpu().numpy()
    scores = None if confidences is None else confidences.detach().float().cpu().numpy()
    bars: list[Image] = []
    # A narrow tile has no room for its name beside the mark.
    has_mark = labelled is not None and not bool(labelled[: len(tiles)].all())
    lines = 2 if has_mark and width < 2 * MARK_WIDTH else 1
    for number, tile in enumerate(tiles):
        mine = rows[:, 0] == number
        centres, sizes = rows[mine, 2:4], rows[mine, 4:6]
        boxes = np.hstack((centres - sizes / 2, centres + sizes / 2)) * (width, height, width, height)
        mine_scores = None if scores is None else scores[mine]
        draw_boxes(tile, boxes, rows[mine, 1].astype(np.int64), names, mine_scores)
        known = labelled is None or bool(labelled[number])
        bars.append(_captioned(tile, Path(paths[number]).name if number < len(paths) else "", known, lines))
    _save_picture(path, _grid(bars))


def _tiles(images: Tensor) -> list[Image]:
    """Return the images as BGR arrays (h, w, 3), small enough to fit into a grid."""
    pixels = images.detach().float().cpu().numpy().transpose(0, 2, 3, 1)[..., ::-1]
    if images.is_floating_point():
        pixels = pixels * 255
    pictures = np.ascontiguousarray(pixels.round().clip(0, 255).astype(np.uint8))
    columns = math.ceil(len(pictures) ** 0.5)
    scale = min(1.0, BATCH_SIDE / (columns * max(pictures.shape[1:3])))
    if scale == 1.0:
        return list(pictures)
    size = (max(1, round(pictures.shape[2] * scale)), max(1, round(pictures.shape[1] * scale)))
    return [cv2.resize(p, size, interpolation=cv2.INTER_AREA).astype(np.uint8) for p in pictures]


def _captioned(tile: Image, caption: str, labelled: bool, lines: int) -> Image:
    """Return the tile below a bar with its caption, in a grey border; marked if it is unlabelled.

    lines: of the bar; the mark is in the last one.
    """
    bar = np.full((BAR_HEIGHT * lines, tile.shape[1], 3), DARK, np.uint8)
    room = bar[:BAR_HEIGHT]
    if not labelled:
        mark = np.full((BAR_HEIGHT, MARK_WIDTH, 3), AMBER, np.uint8)
        draw_plate(mark, "unlabelled", (4, 19), AMBER, 9)
        # Cut off on the left it would read "labelled".
        bar[-BAR_HEIGHT:, -MARK_WIDTH:] = mark[:, : bar.shape[1]]
        room = room if lines > 1 else room[:, :-MARK_WIDTH]
    if caption and room.shape[1]:
        draw_plate(room, drawable(caption), (2, 19), DARK, 9)
    framed: Image = np.pad(np.vstack((bar, tile)), ((2, 2), (2, 2), (0, 0)), constant_values=GREY[0])
    return framed


def _grid(tiles: list[Image]) -> Image:
    """Arrange the tiles in rows, as square as possible."""
    height, width = tiles[0].shape[:2]
    columns = math.ceil(len(tiles) ** 0.5)
    rows = math.ceil(len(tiles) / columns)
    grid: Image = np.full((rows * height, columns * width, 3), GREY, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * height, number % columns * width
        grid[top : top + height, left : left + width] = tile
    return grid


def _save_picture(path: Path, picture: Image) -> None:
    done, content = cv2.imencode(path.suffix, picture)  # imwrite fails silently
    assert done, path
    write_bytes_atomically(path, content.tobytes())
