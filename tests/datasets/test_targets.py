"""Targets of turned and foreshortened images enclose what shows of the objects."""

from __future__ import annotations

import numpy as np
import pytest

from utils.datasets.geometry import Tile, WarpSettings, random_warp
from utils.datasets.targets import PlacedTile, tile_targets, warp_boxes

CANVAS, WIDTH, HEIGHT = 1280, 640, 480
SETTINGS = {
    "rotation": WarpSettings(degrees=180, scale=0.5, translate=0.1),
    "shear": WarpSettings(shear=60, scale=0.5, translate=0.1),
    "perspective": WarpSettings(perspective=0.002, scale=0.9, translate=0.1),
    "all": WarpSettings(degrees=45, shear=20, perspective=0.002, scale=0.5, translate=0.5),
}


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    ends = np.sort(rng.uniform(0, CANVAS, (count, 2, 2)), 1).reshape(count, 4)
    return np.concatenate([np.zeros((count, 1)), ends], 1).astype(np.float32)


def outline(x1: float, y1: float, x2: float, y2: float, count: int = 4000) -> np.ndarray:
    """Many homogeneous points on the sides of a rectangle."""
    share, one = np.linspace(0, 1, count), np.ones(count)
    across, down = x1 + share * (x2 - x1), y1 + share * (y2 - y1)
    sides = [(across, y1 * one), (across, y2 * one), (x1 * one, down), (x2 * one, down)]
    return np.concatenate([np.stack([x, y, one], 1) for x, y in sides])


def within(points: np.ndarray, x1: float, y1: float, x2: float, y2: float) -> np.ndarray:
    """Which of the points (n, 2) lie in a rectangle."""
    return ((points >= [x1, y1]) & (points <= [x2, y2])).all(1)


def sampled_box(box: np.ndarray, matrix: np.ndarray) -> np.ndarray | None:
    """The box around many points of the outline of what shows of a box, None if none does.

    The outline is part of that of the box and part of that of the output.
    """
    moved = outline(*box[1:]) @ matrix.T
    moved = moved[moved[:, 2] > 0]
    places = moved[:, :2] / moved[:, 2:]
    shown = [places[within(places, 0, 0, WIDTH, HEIGHT)]]
    border = outline(0, 0, WIDTH, HEIGHT)
    back = border @ np.linalg.inv(matrix).T  # its last coordinate is the inverse of that of the way there
    shown.append(border[(back[:, 2] > 0) & within(back[:, :2] / back[:, 2:], *box[1:]), :2])
    points = np.concatenate(shown)
    return np.concatenate([points.min(0), points.max(0)]) if len(points) else None


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_turned_target_encloses_what_shows(kind):
    rng = np.random.default_rng(0)
    hidden = behind = 0
    for _ in range(30):
        warp = random_warp(SETTINGS[kind], (CANVAS, CANVAS), (WIDTH, HEIGHT), rng)
        boxes = random_boxes(rng, 3)
        for box, found in zip(boxes, warp_boxes(boxes, warp.matrix, (HEIGHT, WIDTH))[:, 1:], strict=True):
            expected = sampled_box(box, warp.matrix)
            behind += (box[[[1, 2], [3, 4], [1, 4], [3, 2]]] @ warp.matrix[2, :2] < -warp.matrix[2, 2]).any()
            if expected is None:
                hidden += 1
                assert (found[2:] - found[:2]).min() < 1
            else:
                np.testing.assert_allclose(found, expected, atol=1.5)
    assert hidden >= 2
    assert behind >= 5 or SETTINGS[kind].perspective == 0


def test_what_lies_behind_the_camera_or_beyond_the_border_is_no_target():
    labels = [np.array([[0, 0.1, 0.5, 0.1, 0.2]], np.float32)]
    tile = Tile(0, (1000, 1000), (0, 0), (0, 0, 1000, 1000))
    behind = np.array([[1.0, 0, -500], [0, 1, -500], [0.003, 0, -0.5]])
    # Turned by 45 degrees: the lower right corner of the box around the object shows, not the object.
    beyond = np.array([[1.0, -1, 340], [1, 1, -660], [0, 0, 1]])
    for matrix in (behind, beyond):
        placed = PlacedTile(0, tile, (1000, 1000), matrix, 1.0)
        assert len(tile_targets([placed], labels, (200, 200))) == 0


def test_an_object_off_the_canvas_is_no_target():
    labels = [np.array([[0, 0.1, 0.5, 0.1, 0.5]], np.float32)]
    tile = Tile(0, (100, 100), (-50, 0), (0, 0, 50, 100))
    turned = np.array([[0.8, -0.6, 80], [0.6, 0.8, 0], [0, 0, 1]])
    assert len(tile_targets([PlacedTile(0, tile, (200, 200), turned, 1.0)], labels, (200, 200))) == 0


def test_upright_targets_are_the_clipped_boxes_of_the_moved_corners():
    rng = np.random.default_rng(0)
    boxes, settings = random_boxes(rng, 200), WarpSettings(scale=0.5, translate=0.3)
    matrices = np.stack([random_warp(settings, (CANVAS, CANVAS), (WIDTH, HEIGHT), rng).matrix for _ in boxes])
    matrices[::2] = np.array([[-1, 0, WIDTH], [0, 1, 0], [0, 0, 1]]) @ matrices[::2]
    factors, shifts = matrices[:, [0, 1], [0, 1]], matrices[:, :2, 2]
    ends = boxes[:, 1:].reshape(-1, 2, 2) * factors[:, None] + shifts[:, None]
    expected = np.concatenate([ends.min(1), ends.max(1)], 1).clip(0, [WIDTH, HEIGHT] * 2).astype(np.float32)
    np.testing.assert_array_equal(warp_boxes(boxes, matrices, (HEIGHT, WIDTH))[:, 1:], expected)


def test_mixed_maps_are_each_taken_for_what_they_are():
    rng = np.random.default_rng(0)
    boxes = random_boxes(rng, 40)
    matrices = np.stack(
        [
            random_warp(settings, (CANVAS, CANVAS), (WIDTH, HEIGHT), rng).matrix
            for settings in (WarpSettings(scale=0.5), SETTINGS["all"])
            for _ in range(20)
        ]
    )
    together = warp_boxes(boxes, matrices, (HEIGHT, WIDTH))
    alone = [
        warp_boxes(box[None], matrix, (HEIGHT, WIDTH))[0] for box, matrix in zip(boxes, matrices, strict=True)
    ]
    sides = together[:, 3:] - together[:, 1:3]
    np.testing.assert_allclose(together[(sides > 0).all(1)], np.array(alone)[(sides > 0).all(1)], rtol=1e-5)
